"""What a page holds of an image record and its pairs, as `page.js` reads it.

A block is a record: a header in JSON with all that is said of it, then attention and pictures as
bytes. A weight w is there as the byte 255 √w: so that small ones, as 1/36 is, are not lost, it is
off by less than 0.004, and by less than 0.0007 below 1/36.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.config import ModelConfig
from shards.inspect.html import with_header
from shards.inspect.names import Names
from shards.inspect.records import Record
from trainer.show.look import Layer, Seen, Top


@dataclass(frozen=True)
class Told:
    """A sentence with what the model makes of it."""

    tokens: tuple[str, ...]
    """With [CLS] and [SEP]."""
    cut: bool
    """Whether the sentence has more than these."""
    seen: Seen


@dataclass(frozen=True)
class Vocabulary:
    """What ids stand for."""

    tokens: Sequence[str]
    answers: Sequence[str]
    names: Names


def attention_bytes(config: ModelConfig, objects: Sequence[int], tokens: Sequence[int]) -> int:
    """Bytes of the attention of a record with its sentences. objects: of each of its pictures;
    tokens: of each sentence."""
    total = 0
    for n in objects:
        total += config.object_layers * n * n
        for t in tokens:
            total += config.language_layers * t * t + config.cross_layers * (t + n) ** 2
    return total * config.num_heads


def image_block(
    record: Record,
    pictures: Sequence[bytes],
    told: Sequence[Told],
    layers: Sequence[Layer],
    vocabulary: Vocabulary,
) -> bytes:
    """The block of a record. pictures: a JPEG, or nothing, of each of its parts."""
    body = _Body()
    labels = record.labels
    header = {
        "image": record.image,
        "place": f"{record.shard}:{record.index}",
        "split": record.split,
        "parts": [
            {
                **asdict(part.picture),
                "first": part.objects.start,
                "objects": part.objects.stop - part.objects.start,
                "picture": body.add(picture),
            }
            for part, picture in zip(record.parts, pictures, strict=True)
        ],
        "boxes": [[round(x, 4) for x in box] for box in record.boxes.tolist()],
        "labels": None
        if labels is None
        else [
            [vocabulary.names.object(a), round(b, 3), vocabulary.names.attribute(c), round(d, 3)]
            for a, b, c, d in zip(
                labels.object_id.tolist(),
                labels.object_conf.tolist(),
                labels.attribute_id.tolist(),
                labels.attribute_conf.tolist(),
                strict=True,
            )
        ],
        # These are alike in all of its pairs.
        "maps": _maps(body, told[0].seen, layers, of_image=True),
        "sentences": [
            {
                "tokens": t.tokens,
                "cut": t.cut,
                "answers": _named(t.seen.answers, vocabulary.answers),
                "matching": None if t.seen.matching is None else round(t.seen.matching, 4),
                "masked": _filled(t.seen, vocabulary),
                "maps": _maps(body, t.seen, layers, of_image=False),
            }
            for t in told
        ],
    }
    return with_header(header, body.parts)


class _Body:
    """Bytes after a header, which says where each piece begins and how long it is."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self._at = 0

    def add(self, piece: bytes) -> list[int]:
        self.parts.append(piece)
        self._at += len(piece)
        return [self._at - len(piece), len(piece)]

    def map(self, weights: NDArray[np.float32]) -> list[int]:
        """Where weights (heads, queries, keys) begin, then their three sizes."""
        bytes_ = np.rint(255 * np.sqrt(weights)).astype(np.uint8).tobytes()
        return [self.add(bytes_)[0], *weights.shape]


def _maps(body: _Body, seen: Seen, layers: Sequence[Layer], of_image: bool) -> list[Any]:
    """Where the weights of some layers are: for each part of the record those of each layer."""
    return [
        [
            body.map(weights)
            for layer, weights in zip(layers, attentions, strict=True)
            if layer.of_image == of_image
        ]
        for attentions in seen.attentions
    ]


def _named(top: Top | None, names: Sequence[str]) -> list[list[Any]] | None:
    return None if top is None else [[names[i], round(chance, 4)] for i, chance in top]


def _filled(seen: Seen, vocabulary: Vocabulary) -> dict[str, Any]:
    """Masked places, and what the model has there."""
    filled, names = seen.filled, vocabulary.names

    def labels(tops: tuple[Top, ...] | None, name: Any) -> list[Any] | None:
        if tops is None:
            return None
        return [[[name(i), round(chance, 4)] for i, chance in top] for top in tops]

    return {
        "words": list(filled.masks.words),
        "objects": list(filled.masks.objects),
        "says": None
        if filled.words is None
        else [_named(top, vocabulary.tokens) for top in filled.words],
        "object": labels(filled.objects, names.object),
        "attribute": labels(filled.attributes, names.attribute),
    }

"""The other loaders, each as its documentation configures it for training from a local disk.

A peer is an endless iterator of records in a shuffled order, in this process (threads that it
starts run as it likes). A record is one image with its sentences as JSON; one pair is made of it.
All formats hold the same bytes, uncompressed, and a record's arrays are read with np.frombuffer
only. What users put on top is `stacked` (features to one array) and `ready` (sentence chosen,
tokenised and masked, objects masked, everything stacked).
"""

from __future__ import annotations

import json
import os
import random
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import webdataset
from numpy.typing import NDArray
from tokenizers import Tokenizer

from shards.format.members import LABELS
from shards.format.record import ImageRecord, record_json
from synthetic import DIM, OBJECTS, records

MAX_TOKENS, TOKEN_MASK, OBJECT_MASK = 20, 0.15, 0.15


@dataclass
class Sample:
    """One record as a peer hands it out. features: (36, 2048); document: JSON with the sentences;
    boxes: f32[36, 4] as bytes; labels: see `shards.format.members.LABELS`."""

    features: NDArray[Any]
    document: bytes
    boxes: bytes
    labels: bytes


@dataclass(frozen=True)
class Peer:
    """build(images, folder) writes the peer's format to a folder of that name, None where another
    one has; samples(folder) reads it without end."""

    name: str
    folder: str
    build: Callable[[int, Path], None] | None
    samples: Callable[[Path], Iterator[Sample]]


def _sample(features: Any, document: Any, boxes: Any, labels: Any) -> Sample:
    array = np.frombuffer(features, dtype=np.float16).reshape(OBJECTS, DIM)
    return Sample(array, document, boxes, labels)


def of_tar(members: dict[str, Any]) -> Sample:
    names = ("features.f16", "json", "boxes.f32", "labels.bin")
    return _sample(*(members[name] for name in names))


def fields(record: ImageRecord) -> dict[str, bytes]:
    assert record.labels is not None
    return {
        "features": record.features.tobytes(),
        "document": record_json(record),
        "boxes": record.boxes.tobytes(),
        "labels": LABELS.payload(record),
    }


# --- what users put on top ----------------------------------------------------------------------


def stacked(samples: Iterator[Sample], batch: int) -> Iterator[int]:
    """Records read and features stacked, nothing else: yields the number of records."""
    while True:
        yield len(np.stack([s.features for s in islice(samples, batch)]))


def ready(samples: Iterator[Sample], batch: int, vocab: Tokenizer) -> Iterator[int]:
    """Pairs as the model needs them, made by a map over samples and a collate."""
    make = partial(_pair, rng=np.random.default_rng(0), vocab=vocab, other=["a"])
    return _collated(map(make, samples), batch)


def _collated(pairs: Iterator[dict[str, NDArray]], batch: int) -> Iterator[int]:
    while rows := list(islice(pairs, batch)):
        made = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        yield len(made["tokens"])


def _pair(
    sample: Sample, rng: np.random.Generator, vocab: Tokenizer, other: list[str]
) -> dict[str, NDArray]:
    """One pair of a sample. other: the sentence of the sample before, for mismatched pairs."""
    sentences = json.loads(sample.document)["sentences"]
    sentence = sentences[int(rng.integers(len(sentences)))]
    matched = rng.random() < 0.5
    text, other[0] = sentence["text"] if matched else other[0], sentence["text"]

    ids = np.asarray(vocab.encode(text).ids[: MAX_TOKENS - 2], dtype=np.int64)
    draw = rng.random(len(ids))
    target = np.full(MAX_TOKENS, -1, dtype=np.int64)
    masked = draw < TOKEN_MASK
    target[1 : len(ids) + 1][masked] = ids[masked]
    ids[draw < 0.8 * TOKEN_MASK] = 4
    swapped = masked & (draw >= 0.8 * TOKEN_MASK) & (draw < 0.9 * TOKEN_MASK)
    ids[swapped] = rng.integers(0, vocab.get_vocab_size(), int(swapped.sum()))
    tokens = np.zeros(MAX_TOKENS, dtype=np.int64)
    tokens[0], tokens[1 : len(ids) + 1], tokens[len(ids) + 1] = 2, ids, 3

    draw = rng.random(OBJECTS)
    features = sample.features.copy()
    features[draw < 0.8 * OBJECT_MASK] = 0
    labels = np.frombuffer(sample.labels, dtype=np.int32).reshape(4, OBJECTS)
    return {
        "tokens": tokens,
        "targets": target,
        "features": features,
        "boxes": np.frombuffer(sample.boxes, dtype=np.float32).reshape(OBJECTS, 4),
        "labels": labels[::2].astype(np.int64),
        "confidences": labels[1::2].view(np.float32),
        "objects_masked": draw < OBJECT_MASK,
        "matched": np.asarray(matched),
    }


# --- webdataset ---------------------------------------------------------------------------------


def _webdataset(folder: Path) -> Iterator[Sample]:
    """Our own tars by the stock reader, without decoders; buffers as in its documentation."""
    urls = sorted(str(p) for p in folder.glob("*.tar"))
    data = webdataset.WebDataset(urls, shardshuffle=100, seed=1).repeat().shuffle(1000)
    for s in data:
        yield of_tar(s)


# --- megatron-energon ---------------------------------------------------------------------------


def _build_energon(images: int, folder: Path) -> None:
    """Energon's index beside our tars, which `folder` holds hard links to: the same pages."""
    from megatron.energon.flavors.webdataset import prepare

    tars = sorted((folder.parent / "shards").glob("*.tar"))
    for tar in tars:
        os.link(tar, folder / tar.name)
    prepare.WebdatasetPreparator.prepare_dataset(
        folder, [t.name for t in tars], split_parts_ratio=[("train", 1.0)], workers=1
    )
    (folder / ".nv-meta" / "dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    )


def _energon(folder: Path) -> Iterator[Sample]:
    """Crude samples without a decoder; buffers as in its documentation. It makes the batches: its
    loader does its housekeeping by the batch, and would slow down by the sample."""
    from megatron import energon

    @energon.edataclass
    class Record(energon.Sample):
        """Energon hands out its own samples only; this one carries ours."""

        sample: Sample

    def cook(crude: dict[str, Any]) -> Any:
        return Record(**energon.basic_sample_keys(crude), sample=of_tar(crude))

    class Encoder(energon.DefaultTaskEncoder):
        """Raw bytes to records, records to lists."""

        decoder = None
        cookers = (energon.Cooker(energon.stateless(cook)),)

        @energon.stateless
        def batch(self, samples: list[Any]) -> list[Any]:
            return samples

    data = energon.get_train_dataset(
        folder,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=256,
        shuffle_buffer_size=100,
        max_samples_per_sequence=100,
        task_encoder=Encoder(),
    )
    for batch in energon.get_loader(data):
        for record in batch:
            yield record.sample


# --- mosaicml-streaming -------------------------------------------------------------------------


@cache
def streaming() -> Any:
    """mosaicml-streaming. It imports torchvision for its picture data sets, which nothing here
    uses: a stand-in takes torchvision's place meanwhile (pyproject.toml says why it is absent)."""
    import transformers  # noqa: F401  looks for torchvision: not for the stand-in

    names = ("torchvision", "torchvision.datasets", "torchvision.transforms.functional")
    stand_in = {name: ModuleType(name) for name in names}
    vars(stand_in[names[1]])["VisionDataset"] = type("VisionDataset", (), {})
    vars(stand_in[names[2]])["to_tensor"] = None
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.modules.update(stand_in)
    import streaming as package

    for name in names:
        del sys.modules[name]
    sys.modules.update(before)
    return package


def _build_mosaicml(images: int, folder: Path) -> None:
    columns = dict.fromkeys(("features", "document", "boxes", "labels"), "bytes")
    with streaming().MDSWriter(out=str(folder), columns=columns, size_limit="64mb") as writer:
        for record in records(images):
            writer.write(fields(record))


def _mosaicml(folder: Path) -> Iterator[Sample]:
    """Its default shuffle (py1e). One epoch after the other, as it has no endless mode."""
    data = streaming().StreamingDataset(local=str(folder), batch_size=256, shuffle=True)
    while True:
        for s in data:
            yield _sample(s["features"], s["document"], s["boxes"], s["labels"])


def _mosaicml_local(folder: Path) -> Iterator[Sample]:
    """Its reader alone, asked for samples in a random order: no shuffle, download or resume of its
    own, and none of the threads that its StreamingDataset spends most of its time waiting for."""
    data = streaming().LocalDataset(local=str(folder))
    while True:
        for i in np.random.permutation(len(data)).tolist():
            s = data[i]
            yield _sample(s["features"], s["document"], s["boxes"], s["labels"])


# --- litdata ------------------------------------------------------------------------------------


def _build_litdata(images: int, folder: Path) -> None:
    from litdata.streaming.cache import Cache

    cache = Cache(str(folder), chunk_bytes="64MB")
    for i, record in enumerate(records(images)):
        cache[i] = fields(record)
    cache.done()
    cache.merge()


def _litdata(folder: Path) -> Iterator[Sample]:
    """Its default shuffle. One epoch after the other, as it has no endless mode."""
    import litdata

    data = litdata.StreamingDataset(str(folder), shuffle=True)
    while True:
        for s in data:
            yield _sample(s["features"], s["document"], s["boxes"], s["labels"])


STREAMED = (
    Peer("webdataset", "shards", None, _webdataset),
    Peer("mosaicml-streaming", "mds", _build_mosaicml, _mosaicml),
    Peer("mosaicml-streaming, LocalDataset", "mds", None, _mosaicml_local),
    Peer("litdata", "litdata", _build_litdata, _litdata),
    Peer("megatron-energon", "energon", _build_energon, _energon),
)


# --- in RAM, as LXMERT's release ----------------------------------------------------------------


class InRam:
    """A loader as LXMERT's release has it: all features in RAM in fp32, an item a pair, with words
    and objects masked one by one in Python. Written for this comparison."""

    def __init__(self, images: int, vocab: dict[str, int]) -> None:
        self.vocab = vocab
        self.words = list(vocab)
        self.images: dict[str, dict[str, Any]] = {}
        self.pairs: list[tuple[str, str]] = []
        for r in records(images):
            assert r.labels is not None
            self.images[r.image] = {
                "features": r.features.astype(np.float32),
                "boxes": r.boxes * np.float32(480),
                "width": 480,
                "height": 480,
                **vars(r.labels),
            }
            self.pairs += [(r.image, s.text) for s in r.sentences]

    def _order(self) -> Iterator[int]:
        while True:
            yield from np.random.permutation(len(self.pairs)).tolist()

    def stacked(self, batch: int) -> Iterator[int]:
        order = self._order()
        while True:
            items = [self.images[self.pairs[i][0]]["features"].copy() for i in islice(order, batch)]
            yield len(np.stack(items))

    def ready(self, batch: int) -> Iterator[int]:
        return _collated(map(self._item, self._order()), batch)

    def _item(self, index: int) -> dict[str, NDArray]:
        name, text = self.pairs[index]
        image = self.images[name]
        features, boxes = image["features"].copy(), image["boxes"].copy()
        boxes[:, (0, 2)] /= image["width"]
        boxes[:, (1, 3)] /= image["height"]
        matched = random.random() < 0.5
        if not matched:
            text = random.choice(self.pairs)[1]

        tokens = self._wordpieces(text)[: MAX_TOKENS - 2]
        ids, targets = [self.vocab["[CLS]"]], [-1]
        for token in tokens:
            fate = random.random() / TOKEN_MASK
            targets.append(self.vocab[token] if fate < 1 else -1)
            if fate < 0.8:
                token = "[MASK]"
            elif fate < 0.9:
                token = random.choice(self.words)
            ids.append(self.vocab[token])
        ids.append(self.vocab["[SEP]"])
        targets.append(-1)
        padding = MAX_TOKENS - len(ids)

        masked = np.zeros(OBJECTS, dtype=np.float32)
        for i in range(OBJECTS):
            fate = random.random() / OBJECT_MASK
            if fate < 1:
                masked[i] = 1
            if fate < 0.8:
                features[i] = 0
            elif fate < 0.9:
                other = self.images[random.choice(self.pairs)[0]]
                features[i] = other["features"][random.randrange(OBJECTS)]
        return {
            "tokens": np.asarray(ids + [0] * padding),
            "targets": np.asarray(targets + [-1] * padding),
            "features": features,
            "boxes": boxes,
            "objects": image["object_id"],
            "object_confidences": image["object_conf"],
            "attributes": image["attribute_id"],
            "attribute_confidences": image["attribute_conf"],
            "objects_masked": masked,
            "matched": np.asarray(matched),
        }

    def _wordpieces(self, text: str) -> list[str]:
        """WordPiece in Python: the longest known piece first, `##` before those inside a word."""
        pieces = []
        for word in unicodedata.normalize("NFD", text.lower()).split():
            begin, found = 0, []
            while begin < len(word):
                end = len(word)
                while end > begin:
                    piece = word[begin:end] if not begin else "##" + word[begin:end]
                    if piece in self.vocab:
                        break
                    end -= 1
                else:
                    found = ["[UNK]"]
                    break
                found.append(piece)
                begin = end
            pieces += found
        return pieces

"""A record with its pairs: read from the data set, looked at by the model, told to the page."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from shards.format.answers import answer_index
from shards.format.table import Table
from shards.format.tokenizer import encode_batch, make_tokenizer
from shards.inspect.pictures import find_picture, thumbnail
from shards.inspect.records import OpenSet, Record
from shards.order.keys import VERSION, pair_keys
from trainer.evaluate import VALIDATION_SEED
from trainer.kinds import answer_type, kind_of
from trainer.show.choose import Chosen
from trainer.show.example import Example, score_of, truth_of
from trainer.show.look import Masks, Seen, Sight, Viewer, draw_masks, look
from trainer.show.page import Told, Vocabulary, image_block


@dataclass
class Maker:
    """Makes blocks of a page, and counts the pictures in them."""

    data: OpenSet
    viewer: Viewer
    vocabulary: Vocabulary
    folder: Path | None
    """Of the pictures."""
    pictures: int = 0
    unreadable: int = 0
    """Files that have an image's name and are no picture."""
    _known: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self._known = answer_index(self.vocabulary.answers)

    @cached_property
    def _ends(self) -> tuple[int, int]:
        """Ids of [CLS] and [SEP]."""
        tokens = self.vocabulary.tokens
        return tokens.index("[CLS]"), tokens.index("[SEP]")

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return make_tokenizer(self.vocabulary.tokens)

    def image(self, number: int, table: Table, chosen: Chosen) -> tuple[bytes, list[Example]]:
        """The block of image record `number` of the page, and the rows of its pairs in the list."""
        data, vocabulary = self.data, self.vocabulary
        record = data.record(chosen.shard, table, chosen.index, features=True)
        first = int(table.image_sentences[chosen.index])
        rows = [first + n for n in chosen.sentences]
        ids = [self._ids(table, row) for row in rows]
        seen = list(look(self.viewer, _sight(record, ids), self._masks(chosen, rows, ids, record)))
        texts = [record.sentences[n].text for n in chosen.sentences]
        limit = data.manifest.schema.max_tokens - 2
        whole = encode_batch(self._tokenizer, texts, limit + 1)
        told = [
            Told(tuple(vocabulary.tokens[i] for i in sentence), len(all_) > limit, sight)
            for sentence, all_, sight in zip(ids, whole, seen, strict=True)
        ]
        block = image_block(record, self._pictures(record), told, self.viewer.layers, vocabulary)
        examples = [
            self._example(table, record, (number, i), n, sight)
            for i, (n, sight) in enumerate(zip(chosen.sentences, seen, strict=True))
        ]
        return block, examples

    def _ids(self, table: Table, row: int) -> NDArray[np.int64]:
        begin, end = table.token_start[row : row + 2].tolist()
        first, last = self._ends
        return np.asarray([first, *table.tokens[begin:end].tolist(), last], dtype=np.int64)

    def _masks(
        self, chosen: Chosen, rows: list[int], ids: list[NDArray[np.int64]], record: Record
    ) -> list[Masks]:
        """The masks of pairs, which depend on nothing but the pair."""
        start = int(self.data.manifest.shards.pair_start[chosen.shard])
        pair = np.asarray(rows, dtype=np.int64) + start
        keys = pair_keys(VERSION, VALIDATION_SEED, np.zeros_like(pair), pair)
        return [
            draw_masks(keys[i : i + 1], len(sentence) - 2, len(record.boxes))
            for i, sentence in enumerate(ids)
        ]

    def _pictures(self, record: Record) -> list[bytes]:
        """A JPEG of each picture that a record is of, or nothing."""
        found = []
        for part in record.parts:
            path = find_picture(self.folder, part.picture.image) if self.folder else None
            jpeg = thumbnail(path) if path else None
            self.pictures += jpeg is not None
            self.unreadable += path is not None and jpeg is None
            found.append(jpeg or b"")
        return found

    def _example(
        self, table: Table, record: Record, place: tuple[int, int], number: int, seen: Seen
    ) -> Example:
        sentence, manifest = record.sentences[number], self.data.manifest
        row = int(table.image_sentences[record.index]) + number
        # What is said about two images is to be judged, in a test set without answers, too.
        question = record.sides is not None or sentence.source in manifest.question_sources
        begin, end = table.answer_start[row : row + 2].tolist()
        best = seen.answers[0][0] if question and seen.answers else None
        return Example(
            image=place[0],
            image_id=record.image,
            sentence=place[1],
            number=number,
            id=sentence.id,
            text=sentence.text,
            source=sentence.source,
            kind=kind_of(sentence.kind, sentence.text)
            if question
            else sentence.kind or sentence.source,
            type=answer_type(sentence.answers),
            objects=len(record.boxes),
            truth=truth_of(sentence, self._known, self.vocabulary.answers),
            answer=None if best is None else self.vocabulary.answers[best],
            score=None
            if best is None
            else score_of(best, table.answer_id[begin:end], table.answer_score[begin:end]),
            matching=None if seen.matching is None else round(seen.matching, 4),
        )


def _sight(record: Record, ids: list[NDArray[np.int64]]) -> Sight:
    """What the model is given."""
    assert record.features is not None
    return Sight(ids, record.features, record.boxes, [part.objects for part in record.parts])

"""The sentences of a shard's records as the arrays of its table: tokens, sources, answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from shards.format.answers import normalise_answers
from shards.format.manifest import Schema
from shards.format.tokenizer import encode_batch

Document = dict[str, Any]
"""The parsed JSON of an image record."""

Unknown = Callable[[Document, str, str], None]
"""Called with an answer that is not in the answer table: the record, the sentence's text, and the
answer. The answer is left out, unless this raises."""


@dataclass(frozen=True)
class SentenceEncoder:
    """What turns the sentences of a data set into numbers."""

    schema: Schema
    sources: Sequence[str]
    """A sentence's source is its index here."""
    tokenizer: Tokenizer
    answers: dict[str, int]
    """Normal form of an answer -> its id."""

    def arrays(self, documents: Iterable[Document], unknown: Unknown) -> dict[str, NDArray]:
        """The arrays of a table that come from sentences (`shards.format.table.Table`), of records
        in order."""
        numbers = {source: i for i, source in enumerate(self.sources)}
        texts: list[str] = []
        source_of: list[int] = []
        sentences: list[int] = []  # of each image
        answer_counts: list[int] = []
        ids: list[int] = []
        scores: list[float] = []
        for document in documents:
            sentences.append(len(document["sentences"]))
            for sentence in document["sentences"]:
                texts.append(sentence["text"])
                source_of.append(numbers[sentence["source"]])
                before = len(ids)
                for answer, score in normalise_answers(sentence.get("answers") or {}).items():
                    if answer in self.answers:
                        ids.append(self.answers[answer])
                        scores.append(score)
                    else:
                        unknown(document, sentence["text"], answer)
                answer_counts.append(len(ids) - before)
        tokens = encode_batch(self.tokenizer, texts, self.schema.max_tokens - 2)
        width = np.uint16 if self.schema.vocab_size <= 65535 else np.uint32
        return {
            "image_sentences": _starts(sentences),
            "sentence_source": np.asarray(source_of, dtype=np.uint8),
            "token_start": _starts([len(t) for t in tokens]),
            "tokens": np.fromiter((i for t in tokens for i in t), dtype=width),
            "answer_start": _starts(answer_counts),
            "answer_id": np.asarray(ids, dtype=np.int32),
            "answer_score": np.asarray(scores, dtype=np.float32),
        }


def _starts(counts: list[int]) -> NDArray[np.int64]:
    """Where each of ranges of such lengths begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

"""Made-up records with the sizes of LXMERT's: what every contestant of loader.py reads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from shards.format.record import ImageRecord, Labels, Sentence

OBJECTS, DIM = 36, 2048
FEATURE_BYTES = OBJECTS * DIM * 2  # of one image, fp16

# Source sets and their shares of the pairs, as in LXMERT's data (percent).
_SOURCES = {"coco_cap": 6.7, "vg_cap": 58.7, "vqa": 7.2, "gqa": 11.7, "vgqa": 15.7}
_QUESTIONS = {"vqa", "gqa", "vgqa"}
_WORDS, _ANSWERS = 8000, 500


def records(images: int) -> Iterator[ImageRecord]:
    """`images` records, always the same: 36 x 2048 fp16 features of which about a third are zero,
    boxes, labels, and 5 to 15 sentences of 7 to 13 words with answers where they are questions."""
    rng = np.random.default_rng(0)
    vocabulary = words(rng)
    frequency = 1 / np.arange(1, _WORDS + 1)  # Zipf's law
    frequency /= frequency.sum()
    share = np.asarray(list(_SOURCES.values())) / sum(_SOURCES.values())
    features = np.maximum(rng.normal(1, 2, (OBJECTS, DIM)), 0).astype(np.float16)

    for i in range(images):
        corners = np.sort(rng.random((OBJECTS, 2, 2), dtype=np.float32), axis=1)
        count = int(rng.integers(5, 16))
        sources = rng.choice(list(_SOURCES), count, p=share)
        lengths = rng.integers(7, 14, count)
        chosen = rng.choice(_WORDS, int(lengths.sum()), p=frequency).tolist()
        sentences, at = [], 0
        for source, length in zip(sources.tolist(), lengths.tolist(), strict=True):
            text = " ".join(vocabulary[w] for w in chosen[at : at + length])
            at += length
            answer = rng.integers(0, _ANSWERS, 2).tolist()
            answers = {f"answer {answer[0]}": 1.0, f"answer {answer[1]}": 0.3}
            asked = source in _QUESTIONS
            sentences.append(
                Sentence(text + " ?" if asked else text, source, answers if asked else None)
            )
        yield ImageRecord(
            image=f"image{i}",
            width=640,
            height=480,
            boxes=corners.reshape(OBJECTS, 4),
            # Rolling is cheap and makes each image another one; no format here compresses.
            features=np.roll(features, 7 * i),
            sentences=tuple(sentences),
            labels=Labels(
                rng.integers(0, 1600, OBJECTS, dtype=np.int32),
                rng.random(OBJECTS, dtype=np.float32),
                rng.integers(0, 400, OBJECTS, dtype=np.int32),
                rng.random(OBJECTS, dtype=np.float32),
            ),
        )


def words(rng: np.random.Generator) -> list[str]:
    """Distinct words of two to four syllables, so that WordPiece has something to split."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    found: dict[str, None] = {}
    while len(found) < _WORDS:
        found["".join(rng.choice(syllables, int(rng.integers(2, 5))))] = None
    return list(found)

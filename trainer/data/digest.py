"""Digests of what a step trained on, which the journal holds and `lxscale shards audit` recomputes.

A digest is a sum of hashes, modulo 2^64, of what the pairs are and of all that the model was shown
of them. So digests of slices add up to that of the whole, however a step is cut into slices.

What is not in it are the numbers of the detector (features, boxes, labels): the shards that they
are read from are verified, and the manifest whose fingerprint is in the journal has their hashes.
"""

from __future__ import annotations

import numpy as np

from model.batch import Batch
from shards.order.draws import I64, draw

VERSION = 2
"""1: the pairs and their sentences alone."""

# What a number of a pair stands for, a word of its hash.
_MATCHED, _OBJECTS, _TOKEN, _WORD, _MASKED, _ZEROED, _SWAPPED, _ANSWER = range(8)


def digest(batch: Batch, consumed: int, version: int = VERSION) -> int:
    """A 64-bit number for a batch of a step that begins after so many pairs of the run."""
    position = consumed + batch.offset.numpy()
    key = draw(0, position, batch.pair_id.numpy(), batch.sentence_id.numpy())
    if version == 1:
        return int(key.sum(dtype=np.uint64))
    total = 0

    def add(what: int, pair: I64, place: I64 | int, value: I64 | int) -> None:
        nonlocal total
        total += int(draw(key[pair], what, place, value).sum(dtype=np.uint64))

    every = np.arange(batch.pairs)
    add(_MATCHED, every, 0, batch.matched.numpy())
    add(_OBJECTS, every, 0, batch.num_objects[batch.image_index].numpy())
    start, width = batch.token_start.numpy(), batch.features.shape[1]
    tokens, lm_position = batch.tokens.numpy(), batch.lm_position.numpy()
    of = np.repeat(every, np.diff(start))
    add(_TOKEN, of, np.arange(len(tokens)) - start[of], tokens)
    of = np.searchsorted(start, lm_position, side="right") - 1
    add(_WORD, of, lm_position - start[of], batch.lm_target.numpy())
    for what, positions in (
        (_MASKED, batch.object_position),
        (_ZEROED, batch.zero_position),
        (_SWAPPED, batch.swap_position),
    ):
        of, place = np.divmod(positions.numpy(), width)
        add(what, of, place, 0)
    add(_ANSWER, batch.answer_pair.numpy(), 0, batch.answer_target.numpy())
    return total % (1 << 64)

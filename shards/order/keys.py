"""Every key of a run's order and draws: the seed, what the key is for, and what it belongs to.

A key is a chain of words (draws.py), and its second word is its purpose, so two uses of randomness
have no key in common, whatever epochs, streams and pairs there are. Version 2 of the order, which
runs of before go on with, has the purpose last or not at all.
"""

from __future__ import annotations

from enum import IntEnum

from shards.order.draws import I64, U64, draw, fold

VERSION = 3
"""Of the order: another version of these keys or of the permutation gives another order for the
same seed. It is part of a run's data state."""
VERSIONS = (2, VERSION)
"""That this lxscale can go on with."""


class Purpose(IntEnum):
    """What a key is for."""

    # Of a stream's pair: whether it is mismatched. Of a step: how its streams are mixed.
    MATCH = 1
    ARRANGE = 2
    # Of a pair in an epoch.
    SENTENCE = 3
    TOKEN = 4
    TOKEN_ID = 5
    OBJECT = 6
    DONOR = 7
    DONOR_OBJECT = 8
    ANSWER = 9
    # Of neighbouring pairs of an image in an epoch, which share the masks of its objects.
    VIEW = 17
    # Of a run, and of an epoch of a stream.
    ORDER = 10
    PAIR = 11
    SHARDS = 12
    WINDOW = 13
    LOOSE = 14
    LANE = 15
    TURN = 16
    # Of a step on a rank.
    DROPOUT = 100


def epoch_key(version: int, seed: int, epoch: int, stream: int) -> int:
    """Of an epoch of a stream."""
    return fold(seed, epoch, stream) if version == 2 else fold(seed, Purpose.ORDER, epoch, stream)


def shards_key(version: int, epoch: int) -> int:
    """Of the order of its shards; epoch: the epoch's key, here and below."""
    return epoch if version == 2 else fold(epoch, Purpose.SHARDS)


def window_key(version: int, epoch: int, window: int) -> int:
    """Of the permutation of a window's pairs or visits."""
    return fold(epoch, window) if version == 2 else fold(epoch, Purpose.WINDOW, window)


def loose_key(version: int, epoch: int, window: int) -> int:
    """Of the permutation of those of its pairs that fill no whole visit of their shard."""
    return fold(fold(epoch, window), 1) if version == 2 else fold(epoch, Purpose.LOOSE, window)


def lane_keys(epoch: U64, window: I64, lane: I64) -> U64:
    """Of the permutations of lanes, element by element."""
    return draw(0, epoch, Purpose.LANE, window, lane)


def turn_key(epoch: int, window: int) -> int:
    """Of the turn that a window with lanes begins with."""
    return fold(epoch, Purpose.TURN, window)


def match_key(version: int, seed: int, stream: int) -> int:
    """Of a stream's coins."""
    return fold(seed, stream, Purpose.MATCH) if version == 2 else fold(seed, Purpose.MATCH, stream)


def arrange_key(version: int, seed: int, consumed: int) -> int:
    """Of the step that begins after so many pairs."""
    if version == 2:
        return fold(seed, consumed, Purpose.ARRANGE)
    return fold(seed, Purpose.ARRANGE, consumed)


def pair_keys(version: int, seed: int, epoch: I64, pair: I64) -> U64:
    """One key a pair: everything drawn for it in an epoch starts here."""
    return draw(fold(seed) if version == 2 else fold(seed, Purpose.PAIR), epoch, pair)


def view_keys(seed: int, epoch: I64, stream: I64, shard: I64, image: I64, group: I64) -> U64:
    """One key a view: the neighbours of a group that have one image, given by its place in its
    shard."""
    return draw(fold(seed, Purpose.VIEW), epoch, stream, shard, image, group)

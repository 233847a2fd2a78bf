"""Statements over two pictures: a set has four pairs of pictures, and each of its sentences is true
of two of them and false of the other two, as in NLVR2.

What a sentence is about is counted in both pictures. How often a picture has it is drawn such that
one picture alone tells little: nothing at all of `in all`, `the same number` and `the other does
not`, something of the others, where it cannot be otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from random import Random

from shards.sources.scenes.scene import Filter, Scene, Want, draw_scene
from shards.sources.scenes.sentences import NUMBERS, countable

PAIRS = 4
"""Of a set."""
SENTENCES = 2
"""Of a set."""
_MOST = 3  # of what a sentence is about, in a picture: two sentences' are as many as a scene has


@dataclass(frozen=True)
class Form:
    """A kind of statement about something."""

    text: str
    """With `{a}` (a red star) or `{many}` (red stars)."""
    true: tuple[tuple[int, int], ...]
    """How many the left and the right picture have where it is true; drawn uniformly."""
    false: tuple[tuple[int, int], ...]


def _total(n: int) -> Form:
    each = range(max(0, n - _MOST), min(n, _MOST) + 1)
    cells = tuple(product(each, each))
    return Form(
        f"there are exactly {NUMBERS[n]} {{many}} in all",
        tuple(cell for cell in cells if sum(cell) == n),
        tuple(cell for cell in cells if sum(cell) != n),
    )


_ANY = tuple(product(range(_MOST + 1), repeat=2))
_MORE = ((1, 0), (2, 1), (3, 2))
_NOT_MORE = ((0, 1), (1, 2), (2, 3), (1, 1), (2, 2))
_ONE = ((0, 1), (0, 2), (1, 0), (2, 0))
_BOTH = ((1, 1), (1, 2), (2, 1), (2, 2))

FORMS = (
    Form("both pictures have {a}", _BOTH, _ONE),
    Form("one picture shows {a} and the other does not", _ONE, ((0, 0),) * 4 + _BOTH),
    Form("the left picture has more {many} than the right one", _MORE, _NOT_MORE),
    Form(
        "the left picture has fewer {many} than the right one",
        tuple((r, left) for left, r in _MORE),
        tuple((r, left) for left, r in _NOT_MORE),
    ),
    Form(
        "the two pictures have the same number of {many}",
        tuple((a, b) for a, b in _ANY if a == b),
        tuple((a, b) for a, b in _ANY if a != b),
    ),
    *(_total(n) for n in (2, 3, 4)),
)


@dataclass(frozen=True)
class StatementSet:
    """Sentences and pairs of pictures."""

    sentences: tuple[str, ...]
    pairs: tuple[tuple[Scene, Scene], ...]
    """Left and right."""
    labels: tuple[tuple[bool, ...], ...]
    """(pairs, sentences)."""


def text_of(form: Form, what: Filter) -> str:
    return form.text.format(a=what.a, many=what.many)


def draw_set(rng: Random) -> StatementSet:
    """Sentences about different things, on four pairs of pictures."""
    everything = countable()
    first = rng.choice(everything)
    # Of the same parts, so that nothing is both.
    alike = [w for w in everything if w != first and _parts(w) == _parts(first)]
    about = (first, *rng.sample(alike, SENTENCES - 1))
    forms = [rng.choice(FORMS) for _ in about]
    halves = [rng.sample([True, False] * (PAIRS // 2), PAIRS) for _ in about]
    labels = tuple(zip(*halves, strict=True))
    pairs = []
    for of_pair in labels:
        counts = [
            rng.choice(form.true if label else form.false)
            for form, label in zip(forms, of_pair, strict=True)
        ]
        left, right = (
            draw_scene(rng, Want(_things(about, [c[side] for c in counts]), about))
            for side in (0, 1)
        )
        pairs.append((left, right))
    sentences = tuple(text_of(form, what) for form, what in zip(forms, about, strict=True))
    return StatementSet(sentences, tuple(pairs), labels)


def _parts(what: Filter) -> tuple[bool, bool, bool]:
    return (what.size is not None, what.colour is not None, what.shape is not None)


def _things(about: tuple[Filter, ...], counts: list[int]) -> tuple[Filter, ...]:
    return tuple(what for what, n in zip(about, counts, strict=True) for _ in range(n))

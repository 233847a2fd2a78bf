"""Scenes: 2 to 6 things of a shape, a colour and a size, on places that do not overlap.

A scene is drawn for something that is to be true of it (`Want`), and is otherwise arbitrary: a
sentence and its answer are chosen first, so that answers can be balanced however rare they would
be by chance.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SIZES = ("small", "large")

WIDTH = 96
"""Of a picture, in pixels; its height, too."""
CELL = 32
"""A thing keeps to a cell of a grid of 3 × 3, and so off all others."""
_SIDE = WIDTH // CELL
FEWEST, MOST = 2, 6
"""Things of a scene."""
MARGIN = 8.0
"""Pixels by which centres must differ for one thing to be left of, or above, another."""

RADIUS = {"small": (6.0, 7.0), "large": (11.0, 12.5)}

DIRECTIONS = {
    "left of": ("x", 1),
    "right of": ("x", -1),
    "above": ("y", 1),
    "below": ("y", -1),
}
"""Name -> the axis, and the sign of (reference - subject) on it."""
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Thing:
    """One thing of a scene; centre and radius (half of its extent) in pixels, y downwards."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float


Scene = tuple[Thing, ...]


@dataclass(frozen=True)
class Filter:
    """What a thing may be: None is anything."""

    size: str | None = None
    colour: str | None = None
    shape: str | None = None

    def fits(self, thing: Thing) -> bool:
        return (
            (self.shape is None or self.shape == thing.shape)
            and (self.colour is None or self.colour == thing.colour)
            and (self.size is None or self.size == thing.size)
        )

    @property
    def one(self) -> str:
        """`large red star`."""
        return " ".join(p for p in (self.size, self.colour, self.shape or "shape") if p)

    @property
    def a(self) -> str:
        """`a large red star`."""
        return with_article(self.one)

    @property
    def many(self) -> str:
        """`large red stars`."""
        return plural(self.one)


@dataclass(frozen=True)
class Want:
    """What a scene is drawn for."""

    things: tuple[Filter, ...] = ()
    """There is a thing for each."""
    only: tuple[Filter, ...] = ()
    """No other thing fits any of these."""
    direction: str | None = None
    """Of `DIRECTIONS`: how the first thing stands to the second."""
    alone: bool = False
    """And no other thing stands so to the second."""


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def count(scene: Scene, what: Filter) -> int:
    return sum(what.fits(thing) for thing in scene)


def only_one(scene: Scene, what: Filter) -> Thing | None:
    """The thing that alone fits, where there is one."""
    found = [thing for thing in scene if what.fits(thing)]
    return found[0] if len(found) == 1 else None


def distance(subject: Thing, reference: Thing, direction: str) -> float:
    """Pixels by which the subject is left of (right of, above, below) the reference."""
    axis, sign = DIRECTIONS[direction]
    return sign * (getattr(reference, axis) - getattr(subject, axis))


def draw_scene(rng: Random, want: Want) -> Scene:
    """A scene of FEWEST to MOST things, in an arbitrary order.

    `want` is met but for what its filters let happen (a thing that fits several of them, centres
    that differ by less than MARGIN): the caller asks the scene, and draws another one.
    """
    n = rng.randint(max(FEWEST, len(want.things)), MOST)
    looks = [_look(rng, what) for what in want.things]
    while len(looks) < n:
        look = _look(rng, Filter())
        if not any(what.fits(Thing(*look, 0, 0, 0)) for what in want.only):
            looks.append(look)
    cells = rng.sample(range(_SIDE * _SIDE), n)
    if want.direction is not None:
        cells = _ordered(rng, cells, want.direction, want.alone)
    things = [_placed(rng, look, cell) for look, cell in zip(looks, cells, strict=True)]
    rng.shuffle(things)
    return tuple(things)


def _look(rng: Random, what: Filter) -> tuple[str, str, str]:
    return (
        what.shape or rng.choice(SHAPES),
        what.colour or rng.choice(COLOURS),
        what.size or rng.choice(SIZES),
    )


def _ordered(rng: Random, cells: list[int], direction: str, alone: bool) -> list[int]:
    """The same cells, the first of them in that direction of the second."""
    axis, sign = DIRECTIONS[direction]
    ranked = sorted(cells, key=lambda cell: sign * (cell % _SIDE if axis == "x" else cell // _SIDE))
    first, second = (0, 1) if alone else sorted(rng.sample(range(len(ranked)), 2))
    chosen = [ranked[first], ranked[second]]
    return chosen + [cell for cell in cells if cell not in chosen]


def _placed(rng: Random, look: tuple[str, str, str], cell: int) -> Thing:
    radius = round(rng.uniform(*RADIUS[look[2]]), 1)
    room = CELL / 2 - radius - 1
    row, column = divmod(cell, _SIDE)
    x, y = (round((c + 0.5) * CELL + rng.uniform(-room, room), 1) for c in (column, row))
    return Thing(*look, x, y, radius)


def cell_of(thing: Thing) -> int:
    """0 to 8, row by row."""
    return int(thing.y // CELL) * _SIDE + int(thing.x // CELL)

"""Captions, and questions with one answer each: what they say, when they can be asked, and which of
their answers is due.

Every text has each of its answers equally often in a file: an answer that a text has had comes
again when the text has had all of them, and what is then left of a round does not stay
(`Balance`). So nothing can be told from a question alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from random import Random

from shards.sources.scenes.scene import (
    COLOURS,
    DIRECTIONS,
    MARGIN,
    OPPOSITE,
    SHAPES,
    SIZES,
    Filter,
    Scene,
    Thing,
    Want,
    count,
    distance,
    draw_scene,
    only_one,
)

KINDS = ("count", "exist", "compare", "attribute", "relation")
YES_NO = ("yes", "no")
COUNTS = ("0", "1", "2", "3")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")

_TRIES = 30  # texts of a kind that are tried on a scene
_ROUNDS = 4  # that a text can be expected to have, of the few texts that a small file has
_SCENES = 20  # that are drawn for an answer; nearly always the first few do
_CANDIDATES = 4  # of which the text goes first that has had the fewest rounds


@dataclass(frozen=True)
class Question:
    """A text, and how its answer follows from a scene."""

    text: str
    kind: str
    answers: tuple[str, ...]
    answer: Callable[[Scene], str | None]
    """None: it cannot be asked of the scene."""
    want: Callable[[Random, str], Want]
    """What a scene is to be drawn for, for an answer."""


@dataclass(frozen=True)
class Asked:
    """A question with its answer on a picture."""

    question: int
    """Its place in the pool."""
    answer: str
    round: int
    """It stays if its text has all answers of this round in the end."""


class Balance:
    """Which answers each question of a pool has had in its present round, and how many questions of
    each kind have been asked."""

    def __init__(self, pool: Sequence[Question]) -> None:
        self.pool = pool
        kinds = ([i for i, q in enumerate(pool) if q.kind == kind] for kind in KINDS)
        self.kinds = [kind for kind in kinds if kind]
        """Of each kind that the pool has, the places in it."""
        self.asked = [0] * len(self.kinds)
        self.rounds = [0] * len(pool)
        """That are complete."""
        self._missing = [set(q.answers) for q in pool]

    def due(self, question: int) -> list[str]:
        """The answers that its round lacks, in the question's order."""
        return [a for a in self.pool[question].answers if a in self._missing[question]]

    def take(self, question: int, answer: str | None) -> Asked | None:
        """Count an answer, where it is due."""
        missing = self._missing[question]
        if answer is None or answer not in missing:
            return None
        asked = Asked(question, answer, self.rounds[question])
        missing.remove(answer)
        if not missing:
            self.rounds[question] += 1
            missing.update(self.pool[question].answers)
        return asked

    def stays(self, question: int, round_: int) -> bool:
        return round_ < self.rounds[question]


def draw_asked(rng: Random, balance: Balance, most: int) -> tuple[Scene, list[Asked]]:
    """A scene that is drawn for a due answer to a question of the kind that was asked least, with
    that question and others that can be asked of it, `most` in all: a kind after another."""
    kinds = balance.kinds
    if not kinds:
        return draw_scene(rng, Want()), []
    first = min(range(len(kinds)), key=lambda k: balance.asked[k])
    candidates = [rng.choice(kinds[first]) for _ in range(_CANDIDATES)]
    chosen = min(candidates, key=lambda q: (balance.rounds[q], len(balance.due(q))))
    question, answer = balance.pool[chosen], rng.choice(balance.due(chosen))
    for _ in range(_SCENES):
        scene = draw_scene(rng, question.want(rng, answer))
        if question.answer(scene) == answer:
            break
    asked: dict[int, Asked] = {}
    for k in range(first, first + most):
        kind = kinds[k % len(kinds)]
        for q in (rng.choice(kind) for _ in range(_TRIES)) if k > first else (chosen,):
            if q not in asked and (taken := balance.take(q, balance.pool[q].answer(scene))):
                asked[q] = taken
                balance.asked[k % len(kinds)] += 1
                break
    return scene, list(asked.values())


# --- the questions ------------------------------------------------------------------------------


def question_pool() -> list[Question]:
    """Every question that there is, in a fixed order."""
    return [*_counts(), *_exists(), *_compares(), *_attributes(), *_relations()]


def some_of(pool: Sequence[Question], rng: Random, expected: int) -> list[Question]:
    """As many of the pool as a file of so many questions can have a few rounds of, of each kind at
    least one."""
    out: list[Question] = []
    for kind in KINDS:
        of_kind = [q for q in pool if q.kind == kind]
        rng.shuffle(of_kind)
        room = expected // len(KINDS) // _ROUNDS
        for i, question in enumerate(of_kind):
            room -= len(question.answers)
            if i and room < 0:
                break
            out.append(question)
    return out


def _counts() -> list[Question]:
    def question(what: Filter) -> Question:
        def answer(scene: Scene) -> str | None:
            n = count(scene, what)
            return COUNTS[n] if n < len(COUNTS) else None

        return Question(
            f"how many {what.many} are there?",
            "count",
            COUNTS,
            answer,
            lambda _, due: Want((what,) * COUNTS.index(due), (what,)),
        )

    return [question(what) for what in countable()]


def countable() -> list[Filter]:
    """What is counted, in questions and statements: red shapes, stars, large stars, red stars."""
    return [
        *(Filter(colour=c) for c in COLOURS),
        *(Filter(shape=s) for s in SHAPES),
        *(Filter(size=z, shape=s) for z, s in product(SIZES, SHAPES)),
        *(Filter(colour=c, shape=s) for c, s in product(COLOURS, SHAPES)),
    ]


def _exists() -> list[Question]:
    def question(what: Filter) -> Question:
        return Question(
            f"is there {what.a}?",
            "exist",
            YES_NO,
            lambda scene: YES_NO[not count(scene, what)],
            lambda _, due: Want((what,) if due == "yes" else (), () if due == "yes" else (what,)),
        )

    return [
        *(question(Filter(size=z, shape=s)) for z, s in product(SIZES, SHAPES)),
        *(question(Filter(colour=c, shape=s)) for c, s in product(COLOURS, SHAPES)),
        *(question(Filter(*looks)) for looks in product(SIZES, COLOURS, SHAPES)),
    ]


def _compares() -> list[Question]:
    def question(more: Filter, than: Filter) -> Question:
        def want(rng: Random, due: str) -> Want:
            low = rng.randint(0, 2)
            high = rng.randint(low + 1, 3) if due == "yes" else rng.randint(low, 3)
            a, b = (high, low) if due == "yes" else (low, high)
            return Want((more,) * a + (than,) * b, (more, than))

        return Question(
            f"are there more {more.many} than {than.many}?",
            "compare",
            YES_NO,
            lambda scene: YES_NO[count(scene, more) <= count(scene, than)],
            want,
        )

    return [
        *(question(Filter(shape=a), Filter(shape=b)) for a, b in permutations(SHAPES, 2)),
        *(question(Filter(colour=a), Filter(colour=b)) for a, b in permutations(COLOURS, 2)),
    ]


def _attributes() -> list[Question]:
    values = {"colour": COLOURS, "shape": SHAPES, "size": SIZES}

    def question(what: Filter, part: str) -> Question:
        def answer(scene: Scene) -> str | None:
            found = only_one(scene, what)
            return None if found is None else getattr(found, part)

        name = what.one if what.shape else what.one.replace("shape", "one")
        return Question(
            f"what {part} is the {name}?",
            "attribute",
            values[part],
            answer,
            lambda _, due: Want((replace(what, **{part: due}),), (what,)),
        )

    return [
        *(question(Filter(z, None, s), "colour") for z, s in product((None, *SIZES), SHAPES)),
        *(question(Filter(z, c, None), "shape") for z, c in product((None, *SIZES), COLOURS)),
        *(question(Filter(None, c, s), "size") for c, s in product((None, *COLOURS), SHAPES)),
    ]


def _relations() -> list[Question]:
    def which(direction: str, reference: Filter) -> Question:
        def answer(scene: Scene) -> str | None:
            to = only_one(scene, reference)
            if to is None:
                return None
            away = [(distance(t, to, direction), t) for t in scene if t is not to]
            found = [(d, t) for d, t in away if d > 0]
            # What is hardly so far to that side is neither there nor not there.
            return found[0][1].shape if len(found) == 1 and found[0][0] >= MARGIN else None

        return Question(
            f"what shape is {direction} the {reference.one}?",
            "relation",
            SHAPES,
            answer,
            lambda _, due: Want((Filter(shape=due), reference), (reference,), direction, True),
        )

    def whether(a: Filter, direction: str, b: Filter) -> Question:
        def answer(scene: Scene) -> str | None:
            subject, to = only_one(scene, a), only_one(scene, b)
            if subject is None or to is None:
                return None
            away = distance(subject, to, direction)
            return YES_NO[away < 0] if abs(away) >= MARGIN else None

        def want(_: Random, due: str) -> Want:
            return Want((a, b), (a, b), direction if due == "yes" else OPPOSITE[direction])

        return Question(
            f"is the {a.one} {direction} the {b.one}?", "relation", YES_NO, answer, want
        )

    return [
        *(
            which(direction, Filter(colour=c, shape=s))
            for direction, c, s in product(DIRECTIONS, COLOURS, SHAPES)
        ),
        *(
            whether(Filter(shape=a), direction, Filter(shape=b))
            for (a, b), direction in product(permutations(SHAPES, 2), DIRECTIONS)
        ),
    ]


# --- captions -----------------------------------------------------------------------------------


def captions(rng: Random, scene: Scene) -> list[str]:
    """Two or three different captions: some of its things; how many, and how many of a colour; how
    two stand to each other."""
    some = rng.sample(scene, rng.randint(1, min(3, len(scene))))
    names = [Filter(t.size, t.colour, t.shape).a for t in some]
    first = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    colour = rng.choice(scene).colour
    of_colour = count(scene, Filter(colour=colour))
    second = f"{NUMBERS[len(scene)]} shapes, {NUMBERS[of_colour]} of them {colour}"
    # Cells are far enough apart that every two things stand clearly to each other somehow.
    subject, to = rng.sample(scene, 2)
    direction = rng.choice([d for d in DIRECTIONS if distance(subject, to, d) >= MARGIN])
    third = f"{_short(rng, subject)} {direction} {_short(rng, to)}"
    return rng.sample([first, second, third], rng.randint(2, 3))


def _short(rng: Random, thing: Thing) -> str:
    """A thing with one or two of what it is."""
    size, colour = rng.choice([(thing.size, None), (None, thing.colour), (None, None)])
    return Filter(size, colour, thing.shape).a

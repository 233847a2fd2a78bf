"""Owners on a simulated store: whatever they do to each other, and the store to them, nothing that
was committed is lost, nothing is torn, and nobody commits but the owner.

`tests/simulated_store.py` checks that at every operation; here are the programs that owners run and
the schedules: enumerated for two, drawn from a seed for three.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import random
from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
import pytest

from shards.errors import DataError
from shards.order.sampler import SamplerState
from tests.simulated_store import RUN, Crash, Events, Scheduler, Store, Wrong, simulated
from trainer.checkpoint import inspect
from trainer.checkpoint.errors import CheckpointError, OwnedError, StaleAttemptError
from trainer.checkpoint.evidence import check_never_committed
from trainer.checkpoint.format import (
    KINDS,
    CheckpointManifest,
    ObjectEntry,
    RunDescription,
    SegmentEntry,
    Span,
)
from trainer.checkpoint.generations import Generation, find_generation, generations, load_weights
from trainer.checkpoint.journal import Journal, StepLine, read_segments
from trainer.checkpoint.owner import Claimant, Owner, check_free, claim
from trainer.checkpoint.saver import Snapshot, write_object

SHAPES = {"a": [2], "b": [1]}
PARTS = ((Span("a", 0, 1),), (Span("a", 1, 1), Span("b", 0, 1)))
"""Of two ranks."""
KINDS_OF_FAULT = ("crash-before", "crash-after", "lost", "unknown", "away", "409")
RUN_DESCRIPTION = RunDescription(2, 1, SHAPES, {}, {}, {}, "", "")
START = SamplerState(0, (0,), (0,), (0,))


class World:
    """One schedule: a store, and what its owners do."""

    def __init__(
        self, choose: Callable[[list[str]], str], events: Events, keep: int, seed: int = 0
    ) -> None:
        self.scheduler = Scheduler(choose)
        self.store = Store(self.scheduler, events, random.Random(seed))
        self.keep = keep
        self.values = count(1)
        self.of: dict[str, float] = {}
        """All values of an object, by its name."""

    # --- what an owner does -----------------------------------------------------------------------

    def job(self, name: str, saves: int, take_over: bool) -> None:
        """Claim, go to the newest generation, train and save; as often as it may."""
        claimant = Claimant(name, take_over)
        try:
            if saves > 1:
                claimant = check_free(RUN, claimant)
            owner = claim(RUN, claimant)
        except (OwnedError, DataError):
            return
        try:
            self.train(owner, saves)
        except StaleAttemptError:
            assert self.superseded(owner), "the owner takes itself for stale"
        except (CheckpointError, DataError):
            # Of reading: the job ends with an error.
            assert self.superseded(owner) or self.unwell
        owner.close()

    def train(self, owner: Owner, saves: int) -> None:
        generation = self.restored(owner)
        if generation is None and self.superseded(owner):
            return
        step = generation.step if generation else 0
        journal = Journal((), {}, generation.manifest.journal if generation else (), START)
        under_way: dict[int, list[ObjectEntry]] = {}
        for last in range(step + 1, step + saves + 1):
            journal.add(StepLine(last, 1, 2, 0), START)
            # The next save begins while this one is committed.
            for at in (last, last + 1):
                if at not in under_way:
                    under_way[at] = self.upload(owner, at)
            with contextlib.suppress(DataError):  # a failed save: training goes on
                self.commit(owner, journal, last, under_way.pop(last))
            if owner.lost():
                assert self.superseded(owner)
                return

    def upload(self, owner: Owner, step: int) -> list[ObjectEntry]:
        """The objects of a save, in use from now on; empty where that fails."""
        value = float(next(self.values))
        live = self.store.live.setdefault(owner.attempt, set())
        entries: list[ObjectEntry] = []
        for rank, spans in enumerate(PARTS):
            arrays = {k: np.full(len(spans), value, np.float32) for k in KINDS}
            try:
                entry = write_object(RUN, step, owner.attempt, rank, Snapshot(spans, arrays))
            except DataError:
                live -= {e.name for e in entries}
                return []
            self.of[entry.name] = value
            live.add(entry.name)
            entries.append(entry)
        return entries

    def commit(self, owner: Owner, journal: Journal, step: int, parts: list[ObjectEntry]) -> None:
        if not parts:
            return
        live = self.store.live[owner.attempt]
        try:
            segments = journal.write(RUN, owner.attempt, step)
            manifest = CheckpointManifest(
                **vars(RUN_DESCRIPTION),
                sampler=START,
                step=step,
                attempt=owner.attempt,
                objects=tuple(parts),
                journal=segments,
            )
            live |= {s.name for s in segments}
            generation = owner.commit(manifest, self.keep)
        finally:
            live -= {n for n in live if n.endswith(".jsonl")} | {p.name for p in parts}
        journal.committed(segments)
        assert generation in self.store.committed, "a stale owner's commit is taken for one"
        assert self.superseded(owner) or generation.name == self.store.committed[-1].name

    def remove(self, name: str, of: slice) -> None:
        """`lxscale checkpoint rm --force` of some of the generations, which are newest first."""
        try:
            found = [g for g in generations(RUN) if isinstance(g, Generation)]
            inspect.remove(RUN, [g.step for g in found[of]], force=True)
        except (OwnedError, CheckpointError, DataError):
            return  # it may be about all there is, the newest may be damaged
        self.removals += 1

    removals = 0
    """That were carried out."""

    def superseded(self, owner: Owner) -> bool:
        return self.store.attempt > owner.attempt

    def restored(self, owner: Owner) -> Generation | None:
        """Where an owner goes on: at the newest of all that was committed before its claim."""
        (expected,) = [n for n, c in self.store.claims if c.attempt == owner.attempt]
        found = None
        for candidate in owner.found:
            if isinstance(candidate, Generation):
                with contextlib.suppress(CheckpointError):  # then to the one before
                    self.check_whole(candidate)
                    found = candidate
                    break
        if not owner.found:
            check_never_committed(RUN)
        # While it was reading, its successor may have pruned.
        if not self.superseded(owner):
            assert (found.name if found else "") == expected, "a committed generation is lost"
        return found

    unwell = False
    """The store refuses to answer now and then."""

    def check_whole(self, generation: Generation) -> None:
        values = {float(v) for w in load_weights(generation).values() for v in w.reshape(-1)}
        assert values == {self.of[o.name] for o in generation.manifest.objects}
        assert len(values) == 1, f"{generation.name} is mixed"

    # --- the end ----------------------------------------------------------------------------------

    def check_end(self) -> None:
        """The run goes on, with a save that fails and is tried again; nothing is left over."""
        self.store.dead.clear()
        if self.store.committed:
            newest = find_generation(RUN)
            assert newest.name == self.store.committed[-1].name
            if newest.name not in self.store.damaged:
                self.check_whole(newest)
        owner = claim(RUN, Claimant("heir", take_over=True))
        generation = self.restored(owner)
        step = (generation.step if generation else 0) + 1
        journal = Journal((), {}, generation.manifest.journal if generation else (), START)
        journal.add(StepLine(step, 1, 2, 0), START)
        self.store.live.clear()
        self.upload(owner, step)
        self.store.live.clear()
        ahead = self.upload(owner, step + 1)
        self.commit(owner, journal, step, self.upload(owner, step))
        found = list(generations(RUN))
        kept = [g for g in found if isinstance(g, Generation)]
        assert found == kept and len(kept) == min(self.keep, len(self.store.committed))
        assert kept == self.store.committed[: -self.keep - 1 : -1], "others than the newest"
        for kind, names in (
            (ObjectEntry, {o.name for g in kept for o in g.manifest.objects}),
            (SegmentEntry, {s.name for g in kept for s in g.manifest.journal}),
        ):
            place = f"{RUN}/checkpoints/{kind.folder}"
            names |= {a.name for a in ahead if a.folder == kind.folder}
            lost = {g.manifest.objects[0].name for g in kept if g.name in self.store.damaged}
            assert set(self.store.list_names(place)) == names - lost, "left over, or missing"
        lines = [line for _, ls in read_segments(RUN, kept[0].manifest.journal) for line in ls]
        assert [line.step for line in lines] == list(range(1, step + 1)), "steps lost or repeated"
        owner.close()

    def check_end_of_removals(self) -> None:
        """The run goes on from its newest generation, and what is left over has gone then."""
        self.store.dead.clear()
        self.store.live.clear()
        owner = claim(RUN, Claimant("heir", take_over=True))
        generation = self.restored(owner)
        step = (generation.step if generation else 0) + 1
        journal = Journal((), {}, generation.manifest.journal if generation else (), START)
        journal.add(StepLine(step, 1, 2, 0), START)
        self.commit(owner, journal, step, self.upload(owner, step))
        kept = [g for g in owner.found if isinstance(g, Generation)]
        assert kept[0] == self.store.committed[-1] and next(generations(RUN)) == kept[0]
        for generation in kept:
            # What a stale owner has written late is old, and nothing goes back to it.
            if generation.name not in self.store.late:
                self.check_whole(generation)
        for kind, used in (
            (ObjectEntry, {o.name for g in kept for o in g.manifest.objects}),
            (SegmentEntry, {s.name for g in kept for s in g.manifest.journal}),
        ):
            assert set(self.store.list_names(f"{RUN}/checkpoints/{kind.folder}")) <= used
        lines = [line for _, ls in read_segments(RUN, kept[0].manifest.journal) for line in ls]
        assert [line.step for line in lines] == list(range(1, step + 1)), "steps lost or repeated"
        owner.close()

    def run_beside_removal(self, jobs: dict[str, tuple[int, bool]], of: slice) -> None:
        """As `run`, with one more program, R, that removes generations."""
        programs: dict[str, Callable[[], None]] = {
            n: functools.partial(self.job, n, *j) for n, j in jobs.items()
        }
        self.scheduler.run(programs | {"R": lambda: self.remove("R", of)})
        self.check_end_of_removals()

    def run(self, jobs: dict[str, tuple[int, bool]]) -> None:
        """jobs: name -> (saves, take over)."""

        def program(name: str, saves: int, take_over: bool) -> Callable[[], None]:
            return lambda: self.job(name, saves, take_over)

        self.scheduler.run({n: program(n, *j) for n, j in jobs.items()})
        self.check_end()


_world: list[World] = []


@pytest.fixture(scope="module", autouse=True)
def simulation() -> Iterator[None]:
    log = logging.getLogger("lxscale")
    level = log.level
    log.setLevel(logging.CRITICAL)
    with pytest.MonkeyPatch.context() as patch, simulated(patch, lambda: _world[-1].store):
        patch.setattr(inspect, "check_create_only", lambda url: None)
        yield
    log.setLevel(level)


def check(
    world: World, jobs: dict[str, tuple[int, bool]], schedule: str, removal: slice | None = None
) -> int:
    """Run one schedule; the operations that it took."""
    _world[:] = [world]
    try:
        world.run_beside_removal(jobs, removal) if removal else world.run(jobs)
    except (Exception, Crash, Wrong) as error:
        shown = "\n".join(world.store.log)
        pytest.fail(f"{schedule}: {type(error).__name__}: {error}\n{shown}")
    return len(world.store.log)


# --- enumerated -----------------------------------------------------------------------------------


def in_turns(turns: list[tuple[str, int]], rest: str) -> Callable[[list[str]], str]:
    """(name, operations) in turn, then `rest` to its end, then the others."""
    left = [list(t) for t in turns]

    def choose(names: list[str]) -> str:
        while left:
            name, n = left[0]
            if name in names and n > 0:
                left[0][1] = n - 1
                return str(name)
            left.pop(0)
        return rest if rest in names else names[0]

    return choose


def nothing(_name: str, _number: int) -> str:
    return ""


def operations(saves: int, keep: int) -> int:
    """That a job by itself needs."""
    world = World(lambda names: names[0], nothing, keep)
    check(world, {"A": (saves, False)}, "alone")
    return world.store.counts["A"] + 1


@pytest.mark.parametrize("keep", [1, 2])
def test_a_job_that_dies_at_any_operation_is_gone_on_with(keep: int) -> None:
    for at in range(operations(3, keep)):
        for event in KINDS_OF_FAULT:

            def events(name: str, number: int, at: int = at, event: str = event) -> str:
                return event if (name, number) == ("A", at) else ""

            world = World(in_turns([], "A"), events, keep)
            world.unwell = True
            check(world, {"A": (3, False), "B": (2, False)}, f"{event} at {at}")


@pytest.mark.parametrize(
    "keep, part", [(1, 9), *(pytest.param(k, 1, marks=pytest.mark.faults) for k in (1, 2))]
)
def test_two_that_sleep_at_any_operation(keep: int, part: int) -> None:
    """A sleeps before an operation while B does some of its own; A goes on to its end, B after.

    part: of all pairs of operations one in so many.
    """
    total = operations(2, keep)
    for a in range(1, total + 1):
        for b in range(1 + a % part, total + 1, part):
            turns = [("A", a), ("B", b)]
            world = World(in_turns(turns, "A"), nothing, keep)
            check(world, {"A": (2, False), "B": (2, True)}, f"{turns}, keep {keep}")


@pytest.mark.parametrize("part", [18, pytest.param(1, marks=pytest.mark.faults)])
def test_one_that_sleeps_while_another_goes_back_further(part: int) -> None:
    """The newest generation is damaged when B claims: its steps are none above those of A, which
    may be about to prune."""
    total = operations(3, 2)
    for a in range(1, total + 1):
        for b in range(part, total + part, part):
            turns = [("A", a), ("B", b)]
            choose, asked = in_turns(turns, "A"), 0

            def choose_and_damage(
                names: list[str], a: int = a, choose: Callable[[list[str]], str] = choose
            ) -> str:
                nonlocal asked
                asked += 1
                store = _world[-1].store
                if asked == a + 1 and len(store.claims) == 1:
                    store.damage()
                return choose(names)

            world = World(choose_and_damage, nothing, 2)
            check(world, {"A": (3, False), "B": (2, True)}, f"damage, {turns}")


def test_a_commit_without_an_answer_whose_name_is_free_again() -> None:
    """It was carried out; B goes on from it and removes it; then A wakes and saves again."""
    total = operations(3, 1)
    for unknown in range(total):

        def events(name: str, number: int, unknown: int = unknown) -> str:
            return "unknown" if (name, number) == ("A", unknown) else ""

        for a in range(unknown + 1, min(unknown + 8, total)):
            world = World(in_turns([("A", a), ("B", 999)], "A"), events, 1)
            world.unwell = True
            check(world, {"A": (3, False), "B": (2, True)}, f"unknown at {unknown}, asleep at {a}")


def test_a_late_claim_between_a_listing_and_a_read() -> None:
    """B lists before C's first commit, A after it; C removes that again; B's claim takes the name
    that A is about to read."""
    world = World(lambda names: names[0], nothing, 1)
    check(world, {"C": (2, False)}, "alone")
    commit = next(
        i for i, line in enumerate(world.store.log) if "create /checkpoints/a000001" in line
    )
    for b in range(1, 14):
        for a in range(1, 8):
            for late in (1, 2, 3):
                turns = [("C", commit), ("B", b), ("C", 2), ("A", a), ("C", 999), ("B", late)]
                world = World(in_turns(turns, "A"), nothing, 1)
                jobs = {"A": (1, True), "B": (1, True), "C": (2, False)}
                check(world, jobs, f"{turns}")


# --- removals -------------------------------------------------------------------------------------

NEWEST, OLDER, ALL_BUT_ONE = slice(0, 1), slice(1, None), slice(0, -1)


def removing(of: slice, a: int, b: int, events: Events, keep: int = 3) -> World:
    """A makes `a` of its operations, R then `b`; A goes on to its end, R after it."""
    world = World(in_turns([("A", a), ("R", b)], "A"), events, keep)
    world.unwell = True
    check(world, {"A": (3, False)}, f"remove {of}: A {a}, R {b}", of)
    return world


@pytest.mark.parametrize(
    "of, kinds",
    [
        (ALL_BUT_ONE, ("crash-before", "unknown")),
        *(
            pytest.param(of, KINDS_OF_FAULT, marks=pytest.mark.faults)
            for of in (NEWEST, OLDER, ALL_BUT_ONE)
        ),
    ],
)
def test_a_removal_that_dies_at_any_operation(of: slice, kinds: tuple[str, ...]) -> None:
    """All generations that there are stay whole, and the run goes on."""
    total = removing(of, 999, 999, nothing).store.counts["R"] + 1
    assert _world[-1].removals
    for at in range(total):
        for event in kinds:

            def events(name: str, number: int, at: int = at, event: str = event) -> str:
                return event if (name, number) == ("R", at) else ""

            removing(of, 999, 999, events)


@pytest.mark.parametrize("part", [19, pytest.param(3, marks=pytest.mark.faults)])
@pytest.mark.parametrize("of", [NEWEST, ALL_BUT_ONE], ids=["newest", "all but one"])
def test_a_removal_beside_an_owner_that_sleeps(of: slice, part: int) -> None:
    """A is taken for dead before any of its operations, with an answer lost before that or not; it
    goes on while R is at any of its own. It commits nothing that anybody goes on from."""
    removals = 0
    total = operations(3, 3)
    for a in range(part, total + 1, part):
        for b in (*range(1 + a % part, 60, part), 999):
            for lost in range(max(a - 6, 0), a):

                def events(name: str, number: int, lost: int = lost) -> str:
                    return "unknown" if (name, number) == ("A", lost) else ""

                removals += removing(of, a, b, events).removals
    assert removals


# --- drawn ----------------------------------------------------------------------------------------


def draw(seed: int) -> int:
    """Two or three jobs at a time, switched at random, with faults of store and processes."""
    rng = random.Random(seed)
    haste = rng.choice((0.01, 0.03, 0.1, 0.4))
    faults = rng.choice((0.0, 0.0, 0.01, 0.05))
    last = ""

    def choose(names: list[str]) -> str:
        nonlocal last
        if last not in names or rng.random() < haste:
            last = rng.choice(names)
        return last

    def events(_name: str, _number: int) -> str:
        return rng.choice(KINDS_OF_FAULT) if rng.random() < faults else ""

    jobs = {
        name: (rng.choice((1, 1, 2, 3)), rng.random() < 0.7)
        for name in "ABC"[: rng.choice((2, 2, 3))]
    }
    world = World(choose, events, rng.choice((1, 1, 2)), seed)
    world.unwell = faults > 0
    return check(world, jobs, f"seed {seed}")


def test_drawn_schedules() -> None:
    for seed in range(2_000):
        draw(seed)
    # The name was free again, and the store away as the claim behind it was asked for.
    draw(176317129968)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_drawn_schedules() -> None:
    begin = random.SystemRandom().randrange(1 << 40)
    for seed in range(begin, begin + 100_000):
        draw(seed)

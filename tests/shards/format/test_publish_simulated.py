"""Builders, cleaners and readers at one place of a simulated store, in every order of two, and with
a crash or a fault at every operation: the manifest never names what is not there, of two builders
one wins, and what nobody refers to can be removed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shards.errors import DataError, NotFoundError
from shards.format.build import BuildSettings, build
from shards.format.clean import _named, clean, leftovers
from shards.format.manifest import MANIFEST, Manifest, load_manifest, parse_manifest
from shards.format.publish import commit_point, publish
from shards.progress import no_progress
from shards.store import create, objects, retry
from shards.store.objects import Listed
from tests.conftest import files_of, small_records
from tests.simulated_store import Crash, Scheduler, Wrong

PLACE = "sim://bucket/set"
WHERE = f"{PLACE}/{MANIFEST}"
Event = str
"""crash-before, crash-after; lost: done, but answered with an error that is tried again; unknown:
done, and given up; away: not done, and given up."""
EVENTS = ("crash-before", "crash-after", "lost", "unknown", "away")


class _RefusedError(OSError):
    def __init__(self) -> None:
        super().__init__(412)
        self.response = {"ResponseMetadata": {"HTTPStatusCode": 412}, "Error": {"Code": ""}}


class Bucket:
    """The store: what it holds, and what must hold of it."""

    def __init__(self, scheduler: Scheduler, events: Callable[[str, int], Event]) -> None:
        self.data: dict[str, bytes] = {}
        self.scheduler, self.events = scheduler, events
        self.counts: dict[str, int] = {}
        self.dead: set[str] = set()
        self.log: list[str] = []

    def at(self, what: str, url: str, action: Callable[[], Any]) -> Any:
        me = self.scheduler.current
        if me in self.dead:
            raise Crash
        self.scheduler.switch()
        number = self.counts[me] = self.counts.get(me, -1) + 1
        event = self.events(me, number) if self.scheduler.running else ""
        self.log.append(f"{me}{number} {what} {url.removeprefix(PLACE)} {event}")
        if event == "away":
            raise DataError("away")
        if event.startswith("crash"):
            self.dead.add(me)
        if event == "crash-before":
            raise Crash
        result = action()
        self._check()
        if event == "crash-after":
            raise Crash
        if event == "unknown":
            raise DataError("no answer")
        if event == "lost" and what in ("create", "replace"):
            raise OSError("no answer")
        return result

    def _check(self) -> None:
        """What the manifest names is there, as it was made."""
        if WHERE not in self.data:
            return
        try:
            manifest = parse_manifest(self.data[WHERE], PLACE)
        except NotFoundError:  # it says that there is none
            return
        for shard in manifest.shards:
            for file in (
                shard.tar_at(manifest.place(PLACE)),
                shard.table_at(manifest.place(PLACE)),
                manifest.vocab.at(manifest.place(PLACE)),
                manifest.answers.at(manifest.place(PLACE)),
            ):
                found = self.data.get(file.url)
                if found is None or hashlib.sha256(found).hexdigest() != file.sha256:
                    raise Wrong(f"{file.url} is torn\n" + "\n".join(self.log))

    # --- what the code calls ----------------------------------------------------------------------

    def read_bytes(self, url: str, *_: Any) -> bytes:
        def action() -> bytes:
            if url not in self.data:
                raise NotFoundError(f"{url} does not exist")
            return self.data[url]

        found: bytes = self.at("read", url, action)
        return found

    def read_tagged(self, url: str, *_: Any) -> tuple[bytes, str]:
        data = self.read_bytes(url)
        return data, hashlib.md5(data).hexdigest()

    def upload(self, path: Path, url: str, *_: Any) -> None:
        data = path.read_bytes()
        self.at("upload", url, lambda: self.data.__setitem__(url, data))

    def delete(self, url: str, *_: Any) -> None:
        self.at("delete", url, lambda: self.data.pop(url, None))

    def list_tree(self, url: str, *_: Any) -> list[Listed]:
        def action() -> list[Listed]:
            below = {u.removeprefix(f"{url}/"): d for u, d in self.data.items()}
            return [Listed(name, len(data), 0.0) for name, data in sorted(below.items())]

        found: list[Listed] = self.at("list", url, action)
        return found

    def put_new(self, url: str, data: bytes, _: float) -> None:
        def action() -> None:
            if url in self.data:
                raise _RefusedError
            self.data[url] = data

        self.at("create", url, action)

    def put_in_place(self, url: str, data: bytes, tag: str, _: float) -> None:
        def action() -> None:
            if url not in self.data or hashlib.md5(self.data[url]).hexdigest() != tag:
                raise _RefusedError
            self.data[url] = data

        self.at("replace", url, action)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Manifest]]:
    """Data sets by the name of who builds them: their staged files, and manifests."""
    folder = tmp_path_factory.mktemp("made")
    out = {}
    for i, name in enumerate("oab"):
        build(small_records(2 + i, seed=i), folder / name, BuildSettings(name, "simulated"))
        manifest = load_manifest(str(folder / name))
        out[name] = files_of(folder / name), dataclasses.replace(manifest, folder="")
    return out


class World:
    """A store, with an old data set or none, and what programs at it do."""

    current: World

    def __init__(
        self,
        made: dict[str, tuple[Path, Manifest]],
        old: bool,
        choose: Callable[[list[str]], str],
        events: Callable[[str, int], Event] = lambda *_: "",
    ) -> None:
        World.current = self
        self.made = made
        self.scheduler = Scheduler(choose)
        self.bucket = Bucket(self.scheduler, events)
        self.ended: dict[str, str] = {}
        if old:
            self.build("o", overwrite=False)
            assert self.ended == {"o": "won"}
            self.bucket.counts.clear()

    def build(self, name: str, overwrite: bool = True) -> None:
        folder, manifest = self.made[name]
        try:
            before = commit_point(PLACE, overwrite)
            names = sorted(p.name for p in folder.iterdir())
            found = publish(folder, PLACE, manifest, names, before, no_progress)
            assert found == manifest
            self.ended[name] = "won"
        except DataError as error:
            self.ended[name] = f"lost: {error}"

    def clean(self, name: str) -> None:
        try:
            clean(PLACE, leftovers(PLACE))
            self.ended[name] = "cleaned"
        except DataError as error:
            self.ended[name] = f"stopped: {error}"

    def read(self, name: str) -> None:
        """As a process that opens the data set and reads it, however long that takes."""
        try:
            manifest = parse_manifest(self.bucket.read_bytes(WHERE), PLACE)
        except NotFoundError:
            return
        for shard in manifest.shards:
            file = shard.tar_at(manifest.place(PLACE))
            assert hashlib.sha256(self.bucket.read_bytes(file.url)).hexdigest() == file.sha256
        self.ended[name] = "read"

    def run(self, **programs: Callable[[], None]) -> World:
        self.scheduler.run(programs)
        return self

    def at_end(self) -> Manifest | None:
        """What is there; nothing else is left once it is cleaned."""
        self.scheduler.current = "end"
        self.bucket.events = lambda *_: ""
        self.clean("end")
        assert self.ended["end"] == "cleaned"
        names = {url.removeprefix(f"{PLACE}/") for url in self.bucket.data}
        try:
            manifest = parse_manifest(self.bucket.data[WHERE], PLACE)
        except (KeyError, NotFoundError):
            assert names <= {MANIFEST}
            return None
        assert names == _named(manifest) | {MANIFEST}
        return manifest


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module, name, method in (
        *((objects, n, n) for n in ("read_bytes", "read_tagged", "upload", "delete", "list_tree")),
        (create, "_put_new", "put_new"),
        (create, "_put_in_place", "put_in_place"),
    ):

        def call(*a: Any, _method: str, **k: Any) -> Any:
            return getattr(World.current.bucket, _method)(*a, **k)

        monkeypatch.setattr(module, name, functools.partial(call, _method=method))
    monkeypatch.setattr("shards.format.publish.check_conditions", lambda _: None)
    monkeypatch.setattr(
        retry, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: None)
    )
    yield


def two_switches(first: int, second: int) -> Callable[[list[str]], str]:
    """a goes to its operation `first`, then b to its `second`, then a to its end, and b to its."""
    told = iter([*"a" * first, *"b" * second, *"a" * 999])

    def choose(ready: list[str]) -> str:
        name = next(told)
        return name if name in ready else ready[0]

    return choose


def only(at: int, event: Event) -> Callable[[str, int], Event]:
    """It befalls operation `at` of a."""
    return lambda who, number: event if (who, number) == ("a", at) else ""


def drawn(seed: int) -> Callable[[list[str]], str]:
    rng = random.Random(seed)
    return lambda ready: rng.choice(ready)


@pytest.mark.parametrize("old", [False, True])
def test_two_builders_in_any_order(made: dict[str, tuple[Path, Manifest]], old: bool) -> None:
    schedules = itertools.chain(
        (two_switches(i, j) for i in range(12) for j in range(12)),
        (drawn(seed) for seed in range(400)),
    )
    lost = 0
    for choose in schedules:
        world = World(made, old, choose)
        world.run(a=lambda w=world: w.build("a"), b=lambda w=world: w.build("b"))
        won = [n for n in "ab" if world.ended[n] == "won"]
        assert won, world.bucket.log
        for name in {"a", "b"} - set(won):
            assert "another build has finished" in world.ended[name]
            # It leaves nothing.
            lost += 1
        folders = {url.split("/")[4] for url in world.bucket.data if "/build-" in url}
        assert len(folders) == len(won) + old
        last = world.at_end()
        assert last in [made[n][1] for n in won]
    assert lost > 50


def test_readers_of_the_old_one_go_on(made: dict[str, tuple[Path, Manifest]]) -> None:
    for choose in (
        *(two_switches(i, j) for i in range(12) for j in range(4)),
        *(drawn(seed) for seed in range(100)),
    ):
        world = World(made, True, choose)
        world.run(a=lambda w=world: w.build("a"), b=lambda w=world: w.read("b"))
        assert world.ended["a"] == "won" and world.ended["b"] == "read", world.bucket.log


@pytest.mark.parametrize("old", [False, True])
def test_a_builder_and_a_cleaner_in_any_order(
    made: dict[str, tuple[Path, Manifest]], old: bool
) -> None:
    """The cleaner finds what a dead build has left, and the living one's files."""
    outcomes = set()
    for choose in (
        *(two_switches(i, j) for i in range(12) for j in range(14)),
        *(drawn(seed) for seed in range(300)),
    ):
        world = World(made, old, choose)
        world.bucket.data[f"{PLACE}/build-badbadb0/shard-000000.tar"] = b"of a dead build"
        world.run(a=lambda w=world: w.build("a"), b=lambda w=world: w.clean("b"))
        a, b = world.ended["a"].split(":")[0], world.ended["b"].split(":")[0]
        outcomes.add((a, b))
        assert (a, b) != ("lost", "stopped"), world.bucket.log
        last = world.at_end()
        assert last == (made["a"][1] if a == "won" else made["o"][1] if old else None)
    assert outcomes == {("won", "cleaned"), ("lost", "cleaned"), ("won", "stopped")}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("old", [False, True])
def test_a_crash_or_a_fault_at_every_operation(
    made: dict[str, tuple[Path, Manifest]], old: bool, event: Event
) -> None:
    for at in range(12):
        world = World(made, old, lambda ready: ready[0], only(at, event))
        world.run(a=lambda w=world: w.build("a"))
        # Another build of the same kind then succeeds, whatever is there.
        world.scheduler.current = "b"
        world.bucket.events = lambda *_: ""
        world.build("b")
        assert world.ended["b"] == "won", world.bucket.log
        assert world.at_end() == made["b"][1]


@pytest.mark.parametrize("event", EVENTS)
def test_a_crash_or_a_fault_of_a_cleaner(
    made: dict[str, tuple[Path, Manifest]], event: Event
) -> None:
    for old, at in itertools.product((False, True), range(6)):
        world = World(made, old, lambda ready: ready[0], only(at, event))
        for name in ("shard-000000.tar", "vocab.txt"):
            world.bucket.data[f"{PLACE}/build-badbadb0/{name}"] = b"of a dead build"
        world.run(a=lambda w=world: w.clean("a"))
        assert world.at_end() == (made["o"][1] if old else None)

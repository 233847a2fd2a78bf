"""Machines with addresses of their own, shards and checkpoints on a real gateway, and a run that is
watched from a machine outside of its cluster: links are cut, the head is lost.

Run by `make test-cluster`.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster.namespaces import ENVIRONMENT, HUB, HUB_IP, Network, why_no_namespaces
from tests.conftest import note_cost, subprocess_environment
from tests.object_store import ObjectStore, radosgw, why_no_radosgw
from tests.ranks import config_tree

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3000)]

# Enough for all that happens on a quick machine; a slow one takes ten minutes and more.
STEPS = 4000
_DASHBOARD = 8265
_BUILD = """
import sys
from shards.format.build import BuildSettings, build
from tests.conftest import small_records
build(small_records(40), sys.argv[1], BuildSettings("multi", "test", images_per_shard=10))
"""


class Place:
    """Three machines of a cluster, the first of which has Ray's head; a store; and one machine
    more, outside of the cluster."""

    def __init__(self, network: Network, store: ObjectStore, folder: Path) -> None:
        self.network, self.store, self.folder = network, store, folder
        self.head = 0
        self.nodes = [network.add(), network.add()]
        self.outside = network.machine()
        self.jobs = f"http://{network.address_of(0)}:{_DASHBOARD}"

    def environment(self) -> dict[str, str]:
        return subprocess_environment(**ENVIRONMENT, **self.store.environment)

    def begin(self, *command: str) -> subprocess.Popen[str]:
        """A command on the machine outside."""
        return subprocess.Popen(
            [*self.network.on(self.outside), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment(),
        )

    def lxscale(self, *arguments: str, status: int = 0) -> str:
        command = self.begin(sys.executable, "-m", "cluster.cli", *arguments)
        output, _ = command.communicate(timeout=1200)
        assert command.returncode == status, output
        return output

    def at_step(self, run: str) -> int:
        """Of the newest generation; 0 where there is none."""
        command = self.begin(sys.executable, "-m", "cluster.cli", "status", run, "--json")
        output, _ = command.communicate(timeout=60)
        found = re.search(r'"step": (\d+)', output)
        return int(found[1]) if command.returncode == 0 and found else 0


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    for reason in (why_no_namespaces(), why_no_radosgw()):
        if reason:
            pytest.skip(reason)
    # As after `. .venv/bin/activate`: jobs run the `python` of the head's environment.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for key, value in {**ENVIRONMENT, "PATH": path}.items():
        monkeypatch.setenv(key, value)
    dashboard = ("--include-dashboard=true", "--dashboard-host=10.77.0.1", "--num-cpus=0")
    with contextlib.ExitStack() as stack:
        # The store first, whose environment the machines have.
        network = stack.enter_context(contextlib.closing(Network(tmp_path)))
        store = stack.enter_context(radosgw(tmp_path, network.on(HUB), HUB_IP))
        for key, value in store.environment.items():
            monkeypatch.setenv(key, value)
        network.leave(0)
        network.head = dashboard
        network.start_head()
        yield Place(network, store, tmp_path)


class Lines:
    """What a command says, as it comes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.lines = process, list[str]()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def until(true: Callable[[], bool], what: str, said: Callable[[], str], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what}: {said()}"
        time.sleep(1)


def test_a_watched_run_survives_cut_links_and_the_loss_of_its_head(place: Place) -> None:
    """It goes on with the machine that is left, takes the other one again, and is brought back
    from its storage alone; its end is bitwise that of a run without any of this."""
    network, bucket = place.network, place.store.bucket
    made = place.begin(sys.executable, "-c", _BUILD, f"{bucket}/set")
    assert made.communicate(timeout=120) and made.returncode == 0
    tree = config_tree(
        Path("set"),
        Path("runs"),
        "multi",
        run={"storage": f"{bucket}/runs"},
        data={"train": f"{bucket}/set", "cache": str(place.folder / "cache")},
        train={
            "steps": STEPS,
            "log_every": 1,
            "global_batch": 24,
            "accumulation": 1,
            "strict": 2,
            "zero_stage": 1,
        },
        checkpoint={"every": 50, "keep": 2},
        cluster={"workers": "1..2", "grow_after_s": 3, "start_timeout_s": 60},
    )
    path = place.folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    run = f"{bucket}/runs/multi"
    address = ("--ray-address", place.jobs)

    place.lxscale("submit", str(path), *address)
    watch = Lines(place.begin(sys.executable, "-u", "-m", "cluster.cli", "watch", run, *address))
    follow = Lines(
        place.begin(sys.executable, "-u", "-m", "cluster.cli", "logs", "-f", run, *address)
    )

    def workers() -> list[int]:
        return [int(n) for n in re.findall(r", attempt \d+ \| (\d+) workers", follow.text)]

    def said() -> str:
        return f"{watch.text}\n---\n{follow.text[-4000:]}"

    until(lambda: workers()[-1:] == [2] and place.at_step(run) >= 50, "begin", said, 180)

    # A link is cut: the run goes on with one worker, and with two once the link is mended.
    moment = time.time()
    network.cut(place.nodes[1])
    until(lambda: workers()[-1:] == [1], "a cut link", said, 120)
    note_cost("a cut link of two machines, to the next attempt", time.time() - moment)
    network.mend(place.nodes[1])
    moment = time.time()

    def mended() -> bool:
        network.keep(place.nodes[1])  # Ray ends a node that it has given up
        return workers()[-1:] == [2]

    until(mended, "the mended link", said, 180)
    note_cost("the mended link, to the attempt on both", time.time() - moment)

    # All of the head's machine is gone; another Ray begins there, with no memory of the job.
    before = place.at_step(run)
    moment = time.time()
    network.leave(0)
    for number in place.nodes:
        network.leave(number)
    network.start_head()
    for number in place.nodes:
        network.join(number)
    until(lambda: "submitted lxscale-" in watch.text, "a new job", said, 180)
    until(lambda: place.at_step(run) > before, "a step after the head was lost", said, 180)
    note_cost("the head lost, to the next checkpoint", time.time() - moment)
    until(lambda: watch.process.poll() is not None, "done", said, 1200)
    assert watch.process.returncode == 0, said()
    assert f"done: step {STEPS}" in watch.text, said()

    assert "proved" in place.lxscale("shards", "audit", run, "--cache", str(place.folder / "cache"))
    table = place.lxscale("runs", f"{bucket}/runs")
    assert re.search(rf"multi.*\b{STEPS}\b", table), table

    alone = place.folder / "alone"
    place.lxscale("train", str(path), f"run.storage={alone}", "cluster.workers=1")
    compare = (
        "import sys; from tests.trainer.test_resume import assert_bitwise; "
        "assert_bitwise(sys.argv[1], sys.argv[2])"
    )
    same = place.begin(sys.executable, "-c", compare, str(alone / "multi"), run)
    output, _ = same.communicate(timeout=120)
    assert same.returncode == 0, output

"""What the fast tier costs a step, and what a crash costs with it and without.

    .venv/bin/python benchmarks/fast_tier.py [--steps 60] [--hidden 256]

Trains a model on two ranks over gloo, which are two nodes by their names, on made-up data; then
again with snapshots every few steps; then kills all ranks at the same step, with snapshots and
without, and starts them again. Prints a table.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from shards.format.build import BuildSettings, build
from tests.conftest import small_records
from tests.ranks import config_tree, run_ranks

FAST, EVERY = 5, 50


def watch(out: Path, kill_at: int, rank: int) -> None:
    """Write what rank 0 does into a file, a line each: step, when it ended, seconds of the copy,
    seconds until a snapshot had landed. Kill every rank after a step."""
    import trainer.checkpoint.fast as fast
    import trainer.loop as loop
    import trainer.ranks as ranks

    ranks.this_node = lambda: f"node-{rank}"
    real_open, real_step, real_save = fast.open_folder, loop.step, loop.save

    def open_folder(place: str, run_url: str) -> Path:
        Path(place, str(rank)).mkdir(exist_ok=True)
        return real_open(f"{place}/{rank}", run_url)

    def say(*fields: Any) -> None:
        if rank == 0:
            with open(out, "a") as f:
                print(*fields, file=f, flush=True)

    def step(run: Any, *arguments: Any) -> Any:
        made = real_step(run, *arguments)
        say("step", made[0].step, time.time(), time.process_time())
        if made[0].step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    def save(run: Any, *arguments: Any) -> None:
        began = time.monotonic()
        real_save(run, *arguments)
        say("stall", time.monotonic() - began)

    real_work = fast.Snapshots._work

    def work(self: Any, *arguments: Any) -> None:
        began = time.monotonic()
        real_work(self, *arguments)
        say("landed", time.monotonic() - began)

    fast.open_folder = open_folder
    loop.step, loop.save = step, save  # type: ignore[assignment]
    fast.Snapshots._work = work  # type: ignore[assignment, method-assign]


def numbers(path: Path, kind: str) -> list[list[float]]:
    lines = [line.split() for line in path.read_text().splitlines()]
    return [[float(x) for x in fields[1:]] for fields in lines if fields[0] == kind]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--hidden", type=int, default=256)
    given = parser.parse_args()
    disk = Path(tempfile.mkdtemp(prefix="lxscale-bench-"))
    memory = Path(tempfile.mkdtemp(prefix="lxscale-bench-", dir="/dev/shm"))
    try:
        measure(given.steps, given.hidden, disk, memory)
    finally:
        shutil.rmtree(disk)
        shutil.rmtree(memory)


def measure(steps: int, hidden: int, disk: Path, memory: Path) -> None:
    build(small_records(200), disk / "set", BuildSettings("fast", "bench", images_per_shard=50))
    model = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_heads": 4}
    layers = {"language_layers": 2, "object_layers": 1, "cross_layers": 1}

    def tree(name: str, fast: bool) -> dict[str, Any]:
        checkpoint = {"every": EVERY, "fast_every": FAST if fast else 0}
        return config_tree(
            disk / "set",
            disk,
            name,
            model=model | layers,
            train={"steps": steps, "global_batch": 32},
            checkpoint=checkpoint | {"fast_folder": str(memory)},
        )

    kill_at = EVERY - 2
    for name, fast in (("without", False), ("with", True)):
        out = disk / f"{name}.log"
        run_ranks(2, [(tree(name, fast), None, False)], prepare=partial(watch, out, -1))
        steady = numbers(out, "step")[4:EVERY]
        wall, cpu = ([b[i] - a[i] for a, b in itertools.pairwise(steady)] for i in (1, 2))
        print(
            f"{name:8} snapshots: a step takes {statistics.mean(wall) * 1e3:.0f} ms, median "
            f"{statistics.median(wall) * 1e3:.0f}, and {statistics.mean(cpu) * 1e3:.0f} ms of CPU "
            "a rank"
        )
        if fast:
            stalls = [s for (s,) in numbers(out, "stall")]
            landed = [s for (s,) in numbers(out, "landed")]
            print(
                f"  stall of a snapshot: median {statistics.median(stalls) * 1e3:.1f} ms, most "
                f"{max(stalls) * 1e3:.1f}; landed, with its copy, after "
                f"{statistics.median(landed) * 1e3:.1f} ms"
            )
        killed = tree(f"{name}-killed", fast)
        out = disk / f"{name}-killed.log"
        run_ranks(2, [(killed, None, False)], prepare=partial(watch, out, kill_at))
        died = numbers(out, "step")[-1][1]
        began = time.time()
        run_ranks(2, [(killed, None, False)], prepare=partial(watch, out, -1))
        again = [(int(s), at) for s, at, _ in numbers(out, "step") if at > died]
        lost = kill_at - again[0][0] + 1
        there = next(at for s, at in again if s == kill_at)
        print(
            f"  killed after step {kill_at}: {lost} steps lost; {again[0][1] - began:.1f} s to the "
            f"first step, {there - began:.1f} s until it was where it had been"
        )


if __name__ == "__main__":
    main()

"""Whether the loader keeps an accelerator fed: python benchmarks/fed.py [--small] [--out FILE]

Trains LXMERT base (--small: a tiny one) with the loop of `lxscale train` in this process, on the
GPU where there is one, and takes how much of the time the loop waits for its batches, by the number
of loader workers. Needs neither Ray nor a network. Every byte is in the page cache. After that it
stops a run half-way and goes on from its checkpoint, beside one that is not stopped, and compares
the losses of all steps.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from protocol import machine, markdown
from shards.format.build import BuildSettings, build
from synthetic import records
from trainer.config import parse_config
from trainer.loop import Control, train

IMAGES, BATCH, STEPS, WARM_UP = 2000, 256, 60, 20
WORKERS = (0, 1, 4)
_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 128,
    "language_layers": 1,
    "object_layers": 1,
    "cross_layers": 1,
}


@dataclass
class Phases:
    """Seconds of each step: until the next one's batch was there, and its own work."""

    steps: int
    """At which a run is asked to stop."""
    waits: list[float] = field(default_factory=list)
    works: list[float] = field(default_factory=list)
    _asked: int = 0
    _last: tuple[str, float] = ("start", 0.0)

    def enter(self, phase: str) -> None:
        now = time.perf_counter()
        last, began = self._last
        if last == "data":
            self.waits.append(now - began)
        elif last == "step":
            self.works.append(now - began)
        self._last = (phase, now)

    def should_stop(self) -> bool:
        self._asked += 1
        return self._asked >= self.steps


def tree(folder: Path, name: str, small: bool, workers: int, steps: int) -> dict[str, Any]:
    return {
        "run": {"name": name, "storage": str(folder / "runs"), "seed": 1},
        "data": {
            "train": str(folder / "set"),
            "cache": str(folder / "cache"),
            "loader_workers": workers,
        },
        "sampler": {"window": 4},
        "model": _SMALL if small else {},
        "train": {"steps": steps, "global_batch": BATCH, "precision": "bf16", "log_every": 10**6},
        "checkpoint": {"every": 10**6},
    }


def measure(run: Callable[[Phases], None], steps: int) -> tuple[float, float, float]:
    """Pairs/s, the share of time that was waited, and GiB of device memory at most."""
    phases = Phases(steps)
    before = 0
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()  # of earlier runs of this process
    run(phases)
    # The first wait is for the first step's.
    waits, works = phases.waits[1 + WARM_UP : 1 + steps], phases.works[WARM_UP:steps]
    spent = sum(waits) + sum(works)
    memory = torch.cuda.max_memory_allocated() - before if torch.cuda.is_available() else 0
    return len(works) * BATCH / spent, sum(waits) / spent, memory / 2**30


def losses(folder: Path, name: str) -> dict[int, float]:
    found = {}
    for path in sorted((folder / "runs" / name / "tensorboard").glob("steps-*.jsonl")):
        for line in path.read_text().splitlines():
            step = json.loads(line)
            found[step["step"]] = step["loss"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true", help="a tiny model, for a look at the code")
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS, help="of the loader")
    parser.add_argument("--out", type=Path, help="write the table there, too")
    given = parser.parse_args()
    gpu = torch.cuda.is_available()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
    if gpu:
        torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", rank=0, world_size=1)
    steps = WARM_UP + 10 if given.small else WARM_UP + STEPS
    rows = []
    with tempfile.TemporaryDirectory(prefix="lxscale-fed-") as name:
        folder = Path(name)
        began = time.perf_counter()
        settings = BuildSettings("fed", "random", shard_bytes=32 << 20)
        images = IMAGES // (10 if given.small else 1)
        build(records(images), str(folder / "set"), settings)
        print(f"{images} images built in {time.perf_counter() - began:.0f} s", flush=True)

        def run(name: str, workers: int, steps: int, phases: Phases) -> None:
            config = parse_config(tree(folder, name, given.small, workers, steps), "benchmark")
            train(config, Control(phases.should_stop, phases.enter))

        for workers in given.workers:

            def timed(phases: Phases, workers: int = workers) -> None:
                run(f"timed-{workers}", workers, steps, phases)

            rate, waited, memory = measure(timed, steps)
            rows.append([f"{workers}", f"{rate:,.0f}", f"{waited:.1%}", f"{memory:.1f}"])
            print(rows[-1], flush=True)

        for name, stops in (("whole", [12]), ("again", [12]), ("cut", [6, 12])):
            for stop in stops:
                run(name, 1, 12, Phases(stop))
        whole = losses(folder, "whole")
        others = {name: losses(folder, name) for name in ("again", "cut")}
        worst = {
            k: max(abs(other[step] - whole[step]) for step in whole) for k, other in others.items()
        }
    header = ["loader workers", "pairs/s", "waiting for data", "device memory, GiB"]
    device = torch.cuda.get_device_name() if gpu else "no GPU"
    text = (
        f"# Keeping a device fed, {date.today()}, {device}, {machine()}\n\n"
        f"{markdown(header, rows)}\nLXMERT {'tiny' if given.small else 'base'}, bf16, batches of "
        f"{BATCH}, {steps - WARM_UP} steps after {WARM_UP}; torch {torch.__version__}.\n\n"
        "Of 12 steps' losses, the largest difference from those of another run: done again "
        f"{worst['again']:.3g}; stopped after 6 steps and continued {worst['cut']:.3g}.\n"
    )
    print(text)
    if given.out:
        given.out.write_text(text)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

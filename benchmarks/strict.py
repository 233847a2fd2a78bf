"""What train.strict costs: python benchmarks/strict.py [--rounds N] [--stage S] [--out FILE]

Trains a small LXMERT with the loop of `lxscale train` in 1 and 2 processes over gloo, a thread
each, strict and without, with the same micro-batches, in turn in each round, so that whatever else
the machine does hits all alike. Rates are medians over the rounds, of the steps' time without the
start. Needs neither Ray nor a network.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from protocol import THREADS, machine, markdown
from shards.format.build import BuildSettings, build
from synthetic import records
from trainer.config import parse_config
from trainer.loop import Control, train

IMAGES, BATCH, PARTS, STEPS, WARM_UP = 200, 64, 4, 12, 3
WORLDS = (1, 2)
_SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "num_heads": 4,
    "intermediate_size": 1024,
    "language_layers": 2,
    "object_layers": 1,
    "cross_layers": 1,
}


def tree(folder: Path, name: str, world: int, strict: bool, stage: int) -> dict[str, Any]:
    parts = {"strict": PARTS} if strict else {"accumulation": PARTS // world}
    return {
        "run": {"name": name, "storage": str(folder / "runs"), "seed": 1},
        "data": {"train": str(folder / "set"), "cache": str(folder / "cache")},
        "model": _SIZES,
        "train": {
            "steps": WARM_UP + STEPS,
            "global_batch": BATCH,
            "zero_stage": stage,
            "log_every": 10**6,
            **parts,
        },
        "checkpoint": {"every": 10**6},
        "cluster": {"workers": world},
    }


def _rank(rank: int, world: int, port: int, runs: list[dict[str, Any]], pipe: Any) -> None:
    """Make each run when it is asked for; say the seconds of its steps but for the first."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    for config in runs:
        pipe.recv()
        at: list[float] = []

        def enter(phase: str, at: list[float] = at) -> None:
            if phase in ("agreement", "end"):
                at.append(time.perf_counter())

        train(parse_config(config, "benchmark"), Control(enter=enter))
        pipe.send(at[-1] - at[WARM_UP])


class Group:
    """The processes of one world size, which wait to be asked for their next run."""

    def __init__(self, world: int, runs: list[dict[str, Any]]) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self._pipes = []
        self._processes = []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(target=_rank, args=(rank, world, port, runs, there))
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self) -> float:
        """Pairs/s of the next run."""
        for pipe in self._pipes:
            pipe.send(None)
        return STEPS * BATCH / max(pipe.recv() for pipe in self._pipes)

    def close(self) -> None:
        for process in self._processes:
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stage", type=int, default=1, help="of ZeRO: 0, 1 or 2")
    parser.add_argument("--out", type=Path, help="write the table there, too")
    given = parser.parse_args()
    os.environ |= THREADS
    rates: dict[tuple[int, bool], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="lxscale-strict-") as name:
        folder = Path(name)
        build(records(IMAGES), str(folder / "set"), BuildSettings("strict", "random"))
        kinds = [strict for _ in range(given.rounds) for strict in (False, True)]
        groups = {
            world: Group(
                world,
                [
                    tree(folder, f"{world}-{i}", world, strict, given.stage)
                    for i, strict in enumerate(kinds)
                ],
            )
            for world in WORLDS
        }
        for strict in kinds:
            for world, group in groups.items():
                rates.setdefault((world, strict), []).append(group.run())
                print(world, "strict" if strict else "ordinary", rates[world, strict], flush=True)
        for group in groups.values():
            group.close()
    rows = []
    for world in WORLDS:
        plain, strict_ = rates[world, False], rates[world, True]
        each = [s / p for s, p in zip(strict_, plain, strict=True)]
        rows.append([f"{world}"])
        for found in (plain, strict_):
            rows[-1].append(f"{statistics.median(found):,.1f}")
            rows[-1].append(f"{min(found):,.1f} to {max(found):,.1f}")
        rows[-1].append(f"{statistics.median(each):.2f}")
        rows[-1].append(f"{min(each):.2f} to {max(each):.2f}")
    header = ["workers", "ordinary, pairs/s", "spread", "strict, pairs/s", "spread", "ratio"]
    header.append("spread of rounds")
    text = (
        f"# What train.strict costs, {date.today()}, {machine()}\n\n{markdown(header, rows)}\n"
        f"{PARTS} micro-batches of {BATCH // PARTS} pairs a step, hidden size "
        f"{_SIZES['hidden_size']}, fp32, ZeRO {given.stage}, a thread a worker; {given.rounds} "
        f"rounds of {STEPS} steps after {WARM_UP}, in turn; torch {torch.__version__}. The ratio "
        "is the median of the rounds' own.\n"
    )
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()

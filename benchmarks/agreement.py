"""What it costs that all ranks agree on a step's data: python benchmarks/agreement.py [--help]

So many processes of this machine sum some 30 numbers over gloo, as trainer/step/sync.py does: when
the step needs them, and begun a step before. The step is a pause of `--step` ms, as of a host that
waits for its GPU. What is shown is how long the sums are waited for, on the slowest rank.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from protocol import THREADS, machine, markdown
from trainer.ranks import begin_all_reduce_sum

RANKS, NUMBERS, WARM_UP = (2, 4, 8, 16, 32), 30, 10


def waits(ahead: bool, steps: int, pause: float) -> float:
    """Median of the milliseconds of a step that a rank waits for its sums."""
    numbers = torch.ones(NUMBERS, dtype=torch.float64)
    found = []
    pending: Callable[[], torch.Tensor] = begin_all_reduce_sum(numbers.clone())
    for _ in range(WARM_UP + steps):
        began = time.perf_counter()
        if not ahead:
            pending = begin_all_reduce_sum(numbers.clone())
        assert pending()[0] == dist.get_world_size()
        found.append(time.perf_counter() - began)
        if ahead:
            pending = begin_all_reduce_sum(numbers.clone())
        time.sleep(pause)
    if ahead:
        pending()
    return 1000 * statistics.median(found[WARM_UP:])


def _rank(rank: int, given: argparse.Namespace, world: int, port: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    for _ in range(given.rounds):
        for ahead in (False, True):
            slowest = torch.tensor(waits(ahead, given.steps, given.step / 1000))
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if rank == 0:
                pipe.send((ahead, float(slowest)))
    dist.destroy_process_group()


def measure(given: argparse.Namespace, world: int) -> dict[bool, list[float]]:
    """Waits of each round, in ms, by whether the sums were begun a step before."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    ranks = [
        context.Process(target=_rank, args=(r, given, world, port, there)) for r in range(world)
    ]
    for p in ranks:
        p.start()
    found: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(2 * given.rounds):
        ahead, wait = here.recv()
        found[ahead].append(wait)
    for p in ranks:
        p.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--step", type=float, default=100.0, help="ms (default: 100)")
    parser.add_argument("--steps", type=int, default=40, help="of a round (default: 40)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the table there, too")
    given = parser.parse_args()
    os.environ |= THREADS
    rows = []
    for world in given.ranks:
        found = measure(given, world)
        needed, ahead = (statistics.median(found[key]) for key in (False, True))
        spread = [f"{min(found[k]):.2f} to {max(found[k]):.2f}" for k in (False, True)]
        a_message = 1000 * needed / (2 * (world - 1))
        rows.append([f"{world}", f"{needed:.2f}", spread[0], f"{ahead:.2f}", spread[1]])
        rows[-1] += [f"{needed / ahead:.1f}", f"{a_message:.0f}"]
        print(rows[-1], flush=True)
    head = ["ranks", "when needed, ms", "rounds", "a step before, ms", "rounds", "ratio"]
    head += ["µs a message"]
    text = markdown(head, rows)
    text = f"# The agreement on a step's data, {date.today()}, {machine()}\n\n{text}\n"
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()

"""What ranks send each other in a step: python benchmarks/traffic.py [--out FILE]

Two ranks train a small LXMERT over gloo on the loopback interface, whose own count of bytes is read
around some steps, at every ZeRO stage, in fp32 and bf16. What a step takes beside the state (the
agreement, losses, the store of the process group) is in it. Beside it the model of docs/scaling.md.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import socket
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from protocol import THREADS, machine, markdown
from shards.format.build import BuildSettings, build
from synthetic import records
from trainer.checkpoint.generations import find_generation
from trainer.config import parse_config
from trainer.loop import Control, train

WARM_UP, STEPS = 4, 12


def modelled(parameters: int, stage: int, precision: str) -> float:
    """Bytes that a rank of two sends in a step; of n ranks, 2 (n - 1) / n times as many.

    Gradients travel in the weights' type, P numbers. An all-reduce of them sends 2 P (n - 1) / n,
    a gathering of updated weights P (n - 1) / n: stage 0 does the one, 1 and 2 both (2 reduces by
    all-reduce over gloo, too); 3 reduce-scatters gradients, P (n - 1) / n, and gathers weights for
    the forward and again for the backward.
    """
    size = 2 if precision == "bf16" else 4
    passes = {0: 2, 1: 3, 2: 3, 3: 3}[stage]
    return passes * parameters * size / 2


def _sent() -> int:
    """Bytes that have left by the loopback interface (proc(5))."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise SystemExit("no loopback interface in /proc/net/dev")


def _rank(rank: int, port: int, runs: list[dict[str, Any]], pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for config in runs:
        at: list[int] = []

        def enter(phase: str, at: list[int] = at) -> None:
            if phase in ("agreement", "end"):
                at.append(_sent())

        train(parse_config(config, "benchmark"), Control(enter=enter))
        if rank == 0:
            pipe.send((at[-1] - at[WARM_UP]) / STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the table there, too")
    given = parser.parse_args()
    os.environ |= THREADS
    rows = []
    with tempfile.TemporaryDirectory(prefix="lxscale-traffic-") as name:
        folder = Path(name)
        build(records(60), str(folder / "set"), BuildSettings("traffic", "random"))
        cases = [(stage, kind) for kind in ("fp32", "bf16") for stage in range(4)]
        runs = [_tree(folder, stage, kind) for stage, kind in cases]
        for (stage, kind), sent in zip(cases, _measured(runs), strict=True):
            parameters = _parameters(folder / "runs" / f"{kind}-{stage}")
            expected = modelled(parameters, stage, kind)
            rows.append(
                [
                    f"{stage}, {kind}",
                    f"{sent / 2 / 1e6:.1f}",
                    f"{expected / 1e6:.1f}",
                    f"{sent / 2 / expected:.2f}",
                ]
            )
            print(rows[-1], flush=True)
    header = ["ZeRO", "a rank sends in a step, MB", "modelled, MB", "ratio"]
    text = "\n".join(
        [
            f"# Traffic between two ranks, {date.today()}, {machine()}",
            "",
            markdown(header, rows),
            f"{parameters / 1e6:.1f} M parameters, {STEPS} steps, gloo; torch {torch.__version__}.",
        ]
    )
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


def _tree(folder: Path, stage: int, precision: str) -> dict[str, Any]:
    return {
        "run": {"name": f"{precision}-{stage}", "storage": str(folder / "runs"), "seed": 1},
        "data": {"train": str(folder / "set"), "cache": str(folder / "cache")},
        "model": {
            "hidden_size": 128,
            "num_heads": 2,
            "intermediate_size": 512,
            "language_layers": 2,
            "object_layers": 1,
            "cross_layers": 1,
        },
        "train": {
            "steps": WARM_UP + STEPS,
            "global_batch": 8,
            "zero_stage": stage,
            "precision": precision,
            "log_every": 10**6,
        },
        "checkpoint": {"every": 10**6},
        "cluster": {"workers": 2},
    }


def _measured(runs: list[dict[str, Any]]) -> list[float]:
    """Bytes that both ranks send in a step of each run."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    ranks = [context.Process(target=_rank, args=(r, port, runs, there)) for r in range(2)]
    for process in ranks:
        process.start()
    found = [float(here.recv()) for _ in runs]
    for process in ranks:
        process.join()
    return found


def _parameters(run: Path) -> int:
    shapes = find_generation(str(run)).manifest.parameters
    return sum(map(math.prod, shapes.values()))


if __name__ == "__main__":
    main()

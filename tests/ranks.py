"""Runs the training loop in real processes over gloo, without Ray: many short jobs, quickly."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from trainer.config import RunConfig, parse_config

# Forked from a server that has imported everything: a rank starts in a moment.
CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = [
    "tests.ranks",
    "trainer.loop",
    "deepspeed",
    "torch._dynamo",  # which the first optimizer imports, for more than a second
]
CONTEXT.set_forkserver_preload(PRELOAD)
os.environ.setdefault("DS_ACCELERATOR", "cpu")

Job = tuple[dict[str, Any], int | None, bool]
"""(configuration tree, step at which to stop or None, whether stopping is kill -9 of rank 1)"""


def fresh_server() -> None:
    """Start the server anew: it and what it forks keep the environment and the output that it
    started with."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    CONTEXT.set_forkserver_preload(PRELOAD)


def _rank(
    rank: int,
    world: int,
    port: int,
    jobs: list[Job],
    errors: Any,
    environment: dict[str, str],
    prepare: Callable[[int], None] | None,
) -> None:
    import torch
    import torch.distributed as dist

    from trainer.loop import Control, train

    torch.set_num_threads(1)
    os.environ |= environment
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    if prepare:
        prepare(rank)
    try:
        for tree, end, kill in jobs:
            made = 0

            def should_stop(end: int | None = end, kill: bool = kill) -> bool:
                """Asked before each step, of which it is the last if the answer is yes."""
                nonlocal made
                if kill and made == end and rank == world - 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                made += 1
                return end is not None and made >= end and not kill

            train(parse_config(tree, "test"), Control(should_stop))
    except Exception as error:
        errors.put(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None


def run_ranks(
    world: int,
    jobs: list[Job],
    timeout: float = 240,
    environments: list[dict[str, str]] | None = None,
    prepare: Callable[[int], None] | None = None,
) -> list[str]:
    """Run jobs one after the other on `world` processes; the errors that ranks ended with.

    environments: what each rank's has beside this process's. prepare: called in every rank with its
    number before the jobs, to make something fail there.
    """
    # The server that they are forked from has kept the environment that it started with.
    environment = dict(os.environ)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    errors = CONTEXT.SimpleQueue()
    ranks = [
        CONTEXT.Process(
            target=_rank,
            args=(r, world, port, jobs, errors, environment | own, prepare),
        )
        for r, own in enumerate(environments or [{}] * world)
    ]
    for p in ranks:
        p.start()
    for p in ranks:
        p.join(timeout)
        assert p.exitcode is not None, "a rank hangs"
    found = []
    while not errors.empty():
        found.append(errors.get())
    return found


def config_tree(
    data: Path, storage: Path, name: str, /, **sections: dict[str, Any]
) -> dict[str, Any]:
    """A run of a very small LXMERT; `sections` are merged over the defaults."""
    tree: dict[str, Any] = {
        "run": {"name": name, "storage": str(storage), "seed": 5},
        "data": {"train": str(data), "cache": str(storage / "cache")},
        "model": {
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 24,
            "language_layers": 1,
            "object_layers": 1,
            "cross_layers": 1,
            "max_positions": 20,
        },
        "optimizer": {"lr": 5e-3, "no_decay": ["bias", "LayerNorm"]},
        "train": {"steps": 8, "global_batch": 13, "accumulation": 2, "log_every": 100},
        "checkpoint": {"every": 3, "keep": 10},
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    return tree


def step_record(config: dict[str, Any] | RunConfig) -> dict[int, dict[str, float]]:
    """What the run recorded of each step; a step done again has its last record."""
    if isinstance(config, dict):
        config = parse_config(config, "test")
    folder = Path(config.run.storage) / config.run.name / "tensorboard"
    steps: dict[int, dict[str, float]] = {}
    for path in sorted(folder.glob("steps-*.jsonl")):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            steps[entry.pop("step")] = entry
    return steps

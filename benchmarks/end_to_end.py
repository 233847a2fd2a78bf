"""What a run keeps of the bare step's speed: python benchmarks/end_to_end.py [--help]

One worker trains with the loop of `lxscale train` (loader, agreement, step, a checkpoint every 50
steps, TensorBoard), and makes the same step on batches that lie ready, in turn in each round, in
processes of their own. What the run lacks is shown by cause, as a share of its time. Needs neither
Ray nor a network.

On a CPU the model has one thread, so that loader and checkpoints have a core, as on a machine with
GPUs they have many.
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
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model.objectives import target_counts
from protocol import THREADS, machine, markdown
from shards.format.build import BuildSettings, build
from synthetic import records
from trainer.checkpoint.owner import Claimant
from trainer.config import parse_config
from trainer.curves import curves_url
from trainer.loop import Control, train
from trainer.run import active_objectives, leave, load
from trainer.start import start
from trainer.step.copying import copied
from trainer.step.laps import Laps
from trainer.step.train_step import train_step

IMAGES, WARM_UP, EVERY = 400, 20, 50
_READY = 4
"""Batches that the bare step takes in turn."""
STEP = ("forward", "backward", "reduce", "update")
"""What is the step's own."""


def tree(given: argparse.Namespace, folder: Path, name: str) -> dict[str, Any]:
    model = {"hidden_size": given.hidden, "intermediate_size": 4 * given.hidden}
    model |= {"num_heads": max(given.hidden // 64, 1)}
    if given.hidden < 768:
        model |= {"language_layers": 2, "object_layers": 1, "cross_layers": 1}
    return {
        "run": {"name": name, "storage": str(folder / "runs"), "seed": 1},
        "data": {
            "train": str(folder / "set"),
            "cache": str(folder / "cache"),
            "loader_workers": given.loader_workers,
        },
        "model": model,
        "train": {
            "steps": WARM_UP + given.steps,
            "global_batch": given.batch,
            "precision": given.precision,
            "log_every": 10,
        },
        "checkpoint": {"every": EVERY, "keep": 2},
        "cluster": {"gpus_per_worker": int(torch.cuda.is_available())},
    }


def whole(given: argparse.Namespace, config: Any) -> dict[str, float]:
    """Seconds of a run's steps after the first, by what they went to."""
    at: list[tuple[str, float]] = []
    train(config, Control(enter=lambda phase: at.append((phase, time.perf_counter()))))
    first = [i for i, (phase, _) in enumerate(at) if phase == "agreement"][WARM_UP]
    at = at[first:]
    end = next(i for i, (phase, _) in enumerate(at) if phase == "end")
    spent: dict[str, float] = {}
    for (phase, began), (_, ended) in pairwise(at[: end + 1]):
        spent[phase] = spent.get(phase, 0.0) + ended - began
    events = EventAccumulator(curves_url(config)).Reload()
    parts = {
        tag.removeprefix("step_seconds/"): given.steps
        * statistics.mean(e.value for e in events.Scalars(tag) if e.step > WARM_UP)
        for tag in events.Tags()["scalars"]
        if tag.startswith("step_seconds/")
    }
    total = sum(spent.values())
    parts["checkpoint"] = spent.get("save", 0.0)
    return {"total": total, **parts, "logging and the rest": total - sum(parts.values())}


def bare(given: argparse.Namespace, config: Any) -> dict[str, float]:
    """Seconds of as many steps on batches that are there."""
    run, state = start(config, Claimant(), lambda phase: None)
    steps = load(run, state)
    ready = [next(steps) for _ in range(_READY)]
    losses = config.objectives.losses()
    for i in range(WARM_UP + given.steps):
        if i == WARM_UP:
            began = time.perf_counter()
        loaded = ready[i % _READY]
        active = active_objectives(run, loaded.step)
        counts = dict.fromkeys(active, 0.0)
        for batch in loaded.batches:
            for name, count in target_counts(batch, losses).items():
                counts[name] = counts.get(name, 0.0) + count
        batches = copied(loaded.batches, run.engine.device)
        train_step(run.engine, batches, active, counts, losses, i, (), Laps())
    took = time.perf_counter() - began
    steps.close()
    leave(run.owner)
    return {"total": took}


def _run(given: argparse.Namespace, folder: Path, name: str, pipe: Any) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(1)
    kind = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(kind, rank=0, world_size=1)
    config = parse_config(tree(given, folder, name), "benchmark")
    pipe.send((bare if name.startswith("bare") else whole)(given, config))


def measure(given: argparse.Namespace, folder: Path, name: str) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_run, args=(given, folder, name, there))
    process.start()
    there.close()
    try:
        found: dict[str, float] = here.recv()
    except EOFError:
        raise SystemExit(f"{name} failed: see above") from None
    process.join()
    return found


def report(given: argparse.Namespace, found: dict[str, list[dict[str, float]]]) -> str:
    pairs = given.batch * given.steps
    ready = statistics.median(r["total"] for r in found["bare"])
    middle = sorted(found["whole"], key=lambda r: r["total"])[len(found["whole"]) // 2]
    ratios = [b["total"] / w["total"] for b, w in zip(found["bare"], found["whole"], strict=True)]
    rows = [
        ["bare step", f"{pairs / ready:,.1f}", ""],
        ["whole run", f"{pairs / middle['total']:,.1f}", f"{statistics.median(ratios):.1%}"],
    ]
    own = sum(middle[part] for part in STEP)
    causes = {k: v for k, v in middle.items() if k not in ("total", *STEP)}
    causes["the step itself, beside them"] = own - ready
    shares = [[k, f"{v / middle['total']:.1%}"] for k, v in causes.items()]
    return "\n".join(
        [
            f"# A run beside its bare step, {date.today()}, {machine()}",
            "",
            markdown(["", "pairs/s", "of the bare step's"], rows),
            "",
            markdown(["what the run's time went to beside it", "share"], shares),
            "",
            f"{given.steps} steps of {given.batch} pairs after {WARM_UP}, hidden size "
            f"{given.hidden}, {given.precision}, {given.loader_workers} loader workers, a "
            f"checkpoint every {EVERY} steps; {given.rounds} rounds in turn, ratios from "
            f"{min(ratios):.1%} to {max(ratios):.1%}; torch {torch.__version__}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=256, help="below 768 with few layers")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--loader-workers", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the report there, too")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        os.environ |= THREADS
    found: dict[str, list[dict[str, float]]] = {"bare": [], "whole": []}
    with tempfile.TemporaryDirectory(prefix="lxscale-e2e-") as name:
        folder = Path(name)
        build(records(IMAGES), str(folder / "set"), BuildSettings("end", "random"))
        for i in range(given.rounds):
            for kind, results in found.items():
                results.append(measure(given, folder, f"{kind}-{i}"))
                print(kind, {k: round(v, 2) for k, v in results[-1].items()}, flush=True)
    text = report(given, found)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

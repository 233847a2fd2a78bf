"""Speed and memory of `lxscale predict`: python benchmarks/predict.py [--help]

A fine-tuned model of the base size answers questions about 36 objects; beside it the same model's
bare forward over batches that lie ready, in turn in each round. Then the peak memory of predictions
for data sets of growing size, each in a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from protocol import machine, markdown
from shards.dataset import open_dataset
from shards.format.build import BuildSettings, build
from shards.format.record import ImageRecord
from synthetic import records
from trainer.config import parse_config
from trainer.evaluate import Evaluation, answer_questions, questions, without_gradient
from trainer.loop import Control, train
from trainer.model import load_checkpoint
from trainer.predict import predict
from trainer.setup import batch_settings

_SMALL = {"hidden_size": 64, "num_heads": 4, "intermediate_size": 128, "language_layers": 1,
          "object_layers": 1, "cross_layers": 1}  # fmt: skip


def asked(images: int) -> Iterator[ImageRecord]:
    """Records whose sentences are questions with an id."""
    number = 0
    for record in records(images):
        sentences = []
        for s in record.sentences:
            answers = s.answers or {"answer 1": 1.0}
            sentences.append(replace(s, source="vqa", answers=answers, id=number))
            number += 1
        yield replace(record, sentences=tuple(sentences))


def make_run(folder: Path, model: dict[str, Any]) -> Path:
    """A run of one step, which has a checkpoint, made in a process of its own: DeepSpeed keeps
    groups that another engine in the same one would trip over."""
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(folder, model))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("the run cannot be made")
    return folder / "run"


def _run(folder: Path, model: dict[str, Any]) -> None:
    tree = {
        "task": "vqa",
        "run": {"name": "run", "storage": str(folder)},
        "data": {"train": str(folder / "set"), "cache": str(folder / "cache")},
        "model": model,
        "train": {"steps": 1, "global_batch": 2},
    }
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=0, world_size=1)
    train(parse_config(tree, "benchmark"), Control())
    dist.destroy_process_group()


def bare(run: Path, data_url: Path, batch: int) -> float:
    """Pairs/s of the forward alone, over all questions."""
    model, config, _ = load_checkpoint(str(run))
    data = open_dataset(str(data_url), config.data.cache)
    forward = without_gradient(model.eval(), torch.device("cpu"), config.objectives.losses())
    ready: list[Any] = []

    def keep(made: Any, objectives: Any) -> Any:
        ready.append(made)
        return forward(made, objectives)

    settings = batch_settings(config, data)
    task = Evaluation(data, settings, frozenset({"answers"}), batch)
    answer_questions(keep, task, "answers")
    began = time.perf_counter()
    for made in ready:
        forward(made, frozenset({"answers"}))
    return questions(data).streams[0].pairs / (time.perf_counter() - began)


def whole(run: Path, data_url: Path, batch: int, out: Path) -> float:
    """Pairs/s of predictions, from the first batch that is answered to the file."""
    at: list[tuple[float, int]] = []
    predict(
        str(run),
        str(data_url),
        out,
        batch_size=batch,
        progress=lambda _what, done, _total: at.append((time.perf_counter(), done)),
    )
    (began, first), (_, last) = at[1], at[-1]
    return (last - first) / (time.perf_counter() - began)


def _peak(run: Path, data_url: Path, out: Path, pipe: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = predict(str(run), str(data_url), out, batch_size=64)
    pipe.send((count, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def peak(run: Path, data_url: Path, out: Path) -> tuple[int, int, int]:
    """Questions, and KiB that a process has before and at most."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_peak, args=(run, data_url, out, there))
    process.start()
    found: tuple[int, int, int] = here.recv()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(f"# Predictions, {date.today()}\n\n{machine()}; `benchmarks/predict.py`\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(asked(given.images), folder / "set", BuildSettings("p", "test"))
        run = make_run(folder, {})
        rates: dict[str, list[float]] = {"bare forward": [], "lxscale predict": []}
        for _ in range(given.rounds):
            rates["bare forward"].append(bare(run, folder / "set", given.batch))
            out = folder / "out.json"
            rates["lxscale predict"].append(whole(run, folder / "set", given.batch, out))
        base = statistics.median(rates["bare forward"])
        rows = [
            [n, f"{statistics.median(v):.1f}", f"{min(v):.1f} to {max(v):.1f}",
             f"{statistics.median(v) / base:.2f}"]
            for n, v in rates.items()
        ]  # fmt: skip
        print(markdown(["base size, fp32", "questions/s", "spread", "ratio"], rows))
    rows = []
    for images in (given.images, 10 * given.images, 50 * given.images):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            settings = BuildSettings("p", "test", images_per_shard=given.images)
            build(asked(images), folder / "set", settings)
            run = make_run(folder, _SMALL)
            count, before, most = peak(run, folder / "set", folder / "out.json")
            rows.append([f"{count:,}", f"{before / 1024:.0f}", f"{most / 1024:.0f}"])
    print(markdown(["questions, a small model", "MiB before", "MiB at most"], rows))


if __name__ == "__main__":
    main()

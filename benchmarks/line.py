"""The data line against its peers on this machine: python benchmarks/line.py [--out FILE]

Records of 36 x 2048 fp16, warm page cache, one process, batches of 256 pairs. Ours is everything up
to the model's input: order, sampler, gather, masks, tokens. The peers: webdataset reading the same
tars (decode and stack only), and a bare gather of the same rows from the mapped files, the bound.
Median of five runs after a warm-up.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import numpy as np
import webdataset

from shards.build import BuildSettings, build
from shards.dataset import Dataset, open_dataset
from shards.order import epoch_order
from shards.record import ImageRecord, Sentence
from shards.sampler import SamplerSettings, advance, plan, start_state
from trainer.batch import BatchSettings, make_batch
from trainer.setup import data_streams

IMAGES, OBJECTS, DIM, BATCH, RUNS = 1500, 36, 2048, 256, 5


def records() -> Iterator[ImageRecord]:
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(2000)]
    features = rng.random((OBJECTS, DIM), dtype=np.float32).astype(np.float16)
    boxes = np.tile(np.asarray([[0.1, 0.1, 0.6, 0.7]], dtype=np.float32), (OBJECTS, 1))
    for i in range(IMAGES):
        sentences = tuple(
            Sentence(" ".join(rng.choice(words, 10)), "vqa", {f"answer{i % 50}": 1.0})
            for _ in range(4)
        )
        yield ImageRecord(f"image{i}", 640, 480, boxes, np.roll(features, i, axis=1), sentences)


def rate(work: Callable[[], int]) -> float:
    """Median things per second."""
    work()
    rates = []
    for _ in range(RUNS):
        began = time.perf_counter()
        done = work()
        rates.append(done / (time.perf_counter() - began))
    return statistics.median(rates)


def ours(data: Dataset) -> Callable[[], int]:
    settings = SamplerSettings(seed=1)
    streams = data_streams(settings, data)
    batch = BatchSettings(1, 0.15, 0.15, 2, 3, 4, data.manifest.schema.vocab_size)

    def work() -> int:
        state, done = start_state(streams), 0
        for _ in range(12):
            made = make_batch(data, streams, plan(settings, streams, state, BATCH), batch)
            state = advance(settings, state, BATCH)
            done += len(made.matched)
        return done

    return work


def bare(data: Dataset) -> Callable[[], int]:
    rng = np.random.default_rng(1)
    tars = [data.tar(i) for i in range(len(data.manifest.shards))]
    size = OBJECTS * DIM * 2
    out = np.empty((BATCH, size), dtype=np.uint8)

    def work() -> int:
        for _ in range(12):
            images = rng.integers(0, IMAGES, BATCH)
            shards = data.shard_of_image(images).tolist()
            offsets = data.merged.features_offset[images].tolist()
            for i, (shard, offset) in enumerate(zip(shards, offsets, strict=True)):
                out[i] = tars[shard][offset : offset + size]
        return 12 * BATCH

    return work


def stock(folder: Path) -> Callable[[], int]:
    def work() -> int:
        urls = sorted(str(p) for p in folder.glob("*.tar"))
        done, batch = 0, []
        for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
            raw = np.frombuffer(sample["features.f16"], dtype=np.float16)
            batch.append(raw.reshape(OBJECTS, DIM))
            if len(batch) == BATCH:
                done += len(np.stack(batch))
                batch = []
        return done

    return work


def positions(shards: int, pairs: int) -> Callable[[], int]:
    def work() -> int:
        order = epoch_order(tuple([pairs // shards] * shards), 1, 0, 0)
        begin = pairs // 3
        for i in range(20):
            order.locate(np.arange(begin + i * 65536, begin + (i + 1) * 65536))
        return 20 * 65536

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        settings = BuildSettings("bench", "random", images_per_shard=250)
        build(records(), Path(folder) / "set", settings)
        data = open_dataset(f"{folder}/set", f"{folder}/cache")
        line, bound = rate(ours(data)), rate(bare(data))
        peer = rate(stock(Path(folder) / "set"))
    rows = [
        ("ours, ready for the model", f"{line:,.0f} pairs/s", "1"),
        ("bare gather of the same rows", f"{bound:,.0f} rows/s", f"{line / bound:.2f}"),
        ("webdataset, decode and stack", f"{peer:,.0f} records/s", f"{line / peer:.1f}"),
        (
            "order, 9.18M pairs in 700 shards",
            f"{rate(positions(700, 9_180_000)):,.0f} positions/s",
            "",
        ),
        (
            "order, 1e9 pairs in 20,000 shards",
            f"{rate(positions(20_000, 10**9)):,.0f} positions/s",
            "",
        ),
    ]
    cpu = next(
        (
            x.split(":")[1].strip()
            for x in Path("/proc/cpuinfo").read_text().splitlines()
            if x.startswith("model name")
        ),
        platform.processor(),
    )
    text = f"# Data line, {date.today()}, one core of {cpu}\n\n"
    text += "| what | rate | ours / it |\n| --- | --- | --- |\n"
    text += "".join(f"| {a} | {b} | {c} |\n" for a, b, c in rows)
    print(text)
    if out:
        out.write_text(text)


if __name__ == "__main__":
    main()

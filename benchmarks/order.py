"""The order, on one core: python benchmarks/order.py [--out FILE]

First that of an epoch, position -> pair.

Positions are asked for in chunks: a batch of 256, 4,096 and 65,536, from one place of the epoch to
the next. Memory is what Python and numpy hold after the order is made and used, beside what the
sizes of the shards take, which a manifest has anyway. It grows with the shards, not with the pairs.

Then what a step costs before anything is read: its place, its plan, and the look-ahead, by shards
and streams. Streams are of data sets of their own, or ("shared") of sources that all shards have.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from datetime import date
from itertools import islice
from pathlib import Path

import numpy as np

from protocol import machine, markdown
from shards.order.draws import I64
from shards.order.epoch_order import EpochOrder, epoch_order
from shards.order.lookahead import Future
from shards.order.sampler import make_sampler
from shards.order.settings import SamplerSettings
from shards.order.streams import Contents, ShardRange

# Pairs, shards, shards per window (0 = all of them: an exact global shuffle).
SIZES = (
    (9_180_000, 700, 0),
    (9_180_000, 700, 16),
    (100_000_000, 2_000, 0),
    (1_000_000_000, 2_000, 0),
    (1_000_000_000, 20_000, 0),
    (1_000_000_000, 20_000, 16),
    (1_000_000_000, 200_000, 0),
    (1_000_000_000, 200_000, 16),
)
CHUNKS = (256, 4096, 65_536)
ROUNDS = 5


def sizes_of(pairs: int, shards: int) -> I64:
    """Pairs of each shard: uneven, as real ones are, and `pairs` together."""
    rng = np.random.default_rng(0)
    cuts = np.linspace(0, pairs, shards + 1).astype(np.int64)
    cuts[1:-1] += rng.integers(-pairs // shards // 4, pairs // shards // 4 + 1, shards - 1)
    return np.diff(cuts)


def pairs_at(order: EpochOrder, first: I64, begin: int, count: int) -> I64:
    """What the sampler does for a step: positions of a stream to pairs. first: of each shard."""
    shard, index = order.locate(np.arange(begin, begin + count))
    return first[shard] + index


def order_of(sizes: I64, window: int) -> tuple[EpochOrder, I64]:
    return epoch_order(sizes, 1, 0, window), np.concatenate([[0], np.cumsum(sizes)[:-1]])


def rate(sizes: I64, window: int, chunk: int, seconds: float) -> float:
    """Positions/s, median of ROUNDS runs of `seconds` over consecutive chunks."""
    total, rates = int(sizes.sum()), []
    order, first = order_of(sizes, window)
    for i in range(ROUNDS + 1):
        begin, done = total // (i + 2), 0
        began = time.perf_counter()
        while (now := time.perf_counter()) - began < seconds:
            pairs_at(order, first, (begin + done) % (total - chunk), chunk)
            done += chunk
        rates.append(done / (now - began))
    return statistics.median(rates[1:])


def memory(sizes: I64, window: int) -> tuple[float, float]:
    """Bytes that the order keeps, and the most at any time of its making and of a batch."""
    # What numpy loads on first use is not the order's.
    pairs_at(*order_of(np.asarray([1000, 1000]), 0), 0, 256)
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    tracemalloc.start()
    order = epoch_order(sizes, 1, 0, window)
    pairs_at(order, first, order.pairs // 3, 256)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return kept, most


# Shards, streams, whether these share the shards, shards per window, lanes, pairs a shard.
STEPS = (
    *((n, k, False, 16, 1, 1000) for n in (1_000, 10_000, 100_000) for k in (1, 8, 64)),
    (100_000, 64, False, 0, 1, 1000),
    (100_000, 64, True, 16, 1, 6400),
    (100_000, 64, False, 16, 256, 1000),
    # Windows of 160 pairs, of which a stream enters one every other step.
    (100_000, 64, False, 16, 1, 10),
)
BATCH, WORLD = 256, 64


def steps(
    shards: int, streams: int, shared: bool, window: int, lanes: int, pairs: int, count: int
) -> list[str]:
    """A row of the table of steps."""
    rng = np.random.default_rng(0)
    weights = [1.0 + i % 7 for i in range(streams)]
    settings = SamplerSettings(window=window, lanes=lanes)
    names = ["pairs"]
    ranges: list[ShardRange] = []
    columns = rng.integers(pairs * 4 // 5, pairs * 6 // 5, (shards, 1))
    if shared:
        names = [f"s{i:02d}" for i in range(streams)]
        columns = np.repeat(columns // streams, streams, 1)
        each = {n: 1 + i / 100 for i, n in enumerate(names)}
        settings = SamplerSettings(window=window, lanes=lanes, source_weights=each)
    elif streams > 1:
        edges = [shards * i // streams for i in range(streams + 1)]
        ranges = [ShardRange(f"d{i}", edges[i], edges[i + 1], w) for i, w in enumerate(weights)]
    began = time.perf_counter()
    sampler = make_sampler(settings, 1, Contents(columns, names, [], ranges))
    world = WORLD if lanes > 1 else 1
    future = Future(sampler, sampler.lanes_of(0, world), 2 * BATCH, 10**12)
    assert len(sampler.streams) == streams
    times, changes, state = [], 0, sampler.start()
    for i in range(count + 1):
        if i:
            began = time.perf_counter()
        step = sampler.step(state, BATCH)
        sampler.slice(step, 0, world)
        if future.at(step.before):
            changes += 1
            future.now()
            # What threads and evictions ask for at a time.
            list(islice(future.upcoming(), 64))
            future.due(np.arange(64))
        times.append(time.perf_counter() - began)
        state = step.after
    first, *times = times
    times.sort()
    shown = (statistics.mean(times), times[len(times) // 2], times[len(times) * 99 // 100])
    return [
        f"{shards:,}",
        f"{streams}{' shared' if shared else ''}",
        f"{window}" if window else "all",
        f"{lanes}",
        f"{first * 1e3:.0f}",
        *(f"{t * 1e3:.2f}" for t in shown),
        f"{changes / count:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="short runs: a look")
    parser.add_argument("--out", type=Path, help="write the table there, too")
    given = parser.parse_args()
    rows = []
    for pairs, shards, window in SIZES:
        sizes = sizes_of(pairs, shards)
        kept, most = memory(sizes, window)
        rates = [rate(sizes, window, chunk, 0.1 if given.quick else 1.0) for chunk in CHUNKS]
        rows.append(
            [
                f"{pairs:,}",
                f"{shards:,}",
                f"{window}" if window else "all",
                *(f"{r:,.0f}" for r in rates),
                f"{kept / 1e6:.3f}",
                f"{kept / shards:.0f}",
                f"{most / 1e6:.3f}",
            ]
        )
        print(*rows[-1], sep="  ", flush=True)
    header = ["pairs", "shards", "window", *(f"positions/s by {c:,}" for c in CHUNKS)]
    header += ["order, MB", "bytes a shard", "most at any time, MB"]
    text = f"# Order, {date.today()}, one core of {machine()}\n\n{markdown(header, rows)}"
    text += f"\nMedians of {ROUNDS} runs of consecutive chunks.\n"
    text += f"\nSteps of {BATCH} pairs, milliseconds; with lanes for one of {WORLD} workers.\n\n"
    rows = []
    for what in STEPS:
        rows.append(steps(*what, count=200 if given.quick else 2000))
        print(*rows[-1], sep="  ", flush=True)
    header = ["shards", "streams", "window", "lanes", "first step", "mean", "median", "99 %"]
    text += markdown([*header, "changes of windows a step"], rows)
    print("\n" + text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()

"""This loader beside an earlier one's: python benchmarks/before.py CHECKOUT [--out FILE]

CHECKOUT is a folder with the earlier version's source. One data set, which that version has built,
is read by both in turn, each time by a process of its own: batches made in it, and by one loader
worker. Every byte is in the page cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from datetime import date
from pathlib import Path

from protocol import THREADS, machine, markdown

ROUNDS, IMAGES, STEPS, BATCH = 10, 1500, 300, 256

_BUILD = """
import sys
sys.path.append(sys.argv[3])
from synthetic import records
from shards.format.build import BuildSettings, build
settings = BuildSettings("before", "random", shard_bytes=32 << 20)
build(records(int(sys.argv[2])), sys.argv[1], settings)
"""

_READ = """
import sys, time
from shards.dataset import open_dataset
from shards.order.settings import SamplerSettings
from trainer.sections import LoaderSettings
from trainer.data.batch import BatchSettings
from trainer.data.loader import RankSlice, load_steps
if __name__ == "__main__":
    place, cache, workers, steps, batch = *sys.argv[1:3], *map(int, sys.argv[3:])
    data = open_dataset(place, cache)
    sampler = data.sampler(SamplerSettings(window=4), 1)
    masks = BatchSettings(1, 0.15, 0.15, 2, 3, 4, data.manifest.schema.vocab_size)
    loaded = load_steps(data, sampler, masks, RankSlice(0, 1, 1), sampler.start(), batch,
                        steps * batch, LoaderSettings(loader_workers=workers))
    for i, step in enumerate(loaded):
        if i == steps // 5:
            began, at = time.perf_counter(), i
    print((steps - at) * batch / (time.perf_counter() - began))
"""


def run(checkout: Path, script: Path, *arguments: object) -> str:
    environment = os.environ | THREADS | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, cwd=script.parent
    ).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--out", type=Path, help="write the table there, too")
    given = parser.parse_args()
    now, before = Path(__file__).parents[1], given.checkout.absolute()
    rates: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="lxscale-before-") as name:
        folder = Path(name)
        for script, text in (("build.py", _BUILD), ("read.py", _READ)):
            (folder / script).write_text(text)
        run(before, folder / "build.py", folder / "set", IMAGES, Path(__file__).parent)
        for i in range(ROUNDS + 1):
            turns = [("before", before), ("now", now)]
            for workers in (0, 1):
                # Each is the first in half of the rounds.
                for which, checkout in turns[:: 1 - 2 * (i % 2)]:
                    arguments = (folder / "set", folder / which, workers, STEPS, BATCH)
                    rate = float(run(checkout, folder / "read.py", *arguments))
                    if i:  # the first verifies the files and merges their tables
                        rates[which, workers].append(rate)
    rows = []
    for workers in (0, 1):
        old, new = (statistics.median(rates[which, workers]) for which in ("before", "now"))
        pairs = zip(rates["now", workers], rates["before", workers], strict=True)
        ratios = sorted(a / b for a, b in pairs)
        ratio, span = statistics.median(ratios), f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        rows.append([f"{workers}", f"{old:,.0f}", f"{new:,.0f}", f"{ratio:.2f}", span])
    header = ["loader workers", "before, pairs/s", "now, pairs/s", "now / before", "by round"]
    text = f"# The loader before and now, {date.today()}, {machine()}\n\n{markdown(header, rows)}"
    text += (
        f"\nMedians of {ROUNDS} rounds of {STEPS} steps of {BATCH} pairs; of the ratios by round.\n"
    )
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()

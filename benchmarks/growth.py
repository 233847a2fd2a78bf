"""What a thousand times the data costs a node: python benchmarks/growth.py [--run] [--out FILE]

Opening: CPU seconds and memory of the first process of a node that opens a data set, and of a later
one, by shards. --run: trains a small LXMERT with `lxscale train` on 10⁶ and on 10⁹ pairs, in 20 and
20,000 shards that an S3 server makes as asked (simulated.py), under a cache limit, and takes the
most memory and disk that each run's processes had at any time; a shared page counts once.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import date
from pathlib import Path

import psutil

from protocol import machine, markdown
from simulated import serving, simulate

SHARDS = (1_000, 10_000, 100_000)
LIMIT_GB, BATCH, STEPS = 0.25, 1024, 300

_OPEN = """
import resource, sys, time
from pathlib import Path
import trainer.data.batch
from shards.dataset import open_dataset
from shards.order.settings import SamplerSettings
memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before, began = memory(), time.process_time()
data = open_dataset(sys.argv[1], sys.argv[2], text="window")
opened = time.process_time() - began
sampler = data.sampler(SamplerSettings(window=16), 1)
sampler.plan(sampler.step(sampler.start(), 256))
print(opened, (memory() - before) / 1024, time.process_time() - began - opened)
"""

_READ = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from shards.dataset import open_dataset
from shards.order.settings import SamplerSettings
from trainer.sections import LoaderSettings
from trainer.data.batch import settings_of
from trainer.data.loader import RankSlice, load_steps
if __name__ == "__main__":
    data = open_dataset(sys.argv[1], sys.argv[2], text="window")
    sampler = data.sampler(SamplerSettings(window=500), 1)
    steps = load_steps(data, sampler, settings_of(data, 1, 0.15, 0.15), RankSlice(0, 1, 1),
                       sampler.start(), 256, 60 * 256, LoaderSettings(fetch_threads=4))
    opened = mapped = 0
    for step in steps:
        assert not step.missing, step.missing
        opened = max(opened, len(os.listdir("/proc/self/fd")))
        mapped = max(mapped, len(open("/proc/self/maps").readlines()))
    print(opened, mapped)
"""


def opening(folder: Path) -> list[list[str]]:
    rows = []
    for shards in SHARDS:
        place = folder / str(shards)
        place.mkdir()
        template, _ = simulate(place, shards, images=4, sentences=2)
        # In a folder: a client of S3 takes 0.5 s to start, whatever it opens.
        given = str(place / "set"), str(place / "cache")
        times = [_python(_OPEN, *given).split() for _ in range(4)]
        with serving(place, template) as url:
            opened, mapped = _python(_READ, url, str(place / "cache")).split()
        first, *later = times
        median = sorted(float(t) for t, _, _ in later)[1]
        rows.append(
            [
                f"{shards:,}",
                f"{float(first[0]):.2f}",
                f"{float(first[1]):.0f}",
                f"{median:.2f}",
                f"{float(first[2]):.2f}",
                opened,
                mapped,
            ]
        )
        print(*rows[-1], sep="  ", flush=True)
        shutil.rmtree(place)
    return rows


def _python(script: str, *arguments: str) -> str:
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return done.stdout


# --- a run --------------------------------------------------------------------------------------


def run(folder: Path, shards: int) -> dict[str, float]:
    """MB of each kind, the most at any time of a node's run on so many shards."""
    folder.mkdir()
    template, manifest = simulate(folder, shards, images=500, sentences=100)
    print(f"{manifest.pairs:,} pairs in {len(manifest.shards):,} shards", flush=True)
    cache = folder / "cache"
    settings = {
        "run.name": "growth",
        "run.storage": folder / "runs",
        "data.cache": cache,
        "data.text": "window",
        "data.cache_limit_gb": LIMIT_GB,
        "data.loader_workers": 1,
        "sampler.window": 4,
        "train.steps": STEPS,
        "train.global_batch": BATCH,
        "data.validation": "null",
        "cluster.workers": 1,
    }
    most: defaultdict[str, float] = defaultdict(float)
    with serving(folder, template) as url:
        command: list[str | Path] = [
            Path(sys.executable).with_name("lxscale"),
            "train",
            "configs/tiny.yaml",
        ]
        command += [f"{k}={v}" for k, v in (settings | {"data.train": url}).items()]
        began = time.monotonic()
        with open(folder / "log", "wb") as log:
            job = subprocess.Popen(command, stdout=log, stderr=log)
            while job.poll() is None:
                for kind, mb in [*_memory(job.pid).items(), ("disk", _size(cache))]:
                    most[kind] = max(most[kind], mb)
                time.sleep(0.5)
        took = time.monotonic() - began
    if job.returncode:
        raise SystemExit((folder / "log").read_text()[-3000:])
    print((folder / "log").read_text()[-600:])
    pairs = STEPS * BATCH
    print(f"{pairs:,} pairs in {took:.0f} s, the start included", flush=True)
    return most


def _memory(job: int) -> dict[str, float]:
    """MB of the processes of a job at this time: of ours, and of Ray's own."""
    out = {"processes of lxscale": 0.0, "Ray's own": 0.0}
    command = psutil.Process(job)
    for process in (command, *command.children(recursive=True)):
        try:
            line = " ".join(process.cmdline())
            pss = process.memory_full_info().pss
        except psutil.Error:
            continue
        own = re.search(r"site-packages/ray|ray::.*Agent", line)
        out["Ray's own" if own else "processes of lxscale"] += pss / 2**20
    return out | {"both together": sum(out.values())}


def _size(folder: Path) -> float:
    """MB on disk under a folder."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except OSError:
            continue
    return total / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--run", action="store_true", help="train on 10⁹ pairs, too")
    parser.add_argument("--out", type=Path, help="write the tables there, too")
    given = parser.parse_args()
    text = f"# Growth, {date.today()}, {machine()}\n\n"
    with tempfile.TemporaryDirectory(prefix="lxscale-growth-") as folder:
        header = ["shards", "first process, CPU s", "its memory, MB", "a later one, CPU s"]
        header += ["the first step's plan, CPU s", "open files", "maps"]
        text += "Opening a data set and planning its first step. Then 60 steps of 256 pairs out of "
        text += "windows of 500 shards on S3, in a process that may have 256 files open.\n\n"
        text += markdown(header, opening(Path(folder)))
        if given.run:
            runs = [run(Path(folder) / f"run-{shards}", shards) for shards in (20, 20_000)]
            rows = [[kind, *(f"{most[kind]:,.0f}" for most in runs)] for kind in runs[0]]
            text += f"\n{STEPS} steps of {BATCH:,} pairs by a worker with a loader worker, "
            text += f"a cache limit of {LIMIT_GB * 1024:.0f} MiB. The most at any time, MB.\n\n"
            text += markdown(["", "10⁶ pairs in 20 shards", "10⁹ pairs in 20,000 shards"], rows)
    print("\n" + text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()

"""Reading from object storage with nothing cached: called by loader.py --cold, or by itself for the
readers that need no format of their own: python benchmarks/cold.py [--help]

A Ceph gateway on loopback holds the shards. A round runs each reader once, in a fresh process with
an empty folder for its cache: plain concurrent reads of whole objects by s3fs into memory and
nothing else (the bound for Python), the same by curl (the gateway's own bound), ours until every
shard is in the cache, ours until every batch of an epoch is made, and the peers that read object
storage without a configuration of their own; webdataset until every record is there, and until
every batch is. The clocks of plain reads and of ours start when the client is connected and what to
read is known: the names of the tars, and the open data set.

Left out, not tried: litdata and megatron-energon, whose storage clients take an endpoint other than
AWS's by settings of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import peers
from protocol import THREADS, machine, markdown
from shards.dataset import open_dataset
from shards.format.build import BuildSettings, build
from shards.format.manifest import given_file
from shards.format.tokenizer import load_tokenizer
from shards.order.draws import I64
from shards.store import objects
from synthetic import records

GATEWAY = Path(__file__).parents[1].parent / "shared" / "tools" / "rgw-up"
BUCKET = "lxscale-bench"
WINDOW = 3  # shards per shuffle window of ours
FETCHES = 8, 2  # downloads at once of ours: as in training, and as suits two cores
_CONCURRENT = (2, 4, 8, 16)  # of plain reads: the fastest is the bound

# Given the folder in the bucket, an empty local one, and more of its own; returns seconds.
Reader = Callable[..., float]


# --- readers ------------------------------------------------------------------------------------


def plain(url: str, _: Path, concurrent: int) -> float:
    """Whole tars by an asynchronous s3fs, `concurrent` at a time, thrown away."""
    import s3fs

    tars = _tars(url)

    async def read() -> float:
        fs = s3fs.S3FileSystem(asynchronous=True, skip_instance_cache=True)
        session = await fs.set_session()
        slots = asyncio.Semaphore(concurrent)

        async def one(tar: str) -> None:
            async with slots:
                await fs._cat_file(tar.removeprefix("s3://"))

        began = time.monotonic()
        await asyncio.gather(*(one(tar) for tar in tars))
        seconds = time.monotonic() - began
        await session.close()
        return seconds

    return asyncio.run(read())


def curl(url: str, _: Path, concurrent: int) -> float:
    """Whole tars by curl, thrown away."""
    outputs = [word for address in _signed(url) for word in ("-o", os.devnull, address)]
    began = time.monotonic()
    subprocess.run(
        ["curl", "-fZ", "--no-progress-meter", "--parallel-max", str(concurrent), *outputs],
        check=True,
    )
    return time.monotonic() - began


def _signed(url: str) -> list[str]:
    """Addresses of the tars that carry their permission, for readers without credentials."""
    import s3fs

    fs = s3fs.S3FileSystem()
    return [fs.url(tar, expires=3600) for tar in _tars(url)]


def _tars(url: str) -> list[str]:
    """The tars of a data set: they lie in the folder of the build that made them."""
    builds = [objects.join(url, name) for name in objects.list_folder(url)[1]]
    return [
        objects.join(build, name)
        for build in builds
        for name in objects.list_names(build)
        if name.endswith(".tar")
    ]


class _AllInTurn:
    """A future in which every shard is needed, one after the other."""

    consumed = 0

    def __init__(self, shards: int) -> None:
        self._shards = shards

    def now(self) -> I64:
        return np.arange(self._shards)

    def due(self, shards: I64) -> NDArray[np.float64]:
        return shards.astype(np.float64)

    def upcoming(self) -> Iterator[tuple[int, float, bool]]:
        return ((shard, float(shard), True) for shard in range(self._shards))


def fetch(url: str, cache: Path, concurrent: int) -> float:
    """Ours, until every shard is in the cache and verified."""
    data = open_dataset(url, cache)
    began = time.monotonic()
    shards = range(len(data.manifest.shards))
    data.shards.look_ahead(_AllInTurn(len(shards)), concurrent)
    for shard in shards:
        data.shards.path(shard)
    return time.monotonic() - began


def epoch(url: str, cache: Path, batches: Callable[..., Iterator[int]]) -> float:
    """Ours, until every batch of one epoch is made, ready for the model."""
    from trainer.data.loader import RankSlice

    data = open_dataset(url, cache)
    began = time.monotonic()
    pairs = sum(shard.pairs for shard in data.manifest.shards)
    made = sum(batches(data, 0, RankSlice(0, 1, 1), pairs, WINDOW))
    seconds = time.monotonic() - began
    assert made == pairs
    return seconds


def webdataset(url: str, _: Path) -> float:
    """Our tars through curl, as webdataset reads them; it has no way to S3 of its own
    but the AWS command line."""
    urls = _signed(url)
    began = time.monotonic()
    for sample in _records(urls):
        sample["features.f16"]
    return time.monotonic() - began


def webdataset_batches(url: str, _: Path, vocab: Path, every: bool) -> float:
    """The same, until every batch is made as the model needs it. every: of every sentence, as ours;
    else of one for each image."""
    urls, tokenizer = _signed(url), load_tokenizer(vocab)
    began = time.monotonic()
    samples: Iterator[peers.Sample] = map(peers.of_tar, _records(urls))
    if every:
        samples = (s for s in samples for _ in json.loads(s.document)["sentences"])
    made = sum(peers.ready(samples, 256, tokenizer))
    seconds = time.monotonic() - began
    assert made
    return seconds


def _records(urls: list[str]) -> Iterator[dict[str, Any]]:
    from webdataset import WebDataset

    yield from WebDataset(urls, shardshuffle=100).shuffle(1000)


def mosaicml(url: str, cache: Path) -> float:
    """mosaicml-streaming, one shuffled epoch of its own format."""
    os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
    streaming = peers.streaming()
    began = time.monotonic()
    data = streaming.StreamingDataset(remote=url, local=str(cache), batch_size=256, shuffle=True)
    for sample in data:
        sample["features"]
    return time.monotonic() - began


# --- the run ------------------------------------------------------------------------------------


def report(
    root: Path,
    gateway: Path,
    rounds: int,
    batches: Callable[..., Iterator[int]],
    say: Callable[[str], None],
) -> str:
    """The table. root: folder with `shards`, and `mds` for mosaicml-streaming, in it; gateway: the
    script that starts one; batches: ours, see loader.py."""
    with _gateway(gateway, root / "gateway"):
        vocab = given_file(root / "shards", "vocab")
        sizes = {n: _upload(root / n) for n in ("shards", "mds") if (root / n).exists()}
        shards, mds = (f"s3://{BUCKET}/{name}" for name in ("shards", "mds"))
        megabytes = sizes["shards"] / 1e6

        def run(reader: Reader, url: str, *more: Any) -> float:
            return megabytes / _alone(reader, url, root, *more)

        tried = {n: max(run(plain, shards, n) for _ in range(2)) for n in _CONCURRENT}
        best = max(tried, key=lambda n: tried[n])
        say(f"plain reads, MB/s by number at once: { {n: round(v) for n, v in tried.items()} }")
        bound = f"plain reads by s3fs, {best} at once"
        found: dict[str, list[float]] = defaultdict(list)
        for i in range(rounds):
            found[bound].append(run(plain, shards, best))
            found[f"curl, {best} at once"].append(run(curl, shards, best))
            for n in FETCHES:
                found[f"lxscale, shards fetched, {n} at once"].append(run(fetch, shards, n))
            found["lxscale, an epoch of batches"].append(run(epoch, shards, batches))
            found["webdataset, an epoch of records"].append(run(webdataset, shards))
            for name, every in ("a sentence an image", False), ("every sentence, as ours", True):
                made = run(webdataset_batches, shards, vocab, every)
                found[f"webdataset, an epoch of batches, {name}"].append(made)
            if "mds" in sizes:
                found["mosaicml-streaming, an epoch of records"].append(run(mosaicml, mds))
            say(f"cold round {i + 1} of {rounds}")
    medians = {name: statistics.median(values) for name, values in found.items()}
    rows = [
        [
            name,
            f"{medians[name]:,.0f}",
            f"{min(values):,.0f} to {max(values):,.0f}",
            f"{medians[name] / medians[bound]:.2f}",
        ]
        for name, values in found.items()
    ]
    header = [f"from object storage, {megabytes:,.0f} MB", "MB/s", "least to most", "/ plain reads"]
    return (
        markdown(header, rows)
        + f"\nMedians of {rounds} runs, each from an empty cache; windows of {WINDOW} shards; "
        "without the imports, the listing and the opening of a data set; "
        "Ceph's gateway on the same machine and cores.\n"
    )


def _upload(folder: Path) -> int:
    """Everything in a folder to the bucket; returns the bytes of its tars."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    for path in files:
        objects.upload(path, f"s3://{BUCKET}/{path.relative_to(folder.parent)}")
    return sum(p.stat().st_size for p in files if p.suffix == ".tar")


def _alone(reader: Reader, url: str, root: Path, *more: Any) -> float:
    """Seconds of a reader in a process and an empty folder of its own."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=root) as folder:
        pipe, theirs = context.Pipe()
        process = context.Process(target=_call, args=(theirs, reader, url, Path(folder), *more))
        process.start()
        theirs.close()
        try:
            return float(pipe.recv())
        except EOFError:
            raise SystemExit(f"{reader.__name__} failed: see above") from None
        finally:
            process.join(10)
            if process.is_alive():  # a peer's thread
                process.kill()


def _call(pipe: Connection, reader: Reader, url: str, folder: Path, *more: Any) -> None:
    pipe.send(reader(url, folder, *more))


@contextmanager
def _gateway(script: Path, folder: Path) -> Iterator[None]:
    """Ceph's S3 gateway on loopback with our bucket, its place and keys in the environment."""
    if not script.exists():
        raise SystemExit(f"--cold needs a script that starts an S3 gateway, not {script}")
    output = folder.with_suffix(".log")
    with open(output, "w") as log:  # a pipe would stay open in its daemons
        subprocess.run([script, folder, "7489"], stdout=log, stderr=subprocess.STDOUT, check=True)
    words = output.read_text().split("\nendpoint ")[-1].split()
    pids = [int(pid) for pid in words[words.index("pids") + 1 :]]
    before = dict(os.environ)
    os.environ.update(
        THREADS,
        AWS_ENDPOINT_URL=words[0].removeprefix("endpoint "),
        AWS_ACCESS_KEY_ID=words[words.index("key") + 1],
        AWS_SECRET_ACCESS_KEY=words[words.index("secret") + 1],
        AWS_DEFAULT_REGION="us-east-1",
    )
    try:
        import s3fs

        s3fs.S3FileSystem(skip_instance_cache=True).mkdir(BUCKET)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    import loader

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=6000, help="0.15 MB each; default 6000")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gateway", type=Path, default=GATEWAY, help="script that starts it")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lxscale-bench-") as folder:
        root = Path(folder)
        settings = BuildSettings("bench", "random", shard_bytes=64 << 20)
        build(records(given.images), root / "shards", settings)
        say = partial(print, file=sys.stderr, flush=True)
        text = report(root, given.gateway, given.rounds, loader.batches, say)
    print(f"# From object storage, {date.today()}, {machine()}\n\n{text}")


if __name__ == "__main__":
    main()

"""Making shards of a bottom-up-attention TSV, beside what others' writers do with the same parser:

    python benchmarks/convert.py [--images N] [--rounds N] [--out FILE]

The TSV has N images of 36 boxes with features of 2,048 fp32, as LXMERT's; it is in the page cache.
`bare` is the least that anybody does: rows split, features decoded from base64 by Python's binascii
and converted to fp16, nothing written; two processes of it show what two cores make of one here.
All others write to the temporary folder: ours with sentences tokenised, everything checked and
hashed (`lxscale shards build`); webdataset's ShardWriter, mosaicml-streaming's MDSWriter and
litdata's optimize are fed our parser's records.
Each is a process of its own, started anew; they run in turn, and rates are medians.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from protocol import THREADS, machine, markdown
from shards.convert.convert import convert, records
from shards.convert.inputs import FeatureInput, Inputs, SentenceInput
from shards.convert.pool import in_processes
from shards.format.build import BuildSettings
from shards.format.members import MEMBERS, RECORD
from shards.format.record import ImageRecord, record_json, record_key
from synthetic import records as made_up
from synthetic import words


def write_inputs(folder: Path, images: int) -> None:
    """The TSV and its sentences."""
    entries = []
    with open(folder / "features.tsv", "wb") as f:
        for record in made_up(images):
            f.write(_row(record))
            texts: dict[str, list[str]] = {}
            for sentence in record.sentences:
                texts.setdefault(sentence.source, []).append(sentence.text)
            entries.append({"img_id": record.image, "sentf": texts})
    (folder / "sentences.json").write_text(json.dumps(entries))


def _row(record: ImageRecord) -> bytes:
    labels = record.labels
    assert labels is not None
    size = np.asarray([record.width, record.height] * 2, dtype=np.float32)
    columns = [
        labels.object_id.astype("<i8"),
        labels.object_conf.astype("<f4"),
        labels.attribute_id.astype("<i8"),
        labels.attribute_conf.astype("<f4"),
    ]
    cells = [record.image.encode(), b"%d" % record.height, b"%d" % record.width]
    cells += [base64.b64encode(c.tobytes()) for c in columns]
    cells += [b"%d" % len(record.boxes), base64.b64encode((record.boxes * size).tobytes())]
    cells += [base64.b64encode(record.features.astype("<f4").tobytes())]
    return b"\t".join(cells) + b"\r\n"


def _inputs(folder: Path) -> Inputs:
    return Inputs(
        (FeatureInput(str(folder / "features.tsv"), "tsv"),),
        (SentenceInput((folder / "sentences.json",)),),
    )


# --- contestants --------------------------------------------------------------------------------


def bare(processes: int) -> Callable[[Path, Path], None]:
    def run(folder: Path, _out: Path) -> None:
        path = folder / "features.tsv"
        each = -(-path.stat().st_size // processes)
        parts = [(path, i * each, (i + 1) * each) for i in range(processes)]
        if processes == 1:
            _bare(*parts[0])
            return
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            pool.starmap(_bare, parts)

    return run


def _bare(path: Path, begin: int, end: int) -> None:
    """The rows that begin in a part of the file."""
    with open(path, "rb") as f:
        f.seek(max(begin - 1, 0))
        if begin:
            f.readline()
        while f.tell() < end and (line := f.readline()):
            data = binascii.a2b_base64(line.split(b"\t")[9])
            np.frombuffer(data, "<f4").reshape(-1, 2048).astype(np.float16)


def ours(workers: int) -> Callable[[Path, Path], None]:
    def run(folder: Path, out: Path) -> None:
        settings = BuildSettings("bench", "bench", vocab=_VOCAB, shard_bytes=64 << 20)
        convert(_inputs(folder), out, settings, workers=in_processes(workers))

    return run


_VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", *words(np.random.default_rng(0))]


def webdataset(folder: Path, out: Path) -> None:
    import webdataset as wds

    out.mkdir()
    with wds.ShardWriter(f"{out}/%06d.tar", maxsize=64 << 20, verbose=0) as writer:
        for record in records(_inputs(folder)):
            sample: dict[str, Any] = {"__key__": record_key(record.image)}
            for member in MEMBERS:
                if member is RECORD:
                    sample[member.suffix] = record_json(record)
                elif getattr(record, member.name) is not None:
                    sample[member.suffix] = member.payload(record)
            writer.write(sample)


def mosaicml(folder: Path, out: Path) -> None:
    import peers

    columns = dict.fromkeys(("features", "document", "boxes", "labels"), "bytes")
    streaming = peers.streaming()
    with streaming.MDSWriter(out=str(out), columns=columns, size_limit="64mb") as writer:
        for record in records(_inputs(folder)):
            writer.write(peers.fields(record))


def litdata(workers: int) -> Callable[[Path, Path], None]:
    def run(folder: Path, out: Path) -> None:
        from litdata import optimize

        with open(folder / "features.tsv", "rb") as f:
            count = sum(1 for _ in f)
        optimize(
            fn=_Slice(folder, count, workers),
            inputs=list(range(workers)),
            output_dir=str(out),
            chunk_bytes="64MB",
            num_workers=workers,
        )

    return run


class _Slice:
    """Every n-th record, for one of n workers: each reads its own rows alone."""

    def __init__(self, folder: Path, count: int, workers: int) -> None:
        self.folder, self.count, self.workers = folder, count, workers

    def __call__(self, worker: int) -> Iterator[dict[str, bytes]]:
        size = -(-self.count // self.workers)
        names = [f"image{i}" for i in range(worker * size, min((worker + 1) * size, self.count))]
        inputs = _inputs(self.folder)
        only = Inputs(inputs.features, inputs.sentences, only=frozenset(names))
        import peers

        for record in records(only):
            yield peers.fields(record)


ARMS: dict[str, Callable[[Path, Path], None]] = {
    "bare, 1 process": bare(1),
    "bare, 2 processes": bare(2),
    "lxscale, 1 process": ours(1),
    "lxscale, 2 processes": ours(2),
    "webdataset ShardWriter": webdataset,
    "mosaicml-streaming MDSWriter": mosaicml,
    "litdata optimize, 1 worker": litdata(1),
    "litdata optimize, 2 workers": litdata(2),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=12_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", action="store_true", help="without others' writers")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        began = time.monotonic()
        ARMS[args.arm](args.folder, args.folder / "out")
        print(f"took {time.monotonic() - began}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(folder, args.images)
        size = (folder / "features.tsv").stat().st_size
        names = [n for n in ARMS if not args.alone or n.startswith(("bare", "lxscale"))]
        rates: dict[str, list[float]] = {name: [] for name in names}
        for number in range(args.rounds + 1):  # the first warms up
            for name in names:
                seconds = _run(folder, name)
                if number:
                    rates[name].append(args.images / seconds)
            print(f"round {number} of {args.rounds}", file=sys.stderr, flush=True)
    text = _report(args.images, size, rates)
    print(text)
    if args.out:
        args.out.write_text(text)


def _run(folder: Path, arm: str) -> float:
    """Seconds of an arm in a process of its own, its start not counted."""
    import os

    shutil.rmtree(folder / "out", ignore_errors=True)
    command = [sys.executable, __file__, "--arm", arm, "--folder", str(folder)]
    done = subprocess.run(command, env={**os.environ, **THREADS}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arm} failed: {done.stderr[-2000:]}")
    return float(next(x for x in done.stdout.splitlines() if x.startswith("took ")).split()[1])


def _report(images: int, size: int, rates: dict[str, list[float]]) -> str:
    median = {name: statistics.median(found) for name, found in rates.items()}
    base, one = median["bare, 1 process"], median["lxscale, 1 process"]
    rows = [
        [
            name,
            f"{rate:,.0f}",
            f"{min(rates[name]):,.0f} to {max(rates[name]):,.0f}",
            f"{rate * size / images / 1e6:,.0f}",
            f"{rate / base:.2f}",
            f"{rate / one:.2f}",
        ]
        for name, rate in median.items()
    ]
    header = ["", "images/s", "spread", "MB/s of TSV", "of bare", "of ours, 1 process"]
    return (
        f"# Making shards, {date.today()}\n\n{machine()}; {images:,} images, {size / 1e9:.1f} GB "
        f"of TSV (`benchmarks/convert.py`)\n\n{markdown(header, rows)}"
    )


if __name__ == "__main__":
    main()

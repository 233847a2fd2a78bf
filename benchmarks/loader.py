"""The data line beside other loaders, on this machine and in one run:

    python benchmarks/loader.py [--quick] [--images N] [--cold] [--out FILE]

Everyone reads the same records of 36 x 2048 fp16 with boxes, labels and sentences from the page
cache and makes batches of 256 pairs. Two columns: `stacked` is a peer at its very best, records
read and features stacked to one array; `ready` adds what a model needs (sentence chosen, tokenised
and masked, objects masked, all of it stacked) as its users do it, by a map over samples. Ours is
always ready, through the functions that training uses. The bare gather copies random records row
by row out of the mapped tars, and does nothing else: the bound.

--cold adds reading from object storage (see cold.py; needs Ceph's gateway on this machine).
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np

import cold
import peers
from protocol import Contestant, Length, Result, machine, markdown, measure
from shards.dataset import Dataset, open_dataset
from shards.format.build import BuildSettings, build
from shards.format.manifest import given_file
from shards.format.tokenizer import load_tokenizer
from shards.order.settings import SamplerSettings
from synthetic import DIM, FEATURE_BYTES, OBJECTS, records
from trainer.data.batch import BatchSettings
from trainer.data.loader import RankSlice, load_steps
from trainer.sections import LoaderSettings

BATCH = 256
ENDLESS = 10**15  # pairs: no run gets there

OURS, OURS_WORKERS, OURS_TWO = "lxscale", "lxscale, 2 loader workers", "lxscale, 2 ranks"
BARE, BARE_TWO = "bare gather", "bare gather, 2 processes"
BEST, STEPS, FRESH = "stacked", "ready", "fresh"  # columns; fresh: a new array for each batch
IN_RAM = "in RAM as LXMERT's release"


# --- contestants --------------------------------------------------------------------------------


def ours(folder: Path, workers: int, rank: int, processes: int) -> Mapping[str, Iterator[int]]:
    """What a training process does for its batches, as one of `processes` ranks."""
    data = open_dataset(str(folder), folder.parent / "cache")
    return {STEPS: batches(data, workers, RankSlice(rank, processes, 1), ENDLESS)}


def batches(
    data: Dataset, workers: int, part: RankSlice, total: int, window: int = 0
) -> Iterator[int]:
    """Batches of 256 pairs a rank until all ranks have `total`; yields their sizes."""
    sampler = data.sampler(SamplerSettings(window=window), 1)
    masks = BatchSettings(1, 0.15, 0.15, 2, 3, 4, data.manifest.schema.vocab_size)
    loader = LoaderSettings(loader_workers=workers)
    step = BATCH * part.world
    for loaded in load_steps(data, sampler, masks, part, sampler.start(), step, total, loader):
        if loaded.missing:
            raise SystemExit(loaded.missing.message)
        pairs = loaded.batches[0].pairs
        del loaded  # as training does: its memory is free for the next
        yield pairs


def bare(folder: Path, rank: int, processes: int) -> Mapping[str, Iterator[int]]:
    """Random records copied row by row from the mapped tars: the least that any loader does."""
    data = open_dataset(str(folder), folder.parent / "cache")
    paths = [data.shards.path(i) for i in range(len(data.manifest.shards))]
    tars = [np.memmap(path, dtype=np.uint8, mode="r") for path in paths]
    count = len(data.index.image_objects)
    rng = np.random.default_rng(rank)

    def gather(kept: np.ndarray | None) -> Iterator[int]:
        while True:
            out = np.empty((BATCH, FEATURE_BYTES), dtype=np.uint8) if kept is None else kept
            images = rng.integers(0, count, BATCH)
            shards = data.shard_of_image(images).tolist()
            offsets = data.index.offset["features"][images].tolist()
            for i, (shard, offset) in enumerate(zip(shards, offsets, strict=True)):
                out[i] = tars[shard][offset : offset + FEATURE_BYTES]
            yield BATCH

    return {BEST: gather(np.empty((BATCH, FEATURE_BYTES), dtype=np.uint8)), FRESH: gather(None)}


def peer(index: int, folder: Path, vocab: Path, rank: int, _: int) -> Mapping[str, Iterator[int]]:
    samples = peers.STREAMED[index].samples(folder)
    return {
        BEST: peers.stacked(samples, BATCH),
        STEPS: peers.ready(samples, BATCH, load_tokenizer(vocab)),
    }


def in_ram(images: int, vocab: Path, rank: int, _: int) -> Mapping[str, Iterator[int]]:
    loader = peers.InRam(images, load_tokenizer(vocab).get_vocab())
    return {BEST: loader.stacked(BATCH), STEPS: loader.ready(BATCH)}


def contestants(images: int, root: Path) -> list[Contestant]:
    """Everyone, with the formats built under `root`."""
    shards = root / "shards"
    build(records(images), shards, BuildSettings("bench", "random", shard_bytes=64 << 20))
    vocab = given_file(shards, "vocab")
    both = (BEST, STEPS)
    found = [
        Contestant(OURS, ours, (shards, 0), (STEPS,)),
        Contestant(BARE, bare, (shards,), (BEST, FRESH)),
        Contestant(IN_RAM, in_ram, (images, vocab), both),
    ]
    for i, one in enumerate(peers.STREAMED):
        folder = root / one.folder
        if one.build:
            folder.mkdir()
            one.build(images, folder)
        found.append(Contestant(one.name, peer, (i, folder, vocab), both))
    return [
        *found,
        Contestant(OURS_WORKERS, ours, (shards, 2), (STEPS,)),
        Contestant(OURS_TWO, ours, (shards, 0), (STEPS,), processes=2),
        Contestant(BARE_TWO, bare, (shards,), (BEST, FRESH), processes=2),
    ]


# --- tables -------------------------------------------------------------------------------------

Results = dict[tuple[str, str], Result]


def side_by_side(results: Results) -> str:
    """The peers in one process. Ratios are ours, ready, over theirs."""
    own = results[OURS, STEPS]
    rows = [[OURS, "", f"{own.rate:,.0f}", own.spread, f"{np.median(own.cores):.2f}", "", "1"]]
    for name in dict.fromkeys(n for n, _ in results):
        if (name, BEST) not in results or (name, STEPS) not in results:
            continue
        best, steps = results[name, BEST], results[name, STEPS]
        rows.append(
            [
                name,
                f"{best.rate:,.0f}",
                f"{steps.rate:,.0f}",
                best.spread,
                f"{np.median(best.cores):.2f}",
                f"**{own.rate / best.rate:.2f}**",
                f"{own.rate / steps.rate:.2f}",
            ]
        )
    header = [
        "one process",
        "stacked, records/s",
        "ready, pairs/s",
        "least to most (stacked; ours ready)",
        "cores",
        "ours ready / its stacked",
        "ours ready / its ready",
    ]
    return markdown(header, rows)


def against_the_bound(results: Results) -> str:
    """Ours over a bare gather by as many processes, and what a second one adds."""
    rows = []
    for name, bound in ((OURS, BARE), (OURS_WORKERS, BARE_TWO), (OURS_TWO, BARE_TWO)):
        own = results[name, STEPS].rate
        kept, fresh = results[bound, BEST].rate, results[bound, FRESH].rate
        rows.append(
            [
                name,
                f"{own:,.0f}",
                f"{own / results[OURS, STEPS].rate:.2f}",
                f"{kept:,.0f}",
                f"{own / kept:.2f}",
                f"{fresh:,.0f}",
                f"{own / fresh:.2f}",
            ]
        )
    header = [
        "ours",
        "ready, pairs/s",
        "over one process",
        "bare gather into one buffer",
        "ratio",
        "bare gather into a new one each",
        "ratio",
    ]
    scaling = results[BARE_TWO, BEST].rate / results[BARE, BEST].rate
    return (
        markdown(header, rows)
        + f"\nTwo bare gathers together make {scaling:.2f} times one: what this machine's memory "
        "allows any two readers.\n"
    )


def flops_per_pair(tokens: int = 20, objects: int = 36) -> float:
    """Floating-point operations of one training step per pair, LXMERT at its base size.

    A weight matrix of a x b costs 2ab per position that it is applied to. With h = 768:
      BERT layer, per position     4 of h x h (q, k, v, out), 2 of h x 4h (FFN): 24 h^2
                                   and 4 n h for scores and sums over n positions
      cross layer, per position    as above with a cross-attention before it: 32 h^2
                                   and 4 (n_self + n_other) h
      language: 9 layers over T tokens; objects: 5 over O; cross: 5 over both, T + O
      embedding of an object       2 (2048 + 4) h
      heads                        LM: (h x h, h x 30522) per token;
                                   objects: h x h, h x (1600 + 400 + 2048) per object;
                                   answers: h x 2h, 2h x 9500 once; pooler h x h
    The backward pass costs twice the forward: the sum is taken 3 times.
    """
    h, t, o = 768, tokens, objects
    language = 9 * t * (24 * h * h + 4 * t * h)
    visual = 5 * o * (24 * h * h + 4 * o * h) + o * 2 * (2048 + 4) * h
    cross = 5 * (t + o) * (32 * h * h + 4 * (t + o) * h)
    heads = t * 2 * h * (h + 30522) + o * 2 * h * (h + 1600 + 400 + 2048)
    once = 2 * h * h + 2 * h * 2 * h + 2 * 2 * h * 9500
    return 3.0 * (language + visual + cross + heads + once)


def feed(results: Results, mfu: float = 0.4, peak: float = 989e12) -> str:
    """What one GPU eats, estimated, beside what one core here delivers.

    peak: FLOP/s of H100 SXM and H200 in dense bf16; mfu: the share of it that training reaches.
    """
    need = mfu * peak / flops_per_pair()
    own = results[OURS, STEPS].rate
    moved = need * FEATURE_BYTES / 1e9
    return (
        f"A training step costs {flops_per_pair() / 1e9:.1f} GFLOP a pair (20 tokens, {OBJECTS} "
        f"objects, base size). At an assumed {mfu:.0%} of {peak / 1e12:.0f} TFLOP/s (dense bf16 of "
        f"an H100 SXM or H200) one GPU takes {need:,.0f} pairs/s: an estimate, not a measurement. "
        f"That is {moved:.2f} GB/s of features ({OBJECTS} x {DIM} fp16 a pair). One core here "
        f"makes {own:,.0f} pairs/s ready: **{need / own:.2f} cores a GPU**.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=6000, help="0.15 MB each; default 6000")
    parser.add_argument("--quick", action="store_true", help="short runs, three rounds: a look")
    parser.add_argument("--cold", action="store_true", help="also from object storage")
    parser.add_argument("--gateway", type=Path, default=cold.GATEWAY, help="script that starts it")
    parser.add_argument("--folder", type=Path, help="for the data (default: temporary)")
    parser.add_argument("--out", type=Path, help="write the tables there, too")
    given = parser.parse_args()
    length = Length(0.5, 10, 3) if given.quick else Length()
    say = partial(print, flush=True)

    root = Path(tempfile.mkdtemp(prefix="lxscale-bench-", dir=given.folder))
    try:
        say(f"writing {given.images} images in each format")
        results = measure(contestants(given.images, root), length, say)
        parts = [
            f"# Loaders, {date.today()}, {machine()}\n",
            f"{given.images} images of {OBJECTS} x {DIM} fp16 in the page cache, batches of "
            f"{BATCH}; medians of {length.rounds} runs of at least {length.seconds:g} s and "
            f"{length.batches} batches each, contestants in turn.\n",
            side_by_side(results),
            against_the_bound(results),
            feed(results),
        ]
        if given.cold:
            parts.append(cold.report(root, given.gateway, length.rounds, batches, say))
    finally:
        shutil.rmtree(root, ignore_errors=True)
    text = "\n".join(parts)
    print("\n" + text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()

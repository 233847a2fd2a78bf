"""`lxscale shards plan`: what a shuffle window, lanes, visits and a cache limit cost and give."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from shards.dataset import Dataset
from shards.order.draws import I64
from shards.order.lookahead import working_set
from shards.order.sampler import Sampler
from shards.order.settings import SamplerSettings
from shards.order.shuffle_quality import Storage, measured, predicted

_BATCHES = 200  # that are looked at for each measurement
_WINDOWS = 500  # of an epoch that are looked at, at most
_NODES = (1, 2, 4, 8, 64)


def plan_report(
    data: Dataset,
    windows: list[int],
    lanes: list[int],
    visits: list[int],
    batch: int,
    in_flight: int,
    limit: int | None,
    seed: int = 0,
) -> Iterator[str]:
    """Lines to print, as they are found. batch: pairs of a step; in_flight: steps that loader
    workers keep ready; limit: bytes of the node's cache.

    Needs the tables only, no tar; a few numbers for each pair are in memory at one time.
    """
    manifest = data.manifest
    sizes = manifest.shards.size
    yield (
        f"{manifest.name}: {manifest.images:,} images, {manifest.pairs:,} pairs, "
        f"{len(sizes):,} shards of {_gib(sizes.mean())}, {_gib(sizes.sum())} in all\n"
    )
    yield from _costs(data, sizes, windows, batch * (1 + in_flight), limit, seed)
    yield from _reads(data, sizes, windows, lanes, seed)
    yield from _mixing(data, windows, lanes, visits, batch, seed)


def _costs(
    data: Dataset, sizes: I64, windows: list[int], pairs: int, limit: int | None, seed: int
) -> Iterator[str]:
    """What each window takes of a cache and of the store, with so many pairs under way."""
    yield f"{'window':>8} {'working set':>12} {'to begin':>12}  fits the cache"
    for window in windows:
        sampler = data.sampler(SamplerSettings(window=window), seed)
        need = working_set(sampler, sizes, pairs)
        order = sampler.order(0, 0)
        begin = sizes[order.shard_order[: order.window]].sum()
        fits = "no limit given" if limit is None else "yes" if limit >= need else "no"
        yield f"{window or 'all':>8} {_gib(need):>12} {_gib(begin):>12}  {fits}"
    total = int(sizes.sum())
    later = "nothing"
    if limit is not None and limit < total:
        later = f"at least {_gib(total - limit)} an epoch"
    yield f"\nfrom the store: {_gib(total)} in the first epoch, then {later}\n"


def _reads(
    data: Dataset, sizes: I64, windows: list[int], lanes: list[int], seed: int
) -> Iterator[str]:
    """What nodes read of the store in an epoch, all of them together."""
    yield "read from the store in an epoch by all nodes, where none keeps a shard for the next one"
    yield f"{'window':>8} {'lanes':>6} " + " ".join(f"{f'{n} nodes':>12}" for n in _NODES)
    for window in windows:
        for count in lanes:
            sampler = data.sampler(SamplerSettings(window=window, lanes=count), seed)
            read = " ".join(f"{_gib(_read_by(sampler, sizes, n)):>12}" for n in _NODES)
            yield f"{window or 'all':>8} {count:>6} {read}"
    yield ""


def _read_by(sampler: Sampler, sizes: I64, nodes: int) -> float:
    """Bytes of an epoch's shards that so many nodes read, each of them those of its lanes."""
    total = 0.0
    for i in range(len(sampler.streams)):
        order = sampler.order(i, 0)
        looked_at = range(0, order.windows, -(-order.windows // _WINDOWS))
        read = sum(
            int(sizes[order.lane_shards(w, *sampler.lanes_of(n, nodes))].sum())
            for w in looked_at
            for n in range(nodes)
        )
        total += read * order.windows / len(looked_at)
    return total


def _mixing(
    data: Dataset, windows: list[int], lanes: list[int], visits: list[int], batch: int, seed: int
) -> Iterator[str]:
    """How well each window and number of sentences per visit shuffles, and what a batch holds."""
    yield (
        f"batches of {batch} by window, lanes and sentences per visit (predicted / measured on "
        f"{_BATCHES} of them)"
    )
    yield (
        f"{'window':>8} {'lanes':>6} {'visit':>6} {'images a batch':>19} {'features':>12} "
        f"{'same-image couples':>20} {'lag-1 correlation':>19}"
    )
    index = data.index
    storage = Storage(index.image_of.astype(np.int64), index.shard_pair)
    row = float(index.image_objects.mean()) * data.manifest.schema.feature_dim * 2
    for window, count, k in product(windows, lanes, visits):
        settings = SamplerSettings(window=window, lanes=count, sentences_per_visit=k)
        order = data.sampler(settings, seed).order(0, 0)
        b = measured(storage, order, batch, _BATCHES)
        shown = [f"{b.images:.1f}", f"{b.same_image:.1f}", f"{b.lag1:.3f}"]
        if count == 1:
            a = predicted(storage, order, batch)
            promised = [f"{a.images:.1f}", f"{a.same_image:.1f}", f"{a.lag1:.3f}"]
            shown = [f"{x} / {y}" for x, y in zip(promised, shown, strict=True)]
        yield (
            f"{window or 'all':>8} {count:>6} {k:>6} {shown[0]:>19} {_mib(b.images * row):>12} "
            f"{shown[1]:>20} {shown[2]:>19}"
        )


def _gib(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else _mib(count)


def _mib(count: float) -> str:
    return f"{count / 2**20:,.2f} MiB"

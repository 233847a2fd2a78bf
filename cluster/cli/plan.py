"""`lxscale shards plan`: what a shuffle window, visits and a cache limit cost and give."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from shards.dataset import Dataset
from shards.order.draws import I64
from shards.order.lookahead import working_set
from shards.order.settings import SamplerSettings
from shards.order.shuffle_quality import Storage, measured, predicted

_BATCHES = 200  # that are looked at for each measurement


def plan_report(
    data: Dataset,
    windows: list[int],
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
    sizes = np.asarray([shard.size for shard in manifest.shards])
    yield (
        f"{manifest.name}: {manifest.images:,} images, {manifest.pairs:,} pairs, "
        f"{len(sizes):,} shards of {_gib(sizes.mean())}, {_gib(sizes.sum())} in all\n"
    )
    yield from _costs(data, sizes, windows, batch * (1 + in_flight), limit, seed)
    yield from _mixing(data, windows, visits, batch, seed)


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


def _mixing(
    data: Dataset, windows: list[int], visits: list[int], batch: int, seed: int
) -> Iterator[str]:
    """How well each window and number of sentences per visit shuffles, and what a batch holds."""
    yield (
        f"batches of {batch} by window and sentences per visit (predicted / measured on "
        f"{_BATCHES} of them)"
    )
    yield (
        f"{'window':>8} {'visit':>6} {'images a batch':>19} {'features':>12} "
        f"{'same-image couples':>20} {'lag-1 correlation':>19}"
    )
    index = data.index
    storage = Storage(index.image_of.astype(np.int64), index.shard_pair)
    row = float(index.image_objects.mean()) * data.manifest.schema.feature_dim * 2
    for window in windows:
        for k in visits:
            settings = SamplerSettings(window=window, sentences_per_visit=k)
            sampler = data.sampler(settings, seed)
            order = sampler.order(0, 0)
            a, b = predicted(storage, order, batch), measured(storage, order, batch, _BATCHES)
            yield (
                f"{window or 'all':>8} {k:>6} {f'{a.images:.1f} / {b.images:.1f}':>19} "
                f"{_mib(b.images * row):>12} {f'{a.same_image:.1f} / {b.same_image:.1f}':>20} "
                f"{f'{a.lag1:.3f} / {b.lag1:.3f}':>19}"
            )


def _gib(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else _mib(count)


def _mib(count: float) -> str:
    return f"{count / 2**20:,.2f} MiB"

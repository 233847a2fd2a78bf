"""Planned and actual shares: of the pairs, how many come from each set and serve each objective."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from model.batch import Batch
from shards.dataset import Dataset
from shards.order.apportionment import shares_of
from shards.order.lookahead import rates
from shards.order.streams import FAMILIES, SamplerSettings, Stream


def planned_mixture(
    settings: SamplerSettings, streams: tuple[Stream, ...], data: Dataset
) -> dict[str, float]:
    """Name -> share of the pairs consumed, in the long run.

    source/… and set/…: pairs of a source set and, of several, a data set. objective/masked,
    matching, qa: pairs that serve it; qa counts matched pairs with an answer in the table.
    mismatched: pairs with another image's sentence.
    """
    m, manifest = data.index, data.manifest
    sources, parts = len(manifest.sources), len(data.shard_ranges)
    part_of = np.repeat(np.arange(parts), np.diff(data.dataset_pairs))
    cell = part_of * sources + m.source
    pairs = np.bincount(cell, minlength=parts * sources).reshape(parts, sources)
    has_answer = np.diff(m.answer_start) > 0
    answered = np.bincount(cell[has_answer], minlength=parts * sources).reshape(parts, sources)
    families = shares_of(settings.families)
    out: defaultdict[str, float] = defaultdict(float)
    for stream, rate in zip(streams, rates(settings, streams), strict=True):
        family = FAMILIES[stream.family] if settings.mode == "alternating" else "all"
        bad = settings.mismatch if family in ("all", "matching") else 0.0
        out["mismatched"] += rate * bad
        for s in stream.sources:
            here = rate * pairs[stream.part, s] / stream.pairs
            out[f"source/{manifest.sources[s]}"] += here
            if parts > 1:
                out[f"set/{data.shard_ranges[stream.part].name}"] += here
        if family in ("all", "qa"):
            share = answered[stream.part, list(stream.sources)].sum() / stream.pairs
            out["objective/qa"] += rate * (1 - bad) * share
    for i, family in enumerate(FAMILIES[:2]):
        out[f"objective/{family}"] = float(families[i]) if settings.mode == "alternating" else 1.0
    return dict(out)


def count_mixture(names: list[str], micro: list[Batch], family: str, data: Dataset) -> list[float]:
    """The pairs of this rank's micro-batches that each of `planned_mixture`'s names counts."""
    out: defaultdict[str, float] = defaultdict(float)
    sources = data.manifest.sources
    for batch in micro:
        for s, pairs in enumerate(np.bincount(batch.source.numpy(), minlength=len(sources))):
            out[f"source/{sources[s]}"] += int(pairs)
        if len(data.shard_ranges) > 1:
            parts = np.bincount(batch.dataset.numpy(), minlength=len(data.shard_ranges))
            for p, pairs in enumerate(parts):
                out[f"set/{data.shard_ranges[p].name}"] += int(pairs)
        out["mismatched"] += int((batch.matched == 0).sum())
        out["objective/masked"] += batch.pairs * (family in ("all", "masked"))
        out["objective/matching"] += batch.pairs * (family in ("all", "matching"))
        out["objective/qa"] += len(batch.answer_pair) * (family in ("all", "qa"))
    return [out[name] for name in names]

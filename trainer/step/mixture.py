"""Mixture statistics: what share of the pairs comes from each set and serves each objective.

TensorBoard shows the planned shares beside those of the pairs that were really trained on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.batch import Batch
from model.objectives import OBJECTIVES
from shards.dataset import Dataset
from shards.order.sampler import Sampler


def _families() -> dict[str, bool]:
    """The families of objectives, and whether only pairs with an answer can serve them."""
    families: dict[str, bool] = {}
    for objective in OBJECTIVES.values():
        answers = objective.needs == "answers"
        families[objective.family] = families.get(objective.family, True) and answers
    return families


@dataclass(frozen=True)
class Mixture:
    """What is counted, and what is planned of it."""

    planned: dict[str, float]
    """Share of the pairs consumed in the long run, by name:
    source/… and set/…: pairs of a source set and, of several, a data set;
    objective/…: pairs that serve a family of objectives (matched pairs with an answer in the
    table where it takes that); mismatched: pairs with another image's sentence."""
    sources: tuple[str, ...]
    datasets: tuple[str, ...]

    def count(self, batches: Sequence[Batch], family: str) -> list[float]:
        """Pairs of this rank's micro-batches of a step that each of `planned`'s names counts."""
        out: defaultdict[str, float] = defaultdict(float)
        for batch in batches:
            _add(out, "source", self.sources, batch.source.numpy())
            if len(self.datasets) > 1:
                _add(out, "set", self.datasets, batch.dataset.numpy())
            out["mismatched"] += int((batch.matched == 0).sum())
            for name, answers_only in _families().items():
                serving = len(batch.answer_pair) if answers_only else batch.pairs
                out[f"objective/{name}"] += serving * (family in ("all", name))
        return [out[name] for name in self.planned]


def _add(out: dict[str, float], kind: str, names: Sequence[str], of: NDArray[np.int64]) -> None:
    for name, pairs in zip(names, np.bincount(of, minlength=len(names)).tolist(), strict=True):
        out[f"{kind}/{name}"] += pairs


def plan_mixture(sampler: Sampler, data: Dataset) -> Mixture:
    """The mixture that a sampler makes of its data in the long run."""
    sources, datasets = data.manifest.sources, tuple(r.name for r in data.shard_ranges)
    pairs, answered = data.pairs_by_set(), data.answered_by_set()
    out = defaultdict(float, {f"objective/{name}": 0.0 for name in _families()})
    for stream, rate in zip(sampler.streams, sampler.rates, strict=True):
        family = sampler.families[stream.family]
        bad = 0.0 if family.mismatch == "never" else sampler.settings.mismatch
        out["mismatched"] += rate * bad
        for s in stream.sources:
            here = rate * pairs[stream.dataset, s] / stream.pairs
            out[f"source/{sources[s]}"] += here
            if len(datasets) > 1:
                out[f"set/{datasets[stream.dataset]}"] += here
        for name, answers_only in _families().items():
            if family.name in ("all", name):
                share = 1.0
                if answers_only:
                    own = answered[stream.dataset, list(stream.sources)].sum() / stream.pairs
                    share = (1 - bad) * own
                out[f"objective/{name}"] += rate * share
    return Mixture(dict(out), sources, datasets)

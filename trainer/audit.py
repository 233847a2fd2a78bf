"""What a run consumed, proved: its journal is re-derived from the data set, step by step.

The journal (trainer/checkpoint/journal.py) says how many pairs each step took and a digest of what
the ranks really trained on. The order, the sampler and all that is drawn for a pair are pure
functions, so each digest can be computed anew; then the pairs are counted, epoch by epoch, against
the manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.dataset import Dataset, DatasetSpec, open_dataset
from shards.errors import DataError
from shards.order.keys import VERSIONS
from shards.order.sampler import Sampler, SamplerState
from shards.order.settings import SamplerSettings
from shards.progress import Progress, no_progress
from trainer.checkpoint.generations import find_generation
from trainer.checkpoint.journal import SegmentHead, StepLine, read_segments
from trainer.data.batch import BatchSettings, draw_batch, settings_of
from trainer.data.digest import digest
from trainer.errors import ConfigError


@dataclass
class Audit:
    lines: list[str] = field(default_factory=list)
    """What was found."""
    problems: list[str] = field(default_factory=list)
    """What does not hold; empty where the journal is proved."""


@dataclass
class _Replay:
    """A data set with what the steps so far have taken of it."""

    data: Dataset
    sampler: Sampler
    drawn: BatchSettings
    digest: int
    """Version of the segment's digests."""
    seen: dict[tuple[int, int], NDArray[np.uint8]] = field(default_factory=dict)
    """(stream, epoch) under way -> how often each pair was taken, u8 (pairs,)."""
    strange: dict[tuple[int, int], int] = field(default_factory=dict)
    """(stream, epoch) -> pairs of sources that are none of the stream's."""
    whole: dict[int, int] = field(default_factory=dict)
    """Stream -> epochs that are over and had every pair once."""
    passed_over: dict[tuple[int, int], int] = field(default_factory=dict)
    """(stream, epoch) -> pairs of skipped shards."""


def audit(
    run: str,
    data: list[str] | None = None,
    cache: str | None = None,
    progress: Progress = no_progress,
) -> Audit:
    """Audit a run's folder or URL, or the manifest of one of its checkpoints.

    data: where its data sets are now, if elsewhere. Raises CheckpointError, DataError or
    ConfigError where the journal or the data set cannot be read or is another one.
    """
    generation = find_generation(run)
    out = Audit()
    replay: _Replay | None = None
    state: SamplerState | None = None
    step, steps = 0, 0
    worlds: list[int] = []
    total = generation.step
    journal = generation.manifest.journal
    order: dict[str, Any] | None = None
    newest = next((head for head, _ in read_segments(generation.run_url, journal[-1:])), None)
    for head, lines in read_segments(generation.run_url, journal):
        if order != _order_of(head):
            order = _order_of(head)
            if replay is not None:
                out.lines.append(f"from step {step + 1}: another data state, by override")
                _count_open_epochs(replay, out)
            replay, state = _replay(head, data or _places(head, newest or head), cache), None
        assert replay is not None
        replay.drawn, replay.digest = _drawn(replay.data, head), head.digest
        if state is None and not step and head.start.consumed:
            out.problems.append(f"the journal begins at {head.start.consumed} pairs, not at 0")
        elif state is not None and state != head.start:
            out.problems.append(f"step {step + 1} does not go on from where step {step} ended")
        state = head.start
        for line in lines:
            if line.step != step + 1 and steps:
                out.problems.append(f"step {line.step} follows on step {step}")
            step, steps = line.step, steps + 1
            if not worlds or worlds[-1] != line.world:
                worlds.append(line.world)
            state, problem = _replay_step(replay, state, line)
            if problem:
                out.problems.append(f"step {step}: {problem}")
            progress("steps audited", step, total)
    if replay is None or state is None:
        out.problems.append("the run has no journal: it has done no step")
        return out
    _count_open_epochs(replay, out)
    saved = generation.manifest.sampler
    if step != total or saved != state:
        out.problems.append(
            f"the journal ends at step {step} with {state.consumed} pairs, the checkpoint is at "
            f"step {total} with {saved.consumed}"
        )
    shown = ", ".join(map(str, worlds))
    out.lines.insert(0, f"{generation.url}: {steps:,} steps on {shown} workers, in order")
    for shard, since in state.skipped:
        name = replay.data.shards.files[shard].url
        out.lines.append(f"passed over since {since:,} pairs: {name} (data.on_error=skip)")
    if state.skipped:
        out.lines.append(f"pairs passed over: {state.skipped_pairs:,}")
    return out


def _order_of(head: SegmentHead) -> dict[str, Any]:
    """What of the data state decides which pairs come when: all but what is masked of them."""
    return {k: v for k, v in head.data_state.items() if not k.startswith("objectives.")}


def _places(head: SegmentHead, newest: SegmentHead) -> tuple[str, ...]:
    """Where a segment's data sets are: where the run had them last, as they may have been moved, or
    where the segment had them if the last are others."""
    same = newest.data_state["manifest"] == head.data_state["manifest"]
    return newest.data if same else head.data


def _replay(head: SegmentHead, urls: Sequence[str], cache: str | None) -> _Replay:
    state = head.data_state
    if state["order"] not in VERSIONS:
        raise ConfigError(
            f"the run used version {state['order']} of the order, this lxscale has {VERSIONS}: "
            "audit it with the version that trained it"
        )
    weights = state["data.weights"]
    if len(urls) != len(weights):
        raise ConfigError(f"the run used {len(weights)} data sets: give --data as many URLs")
    specs = [DatasetSpec(u, w) for u, w in zip(urls, weights, strict=True)]
    try:
        data = open_dataset(specs, cache, text=state.get("data.text", "all"))
    except DataError as error:
        raise DataError(f"{error}; if it has been moved, name its place with --data") from None
    if data.manifest.fingerprint != state["manifest"]:
        raise ConfigError(
            f"{data.url} is not the data set of the run: its fingerprint is "
            f"{data.manifest.fingerprint[:12]}…, the run's {state['manifest'][:12]}…; name the "
            "right one with --data"
        )
    prefix = "sampler."
    given = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    settings = SamplerSettings.model_validate(given)
    sampler = data.sampler(settings, state["run.seed"], state["order"])
    return _Replay(data, sampler, _drawn(data, head), head.digest)


def _drawn(data: Dataset, head: SegmentHead) -> BatchSettings:
    state = head.data_state
    tokens, objects = (state[f"objectives.{key}"] for key in ("token_mask", "object_mask"))
    return settings_of(data, state["run.seed"], tokens, objects, state["order"])


def _replay_step(
    replay: _Replay, state: SamplerState, line: StepLine
) -> tuple[SamplerState, str | None]:
    """The state after a step of the journal, and what is wrong with the step."""
    data, sampler, count = replay.data, replay.sampler, line.pairs
    step = sampler.step(state, count)
    planned = sampler.plan(step)
    own = planned.without(line.skipped)
    drawn = draw_batch(data, sampler, own, replay.drawn, line.skipped)
    batch, own = drawn.batch, drawn.plan
    pair = batch.pair_id.numpy()
    found = digest(batch, state.consumed, replay.digest)
    problem = None
    if found != line.digest:
        problem = (
            "trained on other pairs, words, masks or answers than the order's "
            f"({line.digest:016x}, not {found:016x})"
        )
    for stream, epoch in sorted(set(zip(own.stream.tolist(), own.epoch.tolist(), strict=True))):
        rows = (own.stream == stream) & (own.epoch == epoch)
        seen = replay.seen.get((stream, epoch))
        if seen is None:
            seen = replay.seen[stream, epoch] = np.zeros(data.manifest.pairs, dtype=np.uint8)
        np.add.at(seen, pair[rows], 1)
        sources = sampler.streams[stream].sources
        odd = int((~np.isin(batch.source.numpy()[rows], sources)).sum())
        replay.strange[stream, epoch] = replay.strange.get((stream, epoch), 0) + odd
    if line.skipped:
        lost = planned.take(np.flatnonzero(np.isin(planned.shard, line.skipped)))
        for stream, epoch in zip(lost.stream.tolist(), lost.epoch.tolist(), strict=True):
            missing = replay.passed_over
            missing[stream, epoch] = missing.get((stream, epoch), 0) + 1
    fresh = [(s, state.consumed) for s in line.skipped if s not in state.skipped_shards]
    after = replace(
        step.after,
        skipped=(*state.skipped, *fresh),
        skipped_pairs=state.skipped_pairs + count - len(own),
    )
    for i, stream_ in enumerate(sampler.streams):
        # Epochs that are over are checked and forgotten: memory does not grow with the run.
        for epoch in [
            e for s, e in replay.seen if s == i and e < after.cursors[i] // stream_.pairs
        ]:
            problem = _check_epoch(replay, i, epoch) or problem
    return after, problem


def _check_epoch(replay: _Replay, stream: int, epoch: int) -> str | None:
    """Whether a finished epoch holds each of its stream's pairs once."""
    seen, expected = replay.seen.pop((stream, epoch)), replay.sampler.streams[stream]
    lost = replay.passed_over.get((stream, epoch), 0)
    name = f"epoch {epoch} of stream {expected.name}"
    strange = replay.strange.pop((stream, epoch), 0)
    if int(seen.max()) > 1 or strange:
        return f"{name}: {int((seen > 1).sum())} pairs more than once, {strange} of other streams"
    if int(seen.sum()) + lost != expected.pairs:
        return f"{name}: {int(seen.sum()):,} of {expected.pairs:,} pairs"
    replay.whole[stream] = replay.whole.get(stream, 0) + (lost == 0)
    return None


def _count_open_epochs(replay: _Replay, out: Audit) -> None:
    """Say what is known of each stream, the epochs under way included."""
    for i, stream in enumerate(replay.sampler.streams):
        whole = replay.whole.get(i, 0)
        text = f"stream {stream.name}: {whole} whole epochs of {stream.pairs:,} pairs, each once"
        lost = {e: n for (s, e), n in replay.passed_over.items() if s == i}
        if lost:
            text += f"; {sum(lost.values()):,} pairs passed over in {len(lost)} epochs"
        for _, epoch in [key for key in replay.seen if key[0] == i]:
            seen = replay.seen.pop((i, epoch))
            text += f"; epoch {epoch}: {int(seen.sum()):,} so far"
            if seen.max() > 1:
                out.problems.append(f"epoch {epoch} of stream {stream.name} repeats pairs")
            else:
                text += ", none twice"
        out.lines.append(text)

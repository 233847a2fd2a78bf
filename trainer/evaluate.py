"""Metrics of a model over a data set: every objective's loss and accuracy, answers per source set.

Two passes. The masked objectives and matching are measured on pairs as training sees them (masks,
half of them mismatched, drawn with a fixed seed); QA on every question with an answer in the table,
and what fine-tuning trains on every question, unmasked, with its own image.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from model.batch import Batch
from model.lxmert import ModelOutput
from model.objectives.base import LossSettings
from shards.dataset import Dataset
from shards.errors import DataError
from shards.order.keys import VERSION
from shards.order.lookahead import working_set
from shards.order.sampler import Sampler
from shards.order.settings import SamplerSettings
from trainer.data.batch import BatchSettings
from trainer.data.loader import RankSlice, load_steps
from trainer.ranks import all_reduce_sum, rank_and_world
from trainer.sections import LoaderSettings

log = logging.getLogger("lxscale")

# Draws of validation are the same in every run, whatever its seed.
VALIDATION_SEED = 2019

# Objectives whose predictions are answers -> the field of a batch with the pairs that they answer.
_ANSWERED = {"qa": "answer_pair", "answers": "question_pair", "statement": "question_pair"}

Forward = Callable[[Batch, frozenset[str]], ModelOutput]
"""(batch on the CPU, active objectives) -> sums, without gradient."""


@dataclass(frozen=True)
class Answered:
    """A question with what a model answers."""

    id: str | int | None
    """Of the question, where it has one."""
    image: str
    question: str
    source: str
    kind: str | None
    objects: int
    """Of its image."""
    answers: Mapping[str, float] | None
    """True ones with their scores, as the source had them."""
    answer: str
    score: float
    """Of the answer."""


@dataclass(frozen=True)
class Evaluation:
    """What is measured, and how."""

    data: Dataset
    batch: BatchSettings
    objectives: frozenset[str]
    batch_size: int
    """Pairs over all ranks."""
    blind: bool = False
    """All features zero, which leaves the language prior."""
    answered: Callable[[list[Answered], int], None] | None = None
    """Called with what each batch of questions was answered, and how many pairs it has, in an order
    that follows from the data set alone."""
    done: int = 0
    """Pairs of questions that are passed over, from the first one on: whole batches."""
    every_sentence: bool = False
    """Ask every sentence, not the question sources' alone: those of a test set have no answers."""


def without_gradient(model: Any, device: torch.device, losses: LossSettings) -> Forward:
    """The forward of a model or an engine for `evaluate`; the caller puts it in evaluation mode."""

    @torch.no_grad()
    def forward(batch: Batch, objectives: frozenset[str]) -> ModelOutput:
        out: ModelOutput = model(batch.to(device), objectives, losses)
        return out

    return forward


def evaluate(forward: Forward, task: Evaluation) -> dict[str, float]:
    """Run both passes over this rank's slices; the metrics of the whole, equal on every rank."""
    metrics: dict[str, float] = {}
    masked = task.objectives - set(_ANSWERED)
    if masked:
        metrics |= _masked_pass(forward, task, masked)
    for name in sorted(task.objectives & set(_ANSWERED)):
        metrics |= answer_questions(forward, task, name)
    return metrics


def _batches(
    task: Evaluation, sampler: Sampler, drawn: BatchSettings, done: int = 0
) -> Iterator[Batch]:
    """This rank's part of one epoch; every rank gets equally many batches, some perhaps empty.
    done: pairs that are passed over."""
    state = sampler.start()
    for step in sampler.steps_ahead(state, task.batch_size, done):
        state = step.after
    steps = load_steps(
        task.data,
        sampler,
        drawn,
        RankSlice(*rank_and_world(), accumulation=1),
        state,
        task.batch_size,
        sampler.streams[0].pairs,
        LoaderSettings(),
    )
    for loaded in steps:
        if loaded.missing:
            raise DataError(loaded.missing.message)
        (batch,) = loaded.batches
        if task.blind:
            batch = replace(
                batch,
                features=torch.zeros_like(batch.features),
                swap_features=torch.zeros_like(batch.swap_features),
            )
        yield batch


def _all_pairs(data: Dataset, order: int = VERSION) -> Sampler:
    """order: its version."""
    return data.sampler(SamplerSettings(window=1), VALIDATION_SEED, order)


def evaluation_bytes(data: Dataset, batch_size: int) -> int:
    """Bytes of the node's cache that an evaluation needs at one time."""
    return working_set(_all_pairs(data), data.shards.remote_sizes, 2 * batch_size)


def _masked_pass(
    forward: Forward, task: Evaluation, objectives: frozenset[str]
) -> dict[str, float]:
    names = sorted(objectives)
    sums = torch.zeros(3, len(names), dtype=torch.float64)
    classified: set[str] = set()
    drawn = replace(task.batch, seed=VALIDATION_SEED)
    for batch in _batches(task, _all_pairs(task.data, drawn.order), drawn):
        out = forward(batch, objectives)
        classified |= out.correct.keys()
        for i, name in enumerate(names):
            sums[0, i] += float(out.loss_sum[name])
            sums[1, i] += float(out.count[name])
            if name in out.correct:
                sums[2, i] += float(out.correct[name])
    all_reduce_sum(sums)
    metrics = {}
    for i, name in enumerate(names):
        loss, count, correct = sums[:, i].tolist()
        metrics[f"loss/{name}"] = loss / max(count, 1)
        if name in classified:
            metrics[f"accuracy/{name}"] = correct / max(count, 1)
    return metrics


def questions(data: Dataset, order: int = VERSION, every_sentence: bool = False) -> Sampler:
    """All pairs of the question sources, or of all, with their own sentences, as one stream. order:
    its version."""
    manifest = data.manifest
    asked = manifest.sources if every_sentence else manifest.question_sources
    if not asked:
        raise DataError(
            f"{data.url} has no question with an answer: there is nothing to measure (`lxscale "
            "predict` answers without)"
        )
    others = {s: 0.0 for s in manifest.sources if s not in asked}
    settings = SamplerSettings(window=1, mismatch=0.0, source_weights=others)
    return data.sampler(settings, VALIDATION_SEED, order)


def answer_questions(forward: Forward, task: Evaluation, name: str) -> dict[str, float]:
    """Have the questions answered by an objective. Accuracy = the score of the predicted answer,
    mean over questions (VQA's soft accuracy where scores are soft, exact match where they are 1);
    for `qa` over those with an answer in the table."""
    manifest = task.data.manifest
    drawn = replace(task.batch, seed=VALIDATION_SEED, token_mask=0.0, object_mask=0.0)
    m = task.data.index
    kinds = len(manifest.sources)
    score, asked = np.zeros(kinds), np.zeros(kinds)
    loss = np.zeros(2)
    told = _Told(task.data) if task.answered else None
    sampler = questions(task.data, drawn.order, task.every_sentence)
    unlabelled = 0
    for batch in _batches(task, sampler, drawn, task.done):
        out = forward(batch, frozenset({name}))
        loss += [float(out.loss_sum[name]), float(out.count[name])]
        predicted = out.prediction[name].cpu().numpy()
        rows = getattr(batch, _ANSWERED[name])
        in_order = batch.offset[rows].argsort()
        pairs = rows[in_order]
        found: list[Answered] = []
        for pair, source, answer in zip(
            batch.pair_id[pairs].tolist(),
            batch.source[pairs].tolist(),
            predicted[in_order.numpy()].tolist(),
            strict=True,
        ):
            span = slice(int(m.answer_start[pair]), int(m.answer_start[pair + 1]))
            hit = float(m.answer_score[span][m.answer_id[span] == answer].sum())
            if told:
                found.append(told.of(pair, answer, hit))
                if found[-1].answers is None:  # nobody has said what is right
                    unlabelled += 1
                    continue
            score[source] += hit
            asked[source] += 1
        if task.answered:
            task.answered(found, batch.pairs)
    if unlabelled and not task.every_sentence:
        log.warning("%d questions have no answers, and are not measured", unlabelled)
    sums = torch.from_numpy(np.concatenate([score, asked, loss]))
    all_reduce_sum(sums)
    score, asked, loss = np.split(sums.numpy(), [kinds, 2 * kinds])
    metrics = {
        f"loss/{name}": loss[0] / max(loss[1], 1),
        f"accuracy/{name}": score.sum() / max(asked.sum(), 1),
    }
    for i, source in enumerate(manifest.sources):
        if asked[i] and len(manifest.question_sources) > 1:
            metrics[f"accuracy/{name}/{source}"] = score[i] / asked[i]
    return {name: float(value) for name, value in metrics.items()}


class _Told:
    """Questions in words: those of one shard at a time, as they come in their shards' order."""

    def __init__(self, data: Dataset) -> None:
        self._data, self._answers = data, data.answers()
        self._shard, self._records = -1, dict[int, dict[str, Any]]()

    def of(self, pair: int, answer: int, score: float) -> Answered:
        data = self._data
        image = int(data.image_of(np.asarray([pair]))[0])
        record = self._record(image)
        sentence = record["sentences"][pair - int(data.index.image_pair[image])]
        return Answered(
            id=sentence.get("id"),
            image=record["image"],
            question=sentence["text"],
            source=sentence["source"],
            kind=sentence.get("kind"),
            objects=record["num_objects"],
            answers=sentence.get("answers"),
            answer=self._answers[answer],
            score=score,
        )

    def _record(self, image: int) -> dict[str, Any]:
        shard = int(self._data.shard_of_image(np.asarray([image]))[0])
        if shard != self._shard:
            self._shard, self._records = shard, {}
        if image not in self._records:
            self._records[image] = {"num_objects": 0, **json.loads(self._data.record(image))}
        return self._records[image]

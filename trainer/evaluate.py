"""Metrics of a model over a data set: every objective's loss and accuracy, QA per source set.

Two passes. The masked objectives and matching are measured on pairs as training sees them (masks,
half of them mismatched, drawn with a fixed seed); QA on every question with an answer in the
table, unmasked, with its own image.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from model.batch import Batch
from model.lxmert import PreTrainingOutput
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

# Draws of validation are the same in every run, whatever its seed.
VALIDATION_SEED = 2019

Forward = Callable[[Batch, frozenset[str]], PreTrainingOutput]
"""(batch on the CPU, active objectives) -> sums, without gradient."""


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
    predict: Callable[[dict[str, Any]], None] | None = None
    """Called with each question's image, text, id where it has one, and predicted answer."""


def without_gradient(model: Any, device: torch.device, losses: LossSettings) -> Forward:
    """The forward of a model or an engine for `evaluate`; the caller puts it in evaluation mode."""

    @torch.no_grad()
    def forward(batch: Batch, objectives: frozenset[str]) -> PreTrainingOutput:
        out: PreTrainingOutput = model(batch.to(device), objectives, losses)
        return out

    return forward


def evaluate(forward: Forward, task: Evaluation) -> dict[str, float]:
    """Run both passes over this rank's slices; the metrics of the whole, equal on every rank."""
    metrics: dict[str, float] = {}
    masked = task.objectives - {"qa"}
    if masked:
        metrics |= _masked_pass(forward, task, masked)
    if "qa" in task.objectives:
        metrics |= _qa_pass(forward, task)
    return metrics


def _batches(task: Evaluation, sampler: Sampler, drawn: BatchSettings) -> Iterator[Batch]:
    """This rank's part of one epoch; every rank gets equally many batches, some perhaps empty."""
    steps = load_steps(
        task.data,
        sampler,
        drawn,
        RankSlice(*rank_and_world(), accumulation=1),
        sampler.start(),
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


def _questions(data: Dataset, order: int) -> Sampler:
    """All pairs of the question sources, with their own sentences, as one stream. order: its
    version."""
    manifest = data.manifest
    others = {s: 0.0 for s in manifest.sources if s not in manifest.question_sources}
    settings = SamplerSettings(window=1, mismatch=0.0, source_weights=others)
    return data.sampler(settings, VALIDATION_SEED, order)


def _qa_pass(forward: Forward, task: Evaluation) -> dict[str, float]:
    """Accuracy = the score of the predicted answer, mean over questions (VQA's soft accuracy
    where scores are soft, exact match where they are 1)."""
    manifest = task.data.manifest
    drawn = replace(task.batch, seed=VALIDATION_SEED, token_mask=0.0, object_mask=0.0)
    m = task.data.index
    kinds = len(manifest.sources)
    score, asked = np.zeros(kinds), np.zeros(kinds)
    loss = np.zeros(2)
    answers = task.data.answers() if task.predict else []
    for batch in _batches(task, _questions(task.data, drawn.order), drawn):
        out = forward(batch, frozenset({"qa"}))
        loss += [float(out.loss_sum["qa"]), float(out.count["qa"])]
        predicted = out.prediction["qa"].cpu().numpy()
        asked_in = batch.offset[batch.answer_pair].argsort()
        pairs = batch.answer_pair[asked_in]
        for pair, source, answer in zip(
            batch.pair_id[pairs].tolist(),
            batch.source[pairs].tolist(),
            predicted[asked_in.numpy()].tolist(),
            strict=True,
        ):
            span = slice(int(m.answer_start[pair]), int(m.answer_start[pair + 1]))
            hit = m.answer_id[span] == answer
            score[source] += float(m.answer_score[span][hit].sum())
            asked[source] += 1
            if task.predict:
                task.predict(_prediction(task.data, pair, answers[answer]))
    sums = torch.from_numpy(np.concatenate([score, asked, loss]))
    all_reduce_sum(sums)
    score, asked, loss = np.split(sums.numpy(), [kinds, 2 * kinds])
    metrics = {
        "loss/qa": loss[0] / max(loss[1], 1),
        "accuracy/qa": score.sum() / max(asked.sum(), 1),
    }
    for i, name in enumerate(manifest.sources):
        if asked[i] and len(manifest.question_sources) > 1:
            metrics[f"accuracy/qa/{name}"] = score[i] / asked[i]
    return {name: float(value) for name, value in metrics.items()}


def _prediction(data: Dataset, pair: int, answer: str) -> dict[str, Any]:
    image = int(data.image_of(np.asarray([pair]))[0])
    record = json.loads(data.record(image))
    sentence = record["sentences"][pair - int(data.index.image_pair[image])]
    found = {"image": record["image"], "question": sentence["text"], "answer": answer}
    if "id" in sentence:
        found = {"question_id": sentence["id"], **found}
    return found

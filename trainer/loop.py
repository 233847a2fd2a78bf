"""Training: restore, then steps of batch, counts, forward, backward, update, log, save.

Runs in every worker; torch.distributed must be up. Nothing here knows who placed the workers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import yaml

from model.batch import Batch
from model.interchange import load_weights_for
from model.losses import PreTrainingOutput
from model.lxmert import LxmertForPreTraining, init_weights
from shards.dataset import Dataset, open_dataset
from shards.order.draws import fold
from shards.order.sampler import (
    SamplerState,
    advance,
    family_of,
    next_count,
    start_state,
    steps_ahead,
)
from shards.order.streams import SamplerSettings, Stream
from shards.store import objects
from shards.store.retry import Retry
from trainer import setup
from trainer.checkpoint.attempts import claim_attempt
from trainer.checkpoint.format import RunDescription
from trainer.checkpoint.generations import Generation
from trainer.checkpoint.journal import Journal, StepLine
from trainer.checkpoint.restore import check_data_state, parameter_shapes, restore, set_masters
from trainer.checkpoint.saver import Saver
from trainer.config import FAMILY_OBJECTIVES, ConfigError, RunConfig
from trainer.data.loader import Loaded, MissingShard, RankSlice, load_steps
from trainer.evaluate import Evaluation, evaluate, evaluation_bytes
from trainer.progress import Progress, setup_logging
from trainer.step.engine import all_reduce_sum, build_engine, set_learning_rate
from trainer.step.mixture import planned_mixture
from trainer.step.optimizer import learning_rate
from trainer.step.sync import look_around, skip, skip_report

log = logging.getLogger("lxscale")

_DROPOUT = 100  # purpose of draws; shards and batches use lower ones


@dataclass(frozen=True)
class Control:
    """What the placement gives to the loop.

    should_stop: polled each step on every rank, never blocks; all ranks then stop at one step,
    save and return.
    """

    should_stop: Callable[[], bool] = lambda: False


def train(config: RunConfig, control: Control) -> dict[str, Any]:
    """Train to the end of the run, going on from its newest whole checkpoint.

    Returns {"step", "consumed", "stopped", "metrics", "pairs", "seconds"}: "stopped" when
    should_stop ended it early; pairs and seconds of this attempt's steps.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    setup_logging(rank)
    deadline = Retry().deadline
    if config.cluster.process_group_timeout_s <= deadline:
        raise ConfigError(
            f"cluster.process_group_timeout_s={config.cluster.process_group_timeout_s:g} is not "
            f"above the store's deadline of {deadline:g} s, which the others wait: "
            "raise it, or lower LXSCALE_STORE_DEADLINE"
        )
    url = setup.run_url(config)
    attempt = _agree(lambda: claim_attempt(url))

    data = setup.open_training_data(config)
    settings = config.sampler.settings(config.run.seed)
    streams = setup.data_streams(settings, data)
    weights = setup.resolve_objectives(config, data)
    validation = None
    if config.data.validation:
        validation = open_dataset(config.data.validation, config.data.cache, data.shards.limit)
        setup.check_same_tables(
            validation, data.manifest.vocab.sha256, data.manifest.answers.sha256
        )
    batch_settings = setup.batch_settings(config, data)

    model_config = setup.resolve_model(config, data)
    resolved = config.model_copy(update={"model": model_config}).model_dump(mode="json")
    model = LxmertForPreTraining(model_config)
    init_weights(model, config.run.seed)
    if config.train.init_from:
        load_weights_for(model, config.train.init_from)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    shapes = parameter_shapes(model)
    engine = build_engine(model, config)
    if config.train.precision == "bf16":
        set_masters(engine, first)
    del first

    generation = restore(engine, url, shapes)
    now = setup.data_state(config, data)
    state, step = _position(generation, config, now, settings, streams)
    pairs = data.manifest.pairs
    length = setup.run_length(config, pairs, step, state.consumed)
    if rank == 0:
        _announce(config, url, attempt, world, step, length, data)
        _describe_run(resolved, url, data)

    journal = None
    if rank == 0:
        segments = generation.manifest.journal if generation else ()
        journal = Journal(tuple(p.url for p in data.specs), now, segments, state)
    description = RunDescription(
        world_size=world,
        zero_stage=config.train.zero_stage,
        parameters=shapes,
        config=resolved,
        data_state=now,
        objectives=weights,
        vocab_sha256=data.manifest.vocab.sha256,
        answers_sha256=data.manifest.answers.sha256,
    )
    saved_step = generation.step if generation else None
    saver = Saver(url, attempt, config.checkpoint.keep, description, journal, saved_step)
    progress = Progress(config, attempt, step, length.steps) if rank == 0 else None

    def validate() -> dict[str, float]:
        if validation is None:
            return {}
        metrics = _validate(engine, config, validation, weights)
        if progress:
            progress.validation(step, metrics)
        return metrics

    share = RankSlice(rank, world, config.train.accumulation)
    planned = planned_mixture(settings, streams, data)
    beside = evaluation_bytes(validation, config.train.validation_batch) if validation else 0

    def load() -> Generator[Loaded, None, None]:
        return load_steps(
            data,
            settings,
            streams,
            batch_settings,
            share,
            state,
            config.train.global_batch,
            length.total,
            setup.loader_settings(config),
            beside,
        )

    batches = load()
    stopped, validated, metrics = False, -1, {}
    trained_pairs, trained_seconds = 0, 0.0
    while state.consumed < length.total:
        count = next_count(settings, streams, state, config.train.global_batch, length.total)
        family = family_of(settings, state)
        began = time.monotonic()
        micro = next(batches)
        waited = time.monotonic() - began

        active = {
            name: w
            for name, w in weights.items()
            if name in FAMILY_OBJECTIVES[family]
            and (name != "qa" or state.consumed >= config.objectives.qa_from_epoch * pairs)
        }
        seen = look_around(
            micro, active, config, list(planned), family, data, state, control.should_stop()
        )
        if seen.trouble:
            state = skip(config, data, state, seen.trouble)
            batches.close()
            batches = load()
            continue
        if seen.stop:
            stopped = True
            break
        assert not isinstance(micro, MissingShard)
        counts = seen.counts
        rate = learning_rate(config.optimizer, state.consumed, count, length.total)
        set_learning_rate(engine, rate)
        seed = fold(config.run.seed, _DROPOUT, step, rank)
        sums = train_step(engine, micro, active, counts, config, seed)
        del micro  # the next is made in its memory

        state = advance(settings, streams, state, count)
        state = replace(state, skipped_pairs=state.skipped_pairs + count - seen.pairs)
        step += 1
        if journal:
            skipped = tuple(shard for shard, _ in state.skipped)
            journal.add(StepLine(step, count, world, seen.digest, skipped), state)
        seconds = time.monotonic() - began
        trained_pairs += count
        trained_seconds += seconds
        if progress:
            values = {f"loss/{name}": sums[name] / max(counts[name], 1.0) for name in active}
            values["loss"] = sum(active[name] * values[f"loss/{name}"] for name in active)
            values["lr"] = rate
            values["epoch"] = state.consumed / pairs
            progress.shares(planned, seen.shares, count)
            progress.step(step, values, count, seconds, waited)
        if step % config.checkpoint.every == 0:
            saver.save(engine, step, state)
        if config.train.validate_every and step % config.train.validate_every == 0:
            metrics, validated = validate(), step
    saver.save(engine, step, state)
    saver.wait(must_succeed=True)
    if rank == 0 and state.skipped:
        log.warning("%s", skip_report(state))
    if not stopped and validated != step:
        metrics = validate()
    if progress:
        progress.close()
    return {
        "step": step,
        "consumed": state.consumed,
        "stopped": stopped,
        "metrics": metrics,
        "pairs": trained_pairs,
        "seconds": trained_seconds,
    }


def _position(
    generation: Generation | None,
    config: RunConfig,
    now: dict[str, Any],
    settings: SamplerSettings,
    streams: tuple[Stream, ...],
) -> tuple[SamplerState, int]:
    """Where in the data the run stands, and how many steps it has done."""
    fresh = start_state(streams)
    if generation is None:
        return fresh, 0
    saved = generation.manifest.data_state
    check_data_state(saved, now, config.checkpoint.override_data_state)
    state = generation.manifest.sampler
    if any(saved.get(k) != v for k, v in now.items() if k.startswith(("sampler.", "data."))):
        # Overridden: as if the run had used this sampler from its start.
        done, batch = state.consumed, config.train.global_batch
        for before, count in steps_ahead(settings, streams, fresh, batch, done):
            fresh = advance(settings, streams, before, count)
        return fresh, generation.step
    if state.skipped and dist.get_rank() == 0:
        log.warning("%s", skip_report(state))
    return state, generation.step


def train_step(
    engine: Any,
    micro: list[Batch],
    weights: dict[str, float],
    counts: dict[str, float],
    config: RunConfig,
    seed: int,
) -> dict[str, float]:
    """One optimizer step over this rank's micro-batches; the loss sums over all ranks.

    The loss of an objective is its sum over the global batch / max(global count, 1), so it does
    not depend on how pairs are spread over ranks and micro-batches.
    """
    device = engine.device
    world = dist.get_world_size()
    engine.train()
    total = torch.zeros(len(weights), device=device)
    # DeepSpeed averages gradients over the ranks: undo it, the counts are global already.
    scale = torch.tensor(
        [w * world / max(counts[name], 1.0) for name, w in weights.items()], device=device
    )
    for i, batch in enumerate(micro):
        torch.manual_seed(fold(seed, i) >> 1)
        out = _forward(engine, batch.to(device), frozenset(weights), config)
        sums = torch.stack([out.loss_sum[name] for name in weights])
        engine.backward((scale * sums).sum(), scale_wrt_gas=False)
        engine.step()
        total += sums.detach()
    return dict(zip(weights, all_reduce_sum(total.double()).tolist(), strict=True))


def _forward(
    engine: Any, batch: Batch, objectives: frozenset[str], config: RunConfig
) -> PreTrainingOutput:
    out: PreTrainingOutput = engine(
        batch,
        objectives=objectives,
        label_scope=config.objectives.label_scope,
        feature_loss=config.objectives.feature_loss,
    )
    return out


def _validate(
    engine: Any, config: RunConfig, data: Dataset, weights: dict[str, float]
) -> dict[str, float]:
    def forward(batch: Batch, objectives: frozenset[str]) -> PreTrainingOutput:
        with torch.no_grad():
            return _forward(engine, batch.to(engine.device), objectives, config)

    engine.eval()
    return evaluate(
        forward,
        Evaluation(
            data,
            setup.batch_settings(config, data),
            frozenset(weights),
            config.train.validation_batch,
        ),
    )


def _agree(on_rank_0: Callable[[], Any]) -> Any:
    """Run on rank 0 and tell all; an error of rank 0's is raised on every rank."""
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = on_rank_0()
        except Exception as error:
            told[1] = error
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
    return told[0]


def _announce(
    config: RunConfig,
    url: str,
    attempt: int,
    world: int,
    step: int,
    length: setup.Length,
    data: Dataset,
) -> None:
    manifest = data.manifest
    log.info(
        "run %s, attempt %d | %d workers, ZeRO %d, %s | %s: %d images, %d pairs | step %d of %d",
        url,
        attempt,
        world,
        config.train.zero_stage,
        config.train.precision,
        manifest.name,
        manifest.images,
        manifest.pairs,
        step,
        length.steps,
    )
    if absent := setup.absent_objectives(config, data):
        log.info("left out, as the data set has no labels for them: %s", ", ".join(absent))


def _describe_run(resolved: dict[str, Any], url: str, data: Dataset) -> None:
    """Make the run's folder self-contained: resolved configuration, vocabulary, answer table."""
    text = yaml.safe_dump(resolved, sort_keys=False)
    objects.write_bytes(objects.join(url, "config.yaml"), text.encode())
    for info in (data.manifest.vocab, data.manifest.answers):
        objects.write_bytes(objects.join(url, info.file), data.file(info).read_bytes())

"""What a run is made of, derived from its configuration and its data set."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
import yaml

from model.config import ModelConfig
from model.objectives import objectives_of
from shards.dataset import Dataset, open_dataset
from shards.format.manifest import Manifest
from shards.order.keys import VERSION, VERSIONS
from shards.order.modes import MODES
from shards.order.settings import SamplerSettings
from shards.store import create, objects
from shards.store.retry import Retry
from trainer.checkpoint.format import RunDescription
from trainer.checkpoint.generations import Generation
from trainer.config import RunConfig, divisors
from trainer.data.batch import BatchSettings, settings_of
from trainer.errors import ConfigError
from trainer.tasks import TASKS

log = logging.getLogger("lxscale")

CONFIG_FILE = "config.yaml"
"""The resolved configuration, in a run's folder."""


def run_url(config: RunConfig) -> str:
    return objects.join(config.run.storage, config.run.name)


def check_timeouts(config: RunConfig) -> None:
    """ConfigError unless a rank that waits for the store is waited for by the others."""
    deadline = Retry().deadline
    if config.cluster.process_group_timeout_s <= deadline:
        raise ConfigError(
            f"cluster.process_group_timeout_s={config.cluster.process_group_timeout_s:g} is not "
            f"above the store's deadline of {deadline:g} s, which the others wait: "
            "raise it, or lower LXSCALE_STORE_DEADLINE"
        )


def micro_batches(config: RunConfig, world: int) -> int:
    """Of a step, for each worker. With fewer workers than there may be each has more, so that none
    is larger than with all of them: memory that suffices for them suffices for fewer. ConfigError
    where train.strict is no multiple of the workers."""
    if parts := config.train.strict:
        if parts % world:
            raise ConfigError(
                f"train.strict={parts} micro-batches are no whole number for each of {world} "
                f"workers: give cluster.workers one of {divisors(parts)}"
            )
        return parts // world
    if config.cluster.fewest == config.cluster.most:
        return config.train.accumulation
    return -(-config.train.accumulation * config.cluster.most // world)


def resolve_model(config: RunConfig, data: Dataset) -> ModelConfig:
    """The model's sizes with those that the data set fixes; ConfigError where both are given and
    differ."""
    schema = data.manifest.schema
    fixed = {
        "vocab_size": schema.vocab_size,
        # Without answers the head is one that nothing trains.
        "num_answers": max(data.manifest.answers.count, 1),
        "feature_dim": schema.feature_dim,
    }
    if schema.labels:
        fixed["num_object_classes"] = schema.num_object_classes
        fixed["num_attribute_classes"] = schema.num_attribute_classes
    for key, value in fixed.items():
        given = getattr(config.model, key)
        if key in config.model.model_fields_set and given != value:
            raise ConfigError(
                f"model.{key}={given}, but the data set {data.url} has {value}: leave the key out "
                "or use another data set"
            )
    if schema.max_tokens > config.model.max_positions:
        raise ConfigError(
            f"model.max_positions={config.model.max_positions}, but sentences of {data.url} have "
            f"up to {schema.max_tokens} tokens: give at least that"
        )
    return ModelConfig.model_validate({**config.model.model_dump(), **fixed})


def check_same_tables(data: Dataset, vocab_sha256: str, answers_sha256: str) -> None:
    """ConfigError unless token and answer ids of a data set mean what they meant in training."""
    for thing, info, trained, option in (
        ("vocabulary", data.manifest.vocab, vocab_sha256, "--vocab"),
        ("answer table", data.manifest.answers, answers_sha256, "--answers"),
    ):
        if info.sha256 != trained:
            raise ConfigError(
                f"{data.url} has another {thing} than the training set: build it with {option} and "
                f"the training set's {info.file}"
            )


def check_records(config: RunConfig, data: Dataset) -> None:
    """ConfigError unless the records of a data set are of as many images as the task's."""
    task, has = TASKS[config.task], 2 if data.manifest.schema.sides else 1
    if has != task.images:
        words = {1: "one image", 2: "two images"}
        example = {1: "vqa or gqa", 2: "nlvr2"}[task.images]
        raise ConfigError(
            f"task {task.name} is about {words[task.images]} a record, and those of {data.url} are "
            f"of {words[has]}: name a data set built from sentences as {example} has them, or "
            "another task"
        )


def check_task(config: RunConfig, data: Dataset) -> None:
    """ConfigError unless a task can be trained on a data set."""
    check_records(config, data)
    task = TASKS[config.task]
    if task.answers is not None and set(data.answers()) != task.answers:
        raise ConfigError(
            f"task {task.name} has the answers {' and '.join(sorted(task.answers))}, and "
            f"{data.url} a table of {data.manifest.answers.count}: build it without --answers, or "
            "with those of the task's training set"
        )
    if task.fine_tunes and not data.manifest.question_sources:
        raise ConfigError(
            f"task {task.name} needs questions with answers, and {data.url} has none: build it "
            "with the files of annotations"
        )


def sampler_settings(config: RunConfig, data: Dataset) -> SamplerSettings:
    """Those of the configuration; in fine-tuning, unless they say otherwise, of questions alone."""
    settings, manifest = config.sampler, data.manifest
    if not TASKS[config.task].fine_tunes or settings.source_weights:
        return settings
    others = {s: 0.0 for s in manifest.sources if s not in manifest.question_sources}
    return settings.model_copy(update={"source_weights": others})


def epoch_pairs(config: RunConfig, manifests: Sequence[Manifest]) -> int:
    """Pairs of an epoch of the data: in fine-tuning those of questions."""
    if not TASKS[config.task].fine_tunes:
        return sum(m.pairs for m in manifests)
    asked = [(m, s) for m in manifests for s in m.question_sources]
    weights = config.sampler.source_weights
    return sum(m.counts.sentences[s] for m, s in asked if weights.get(s, 1.0) > 0)


def absent_objectives(config: RunConfig, data: Dataset) -> list[str]:
    """Objectives that have a weight and that the data set has no labels for."""
    has = {"labels": data.manifest.schema.labels, "answers": bool(data.answered_by_set().any())}
    table, weights = TASKS[config.task].objectives, objective_weights(config)
    return [n for n, o in table.items() if o.needs and not has[o.needs] and weights[n] > 0]


def objective_weights(config: RunConfig) -> dict[str, float]:
    """Name -> weight of every objective of the task."""
    task = TASKS[config.task]
    return dict.fromkeys(task.objectives, 1.0) if task.fine_tunes else config.objectives.weights()


def resolve_objectives(config: RunConfig, data: Dataset) -> dict[str, float]:
    """Weights of the objectives that are trained; ConfigError when none is left."""
    absent = absent_objectives(config, data)
    weights = {n: w for n, w in objective_weights(config).items() if w > 0 and n not in absent}
    if not weights:
        raise ConfigError(
            "no objective is left: give a weight to one that this data set has labels for"
        )
    if TASKS[config.task].fine_tunes:
        return weights
    for family in MODES[config.sampler.mode](config.sampler):
        served = objectives_of(family.name)
        trained = [name for name in served if name in weights]
        if family.share and not trained:
            raise ConfigError(
                f"no objective is trained in the sampler's {family.name} steps: set "
                f"sampler.families.{family.name}=0, or give one a weight ({', '.join(served)})"
            )
        if family.share and trained == ["qa"] and config.objectives.qa_from_epoch > 0:
            raise ConfigError(
                f"objectives.qa_from_epoch={config.objectives.qa_from_epoch:g} leaves no objective "
                f"for the sampler's {family.name} steps before: set it to 0, or give another "
                "objective a weight"
            )
    return weights


def batch_settings(config: RunConfig, data: Dataset, order: int = VERSION) -> BatchSettings:
    masks, questions = config.objectives, TASKS[config.task].fine_tunes
    return settings_of(data, config.run.seed, masks.token_mask, masks.object_mask, order, questions)


def open_training_data(config: RunConfig) -> Dataset:
    limit = config.data.cache_limit_gb
    return open_dataset(
        config.data.specs(),
        config.data.cache,
        None if limit is None else int(limit * 2**30),
        config.data.text,
    )


def open_validation_data(config: RunConfig, training: Dataset) -> Dataset | None:
    if not config.data.validation:
        return None
    data = open_dataset(config.data.validation, config.data.cache, training.shards.limit)
    check_task(config, data)
    check_same_tables(data, training.manifest.vocab.sha256, training.manifest.answers.sha256)
    return data


def order_version(found: Sequence[Generation | str]) -> int:
    """The version of the order that a run goes on with: that of its newest generation."""
    newest = next((g.manifest for g in found if isinstance(g, Generation)), None)
    version = newest.data_state.get("order") if newest else VERSION
    return version if version in VERSIONS else VERSION


def data_state(config: RunConfig, data: Dataset, order: int) -> dict[str, Any]:
    """Everything that the stream of batches depends on, beside the sampler's integers. order: its
    version."""
    state: dict[str, Any] = {
        "manifest": data.manifest.fingerprint,
        "order": order,
        "run.seed": config.run.seed,
        "data.weights": [p.weight for p in data.specs],
        "data.text": data.text,
    }
    state |= {f"sampler.{k}": v for k, v in config.sampler.model_dump(mode="json").items()}
    for key in ("token_mask", "object_mask"):
        state[f"objectives.{key}"] = getattr(config.objectives, key)
    return state


def describe(
    config: RunConfig,
    data: Dataset,
    objectives: dict[str, float],
    shapes: dict[str, list[int]],
    order: int,
) -> RunDescription:
    """What every generation says of its run. config: with the model's resolved sizes; order: the
    version of its order."""
    return RunDescription(
        world_size=dist.get_world_size(),
        zero_stage=config.train.zero_stage,
        parameters=shapes,
        config=config.model_dump(mode="json"),
        data_state=data_state(config, data, order),
        objectives=objectives,
        vocab_sha256=data.manifest.vocab.sha256,
        answers_sha256=data.manifest.answers.sha256,
    )


def announce(
    config: RunConfig,
    url: str,
    attempt: int,
    world: int,
    step: int,
    length: Length,
    data: Dataset,
) -> None:
    """Log what is about to be trained."""
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
    if absent := absent_objectives(config, data):
        log.info("left out, as the data set has no labels for them: %s", ", ".join(absent))


def write_run_files(config: RunConfig, url: str, data: Dataset) -> None:
    """Make the run's folder self-contained: resolved configuration, vocabulary, answer table."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    objects.write_bytes(objects.join(url, CONFIG_FILE), text.encode())
    for info in (data.manifest.vocab, data.manifest.answers):
        objects.write_bytes(objects.join(url, info.file), data.file(info).read_bytes())


def note_run(config: RunConfig, retry: Retry | None = None) -> None:
    """Write what was set of a run's configuration to its place, unless there is one: who looks
    after the run can begin it from there, too."""
    where = objects.join(run_url(config), CONFIG_FILE)
    text = yaml.safe_dump(config.given(), sort_keys=False)
    create.create_bytes(where, text.encode(), retry)


@dataclass(frozen=True)
class Length:
    """Of a whole run, with what is done."""

    total: int
    """Pairs."""
    steps: int
    """Optimizer steps."""


def run_length(config: RunConfig, pairs: int, done_steps: int, consumed: int) -> Length:
    """The length of a run of which some steps are done, perhaps with another global batch."""
    batch, steps, at = config.train.global_batch, done_steps, consumed
    short = config.sampler.last_batch == "short"

    def to_edge(end: int | None) -> int:
        """Where the steps may go on without a batch that is short for the epoch's end."""
        edge = at + pairs - at % pairs
        return edge if end is None else min(edge, end) if short else end

    if config.train.steps is None:
        assert config.train.epochs is not None
        end = max(round(config.train.epochs * pairs), consumed)
        while at < end:
            edge = to_edge(end)
            steps += -(-(edge - at) // batch)
            at = edge
        return Length(end, steps)
    left = max(config.train.steps - done_steps, 0)
    if not short:
        return Length(at + left * batch, steps + left)
    steps += left
    while left:
        edge = to_edge(None)
        taken = min(left, -(-(edge - at) // batch))
        at, left = min(at + taken * batch, edge), left - taken
    return Length(at, steps)

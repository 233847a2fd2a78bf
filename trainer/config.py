"""The configuration of a run: one typed tree, a YAML file, overrides `key.path=value`.

A key that does not exist or a value that does not fit is a ConfigError that names it. The resolved
tree is stored with the run and in every checkpoint. What the keys are: trainer/sections.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, ValidationError, model_validator
from pydantic_core import ErrorDetails

from model.config import ModelConfig
from shards.order.settings import SamplerSettings
from trainer.errors import ConfigError
from trainer.sections import (
    FORM,
    CheckpointSection,
    ClusterSection,
    DataSection,
    ObjectiveSection,
    OptimizerSection,
    RunSection,
    Section,
    TrainSection,
)
from trainer.tasks import TASKS

# What pre-training makes harder, and fine-tuning leaves as it is.
_UNMASKED = {"sampler": ("mismatch",), "objectives": ("token_mask", "object_mask")}


def _task_name(name: str) -> str:
    if name not in TASKS:
        raise ValueError(f"{json.dumps(name)} is no task: give one of {', '.join(TASKS)}")
    return name


class RunConfig(Section):
    task: Annotated[str, AfterValidator(_task_name)] = "pretrain"
    """What the run is trained for: pretrain, or vqa, gqa, nlvr2 to fine-tune (trainer/tasks). Their
    recipes are in configs/tasks/."""
    run: RunSection = RunSection()
    data: DataSection
    sampler: SamplerSettings = SamplerSettings()
    model: ModelConfig = ModelConfig()
    objectives: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    cluster: ClusterSection = ClusterSection()

    @property
    def world_sizes(self) -> Sequence[int]:
        """How many workers the run may have, ascending: those of cluster.workers that divide
        train.strict."""
        fewest, most, parts = self.cluster.fewest, self.cluster.most, self.train.strict
        if not parts:
            return range(fewest, most + 1)
        return [n for n in range(fewest, min(most, parts) + 1) if parts % n == 0]

    @model_validator(mode="before")
    @classmethod
    def _unmasked(cls, tree: Any) -> Any:
        """In fine-tuning nothing is masked or mismatched unless that is asked for, and refused."""
        task = TASKS.get(str(tree.get("task"))) if isinstance(tree, dict) else None
        if task is None or not task.fine_tunes:
            return tree
        tree = dict(tree)
        for section, keys in _UNMASKED.items():
            given = tree.get(section)
            if given is None or isinstance(given, dict):
                tree[section] = {**dict.fromkeys(keys, 0.0), **(given or {})}
        return tree

    @model_validator(mode="after")
    def _as_the_task_is(self) -> RunConfig:
        task = TASKS[self.task]
        if not task.fine_tunes:
            return self
        for section, keys in _UNMASKED.items():
            for key in keys:
                if getattr(getattr(self, section), key):
                    raise ValueError(
                        f"{section}.{key}: task {self.task} shows every question with its own "
                        "image, and unmasked: leave the key out"
                    )
        if self.sampler.mode != "natural":
            raise ValueError(f"sampler.mode={self.sampler.mode}: task {self.task} needs natural")
        if self.sampler.share_vision > 1 and task.images > 1:
            raise ValueError(f"sampler.share_vision: task {self.task} has two images a pair")
        if self.objectives.label_scope != "masked":
            raise ValueError(f"objectives.label_scope: task {self.task} has no labels to learn")
        if wrong := [name for name, weight in self.objectives.weights().items() if weight != 1]:
            raise ValueError(
                f"objectives.{wrong[0]} is of pre-training, and task {self.task} trains "
                f"{', '.join(task.objectives)} alone: leave the key out"
            )
        return self

    @model_validator(mode="after")
    def _some_world_size(self) -> RunConfig:
        if not self.world_sizes:
            raise ValueError(
                f"train.strict={self.train.strict} is divided by none of "
                f"cluster.workers={self.cluster.workers}: give one of "
                f"{divisors(self.train.strict)} workers"
            )
        return self

    def given(self) -> dict[str, Any]:
        """What was set, as plain data: parse_config gives an equal tree that still knows it."""
        return self.model_dump(mode="json", exclude_unset=True)


def divisors(of: int) -> str:
    """The numbers of workers that train.strict may have, in words; the smallest of many."""
    found = [n for n in range(1, min(of, 1000) + 1) if of % n == 0]
    return ", ".join(map(str, found[:12])) + (", …" if len(found) > 12 or of > 1000 else "")


def parse_config(tree: dict[str, Any], origin: str) -> RunConfig:
    """Validate a configuration tree; a ConfigError names every wrong key and value."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        wrong = "; ".join(_in_words(e) for e in error.errors())
        raise ConfigError(f"{origin}: {wrong}") from None


def _in_words(error: ErrorDetails) -> str:
    """One wrong key, what is expected there, and what there is if that can be shown."""
    parts = [str(part) for part in error["loc"]]
    key = ".".join(p for p in parts if not p.startswith(FORM)) or "(top level)"
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        return f"{key}: no such key"
    if kind == "missing":
        return f"{key}: must be given"
    if kind == "value_error":  # of a validator here, which says it all
        return f"{key}: {error['msg'].removeprefix('Value error, ')}"
    expected = {
        "tuple_type": f"a list is expected, as in [{value if isinstance(value, str) else 'a, b'}]",
        "model_type": "keys are expected, as in {key: value}",
        "dict_type": "keys are expected, as in {key: value}",
    }.get(kind, error["msg"].replace("Input should", "should"))
    scalar = value is None or isinstance(value, str | bool | int | float)
    return f"{key}: {expected}" + (f" (it is {json.dumps(value):.80})" if scalar else "")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply overrides of the form `section.key=value` (value as YAML)."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    return read_config(data, str(path), overrides)


def read_config(data: bytes, origin: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in a YAML file's bytes, with overrides applied. origin: names the file in
    errors."""
    try:
        tree = parse_yaml(data.decode("utf-8-sig")) or {}
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{origin} is not UTF-8 text (line {line}): save it as UTF-8") from None
    except ValueError as error:
        raise ConfigError(f"{origin} is not valid YAML, {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{origin}: expected a mapping of sections at the top level")
    for override in overrides:
        key, eq, value = override.partition("=")
        if not eq or not key:
            raise ConfigError(f"override {override!r}: write it as section.key=value")
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {override!r}: {parent} is not a section")
        try:
            node[last] = parse_yaml(value)
        except ValueError as error:
            raise ConfigError(f"override {override!r}: no valid YAML value, {error}") from None
    return parse_config(tree, origin)


class _Loader(yaml.SafeLoader):
    """Says where a value is that cannot be, as a date of month 13."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            value = f"{node.value:.40}" if isinstance(node, yaml.ScalarNode) else "this"
            problem = f"{value} is no {node.tag.rpartition(':')[2]}"
            if isinstance(error, ValueError):  # the others' words are of its own code
                problem += f" ({error})"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


def parse_yaml(text: str) -> Any:
    """ValueError, one line that begins with line and column, where it is not YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark, context = error.problem_mark, error.context_mark
        what = str(error.problem)
        if context:
            what += f" ({error.context} from {_at(context.line, context.column)} on)"
        if mark:
            what = f"{_at(mark.line, mark.column)}: {what}"
        raise ValueError(" ".join(what.split())) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position].split("\n")
        what = f"the character U+{error.character:04X} is not allowed"
        raise ValueError(f"{_at(len(before) - 1, len(before[-1]))}: {what}") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _at(line: int, column: int) -> str:
    return f"line {line + 1}, column {column + 1}"

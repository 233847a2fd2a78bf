"""Whether a run, as it is configured now, can go on from what it has saved.

What must agree: the model's shapes, the data state, and the settings that say how a step trains.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from model.objectives import OBJECTIVES
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.fast_format import FastManifest
from trainer.checkpoint.format import RunDescription
from trainer.checkpoint.generations import Generation, newest_whole
from trainer.config import RunConfig
from trainer.errors import ConfigError

log = logging.getLogger("lxscale")

_OF_A_STEP = {
    "model": ("num_heads", "dropout", "attention_dropout"),
    "objectives": ("label_scope", "feature_loss", "qa_from_epoch"),
}

# What a data state of an earlier version says by not saying it.
_BEFORE = {"data.text": "all", "sampler.lanes": 1, "sampler.share_vision": 1}


def check_same_model(generation: Generation, shapes: dict[str, list[int]]) -> None:
    """Raise CheckpointError naming the first parameter that differs."""
    saved = generation.manifest.parameters
    for name in sorted(saved.keys() | shapes.keys()):
        if saved.get(name) != shapes.get(name):
            raise CheckpointError(
                f"{generation.url} is a checkpoint of another model: {name} has shape "
                f"{saved.get(name, 'none')} there and {shapes.get(name, 'none')} here; use the "
                "model settings of that run, or another run.name"
            )


def whole_data_state(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved data state with what versions before this one did not write, as they had one way."""
    return _BEFORE | saved


def check_data_state(saved: dict[str, Any], now: dict[str, Any], override: bool) -> None:
    """Refuse to go on with another data set or order, and show what differs."""
    differing = _differing(whole_data_state(saved), now)
    if not differing:
        return
    text = f"the data state of the checkpoint is another one: {differing}"
    if not override:
        raise ConfigError(
            f"{text}. Restore these settings, or set checkpoint.override_data_state=true to go on "
            "with samples possibly lost or repeated"
        )
    if dist.get_rank() == 0:
        log.warning("%s; going on as checkpoint.override_data_state is set", text)


def check_settings(
    found: Sequence[Generation | str], config: RunConfig, objectives: dict[str, float]
) -> None:
    """Refuse to train otherwise than the newest of the run's generations was trained, and show what
    differs; with checkpoint.override_settings, and of what may change freely, say it only.

    found, objectives: as for `restore` and in a manifest.
    """
    newest = newest_whole(found)
    if newest is None:
        return
    task = newest.manifest.config.get("task", "pretrain")
    if task != config.task:
        raise ConfigError(
            f"{newest.run_url} is a run of task {task}, not {config.task}: give this one another "
            f"run.name, and to begin from there train.init_from={newest.run_url}"
        )
    now = config.model_dump(mode="json")
    # Neither pairs nor what is learned of them depend on these, but the learning rate and rounding.
    free = ("steps", "epochs", "global_batch", "precision")
    configs = newest.manifest.config, now
    told = _differing(*({f"train.{k}": c["train"][k] for k in free} for c in configs))
    if told and dist.get_rank() == 0:
        log.info("changed since the checkpoint: %s", told)
    before = step_settings(newest.manifest.config, newest.manifest.objectives)
    after = step_settings(now, objectives)
    both = before.keys() & after.keys()  # an older version may not have had all of them
    differing = _differing({k: before[k] for k in both}, {k: after[k] for k in both})
    if not differing:
        return
    text = f"the checkpoint was trained with other settings: {differing}"
    if not config.checkpoint.override_settings:
        raise ConfigError(
            f"{text}. Restore them, set checkpoint.override_settings=true to go on with the new "
            "ones, or give the run another run.name"
        )
    if dist.get_rank() == 0:
        log.warning("%s; going on as checkpoint.override_settings is set", text)


def unfit(fast: FastManifest, run: RunDescription) -> str:
    """Why a run does not go on from a snapshot, though it is newer than what is on the store; ""
    where it does."""
    then = fast.manifest
    if then.parameters != run.parameters:
        return "it is of another model"
    # Even where that is overridden: the journal's lines since the store's newest were drawn by it.
    if differing := _differing(then.data_state, run.data_state):
        return f"its data state is another one: {differing}"
    before = step_settings(then.config, then.objectives)
    differing = _differing(before, step_settings(run.config, run.objectives))
    if differing and not run.config["checkpoint"]["override_settings"]:
        return f"it was trained with other settings: {differing}"
    # It is newer than the generation that the run is to go on from, but may not come from it.
    asked = [c["checkpoint"].get("resume_from") for c in (then.config, run.config)]
    if asked[0] != asked[1]:
        return f"checkpoint.resume_from was {asked[0]} and is {asked[1]}"
    return ""


def step_settings(config: dict[str, Any], objectives: dict[str, float]) -> dict[str, Any]:
    """The settings of a resolved configuration that decide what a step makes of its pairs, by their
    keys. Sizes of the model are `check_same_model`'s, masks are part of the data state."""
    out = {f"optimizer.{key}": value for key, value in config["optimizer"].items()}
    for section, keys in _OF_A_STEP.items():
        out |= {f"{section}.{key}": config[section][key] for key in keys if key in config[section]}
    out["train.strict"] = config["train"].get("strict", 0)  # before it was a key, no run was
    return out | {f"objectives.{name}": objectives.get(name, 0.0) for name in OBJECTIVES}


def _differing(saved: dict[str, Any], now: dict[str, Any]) -> str:
    """Every key with another value, with both values; "" where there is none."""
    return "; ".join(
        f"{k}: checkpoint {saved.get(k)!r}, now {now.get(k)!r}"
        for k in sorted(saved.keys() | now.keys())
        if saved.get(k) != now.get(k)
    )

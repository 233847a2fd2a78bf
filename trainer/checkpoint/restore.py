"""Bringing a run's newest whole generation back into an engine, at any world size and stage.

What must agree for that is checked here, too: the model's shapes, the data state, and the settings
that say how a step trains.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.objectives import OBJECTIVES
from shards.errors import DataError, StoreError
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.generations import Generation, read_fragments
from trainer.checkpoint.zero_state import list_fragments, refresh_weights, write
from trainer.config import RunConfig
from trainer.errors import ConfigError
from trainer.ranks import gather_objects

log = logging.getLogger("lxscale")

_OF_A_STEP = {
    "model": ("num_heads", "dropout", "attention_dropout"),
    "objectives": ("label_scope", "feature_loss", "qa_from_epoch"),
}

# What a data state of an earlier version says by not saying it.
_BEFORE = {"data.text": "all", "sampler.lanes": 1}


def restore(
    engine: Any, found: Sequence[Generation | str], run_url: str, shapes: dict[str, list[int]]
) -> Generation | None:
    """Load the newest whole generation into the engine; None when the run has none yet.

    found: the run's generations, newest first, the same on every rank. A damaged one is passed over
    with a warning. Raises CheckpointError when there are some but none is whole, or when they
    belong to another model.
    """
    problems = []
    for candidate in found:
        if isinstance(candidate, Generation):
            problem = _load(engine, candidate, shapes)
            if not problem:
                refresh_weights(engine)
                return candidate
        else:
            problem = candidate
        problems.append(problem)
        if dist.get_rank() == 0:
            log.warning("%s; falling back to the generation before", problem)
    if problems:
        raise _none_is_whole(run_url, problems[0])
    return None


def check_goes_on(
    found: Sequence[Generation | str],
    run_url: str,
    shapes: dict[str, list[int]],
    data_state: dict[str, Any],
    override: bool,
) -> None:
    """Raise what restoring the newest of these generations would, as far as its manifest says: a
    run that cannot go on so need not be claimed."""
    newest = next((g for g in found if isinstance(g, Generation)), None)
    if newest:
        check_same_model(newest, shapes)
        if not override:
            check_data_state(newest.manifest.data_state, data_state, override)
    elif found:
        raise _none_is_whole(run_url, str(found[0]))


def _none_is_whole(run_url: str, problem: str) -> CheckpointError:
    return CheckpointError(
        f"no generation of {run_url} is whole ({problem}): restore the objects, or give "
        "the run another run.name to start from scratch"
    )


def _load(engine: Any, generation: Generation, shapes: dict[str, list[int]]) -> str:
    """Load one generation on every rank; what is wrong with it on any of them, or "". StoreError on
    all of them when a rank cannot reach the store: that is no reason to go back further."""
    check_same_model(generation, shapes)
    fragments = list_fragments(engine)
    updates = generation.step - generation.manifest.skipped_updates
    problem, fault = "", ""
    try:
        # A fragment may come piece by piece, from objects of another world size.
        for i, start, values in read_fragments(generation, [f.span for f in fragments]):
            for kind, part in values.items():
                write(engine, fragments[i], kind, torch.from_numpy(part), updates, start)
    except CheckpointError as error:
        problem = str(error)
    except DataError as error:
        fault = str(error)
    told = gather_objects((problem, fault))
    if faults := [f for _, f in told if f]:
        raise StoreError(faults[0])
    return next((p for p, _ in told if p), "")


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


def set_masters(engine: Any, weights: dict[str, Tensor]) -> None:
    """Start from these fp32 weights: without it a bf16 engine's masters are rounded to bf16."""
    for fragment in list_fragments(engine):
        name, start, length = fragment.span
        write(engine, fragment, "master", weights[name].reshape(-1)[start : start + length], 0)
    refresh_weights(engine)


def parameter_shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(p.shape) for name, p in model.named_parameters()}


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
    newest = next((g.manifest for g in found if isinstance(g, Generation)), None)
    if newest is None:
        return
    now = config.model_dump(mode="json")
    # Neither pairs nor what is learned of them depend on these, but the learning rate and rounding.
    free = ("steps", "epochs", "global_batch", "precision")
    told = _differing(*({f"train.{k}": c["train"][k] for k in free} for c in (newest.config, now)))
    if told and dist.get_rank() == 0:
        log.info("changed since the checkpoint: %s", told)
    before = step_settings(newest.config, newest.objectives)
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

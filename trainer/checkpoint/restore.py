"""Bringing a run's newest whole generation back into an engine, at any world size and stage.

What must agree for that is checked here, too: the model's shapes and the data state.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shards.errors import DataError
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.generations import Generation, read_fragments
from trainer.checkpoint.zero_state import list_fragments, refresh_weights, write
from trainer.config import ConfigError
from trainer.ranks import gather_objects

log = logging.getLogger("lxscale")


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
    """Load one generation on every rank; what is wrong with it on any of them, or "". DataError on
    all of them when a rank cannot reach the store: that is no reason to go back further."""
    check_same_model(generation, shapes)
    fragments = list_fragments(engine)
    problem, fault = "", ""
    try:
        # A fragment may come piece by piece, from objects of another world size.
        for i, start, values in read_fragments(generation, [f.span for f in fragments]):
            for kind, part in values.items():
                write(engine, fragments[i], kind, torch.from_numpy(part), generation.step, start)
    except CheckpointError as error:
        problem = str(error)
    except DataError as error:
        fault = str(error)
    told = gather_objects((problem, fault))
    if faults := [f for _, f in told if f]:
        raise DataError(faults[0])
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


def check_data_state(saved: dict[str, Any], now: dict[str, Any], override: bool) -> None:
    """Refuse to go on with another data set or order, and show what differs."""
    keys = sorted(saved.keys() | now.keys())
    differing = [
        f"{k}: checkpoint {saved.get(k)!r}, now {now.get(k)!r}"
        for k in keys
        if saved.get(k) != now.get(k)
    ]
    if not differing:
        return
    text = "the data state of the checkpoint is another one: " + "; ".join(differing)
    if not override:
        raise ConfigError(
            f"{text}. Restore these settings, or set checkpoint.override_data_state=true to go on "
            "with samples possibly lost or repeated"
        )
    if dist.get_rank() == 0:
        log.warning("%s; going on as checkpoint.override_data_state is set", text)

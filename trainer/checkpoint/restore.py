"""Bringing a run's newest whole generation back into an engine, at any world size and stage."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.checkpoint.format import CheckpointError, Generation, generations, read_fragments
from trainer.checkpoint.zero_state import KINDS, Fragment, list_fragments, refresh_weights, write
from trainer.config import ConfigError

log = logging.getLogger("lxscale")


def restore(engine: Any, run_url: str, shapes: dict[str, list[int]]) -> Generation | None:
    """Load the newest whole generation into the engine; None when the run has none yet.

    A damaged generation is passed over with a warning. Raises CheckpointError when generations
    exist but none is whole, or when they belong to another model.
    """
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        found = [list(generations(run_url))]
    dist.broadcast_object_list(found, src=0)
    problems = []
    for candidate in found[0]:
        problem = candidate if isinstance(candidate, str) else _load(engine, candidate, shapes)
        if problem is None:
            refresh_weights(engine)
            generation: Generation = candidate
            return generation
        problems.append(problem)
        if dist.get_rank() == 0:
            log.warning("%s; falling back to the generation before", problem)
    if problems:
        raise CheckpointError(
            f"no generation of {run_url} is whole ({problems[0]}): restore the objects, or give "
            "the run another run.name to start from scratch"
        )
    return None


def _load(engine: Any, generation: Generation, shapes: dict[str, list[int]]) -> str | None:
    """Load one generation on every rank; what is wrong with it on any of them, or None."""
    check_same_model(generation, shapes)
    fragments = list_fragments(engine)
    step = generation.step
    problem = ""
    try:
        wanted = [(f.name, f.start, f.count) for f in fragments]
        for i, start, values in read_fragments(generation, wanted):
            fragment = fragments[i]
            for kind in KINDS:
                # Fragments may be covered piece by piece, from objects of another world size.
                _write_piece(engine, fragment, kind, start, values[kind], step)
    except CheckpointError as error:
        problem = str(error)
    told: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(told, problem)
    return next((t for t in told if t), None)


def _write_piece(
    engine: Any, fragment: Fragment, kind: str, start: int, values: np.ndarray, step: int
) -> None:
    piece = replace(
        fragment,
        start=fragment.start + start,
        count=len(values),
        offset=fragment.offset + start,
    )
    write(engine, piece, kind, torch.from_numpy(values), step)


def check_same_model(generation: Generation, shapes: dict[str, list[int]]) -> None:
    """Raise CheckpointError naming the first parameter that differs."""
    saved = generation.manifest["parameters"]
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
        flat = weights[fragment.name].reshape(-1)
        part = flat[fragment.start : fragment.start + fragment.count]
        write(engine, fragment, "master", part, 0)
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

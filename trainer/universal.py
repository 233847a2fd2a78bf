"""A checkpoint as a folder of DeepSpeed's universal format, for engines that are not ours.

    OUT/latest_universal                        names the tag
    OUT/TAG/zero/PARAMETER/fp32.pt, exp_avg.pt, exp_avg_sq.pt       {"param": tensor}, whole
    OUT/TAG/zero/PARAMETER/step.pt              Adam's count of updates
    OUT/TAG/zero/optimizer_state.pt             hyperparameters
    OUT/TAG/mp_rank_00_model_states.pt          counters; ZeRO 1 and 2 read this one,
    OUT/TAG/zero_pp_rank_0_mp_rank_00_model_states.pt              and ZeRO 3 that

An engine reads it with {"checkpoint": {"load_universal": true}} and `load_checkpoint(OUT)`, at ZeRO
1 to 3 and any world size; at 0 DeepSpeed reads no universal checkpoint. It has to be built with
torch's AdamW and as many parameter groups, in the same order: with weight decay, and without. A run
that was trained with bert_adam goes on with bias correction. The learning rate is the engine's own,
and under ZeRO 3 so is weight decay. There all groups get one tensor as their count of updates,
which the next step counts up once for each: where there are two, give each its own after loading,

    for state in engine.optimizer.optimizer.state.values():
        state["step"] = state["step"].clone()

Layout and names are those of deepspeed 0.19. Its files are pickles: we write them, out of tensors,
numbers and dictionaries, and read none.
"""

from __future__ import annotations

import importlib.metadata
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards.errors import DataError
from shards.format.staging import bring, publish_files, staging_folder
from shards.store import objects
from trainer.checkpoint.format import KINDS, CheckpointManifest, Span
from trainer.checkpoint.generations import F32, Generation, find_generation, read_fragments
from trainer.sections import OptimizerSection

_LATEST = "latest_universal"
_FILES = {"master": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def export_universal(path: str, out: str | Path) -> Generation:
    """Write a checkpoint to `out` (a folder or s3:// prefix) under a tag of its own.

    Another export there stays, as the tag that is not the latest. An export that fails leaves no
    file in `out` that is not whole. Memory: an object, and the parameters that lie in several.
    Raises DataError naming the place when that cannot be written, or has something else.
    """
    generation = find_generation(path)
    out = str(out)
    if others := [n for n in objects.list_names(out) if n != _LATEST and n[0] != "."]:
        raise DataError(f"{out} has {others[0]}, which is no part of an export: name a new folder")
    tag = f"step-{generation.step:08d}-{generation.name.removesuffix('.json')}"
    with staging_folder(out) as folder:
        names = [f"{tag}/{name}" for name in _write(folder / tag, generation)]
        (folder / _LATEST).write_text(tag)
        publish_files(folder, out, names)
        bring(folder / _LATEST, objects.join(out, _LATEST))
    return generation


def _write(folder: Path, generation: Generation) -> list[str]:
    """Write what belongs under the tag; the files' names."""
    manifest = generation.manifest
    updates = torch.tensor(float(manifest.step - manifest.skipped_updates))
    names = []

    def save(name: str, content: Any) -> None:
        # In memory first: on a full disk torch's own writer raises what is no OSError.
        data = io.BytesIO()
        torch.save(content, data)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.getbuffer())
        names.append(name)

    for name, arrays in _whole_parameters(generation):
        shape = manifest.parameters[name]
        for kind, file in _FILES.items():
            value = torch.from_numpy(arrays[kind]).reshape(shape)
            save(f"zero/{name}/{file}.pt", {"param": value})
        save(f"zero/{name}/step.pt", updates)
    groups = parameter_groups(manifest)
    # ZeRO 3 sets the first of these for all groups: what differs between them is not in it.
    shared = {k: v for k, v in groups[0].items() if k != "weight_decay"}
    save(
        "zero/optimizer_state.pt",
        {
            "ds_version": importlib.metadata.version("deepspeed"),
            "param_groups": groups,
            "optimizer_state_dict": {"state": {0: {"step": updates}}, "param_groups": [shared]},
        },
    )
    counters = {
        "dp_world_size": manifest.world_size,
        "mp_world_size": 1,
        "global_steps": manifest.step,
        "global_samples": manifest.sampler.consumed,
        "skipped_steps": manifest.skipped_updates,
        "lxscale_checkpoint": generation.name,
    }
    for prefix in ("", "zero_pp_rank_0_"):
        save(f"{prefix}mp_rank_00_model_states.pt", counters)
    return names


def parameter_groups(manifest: CheckpointManifest) -> list[dict[str, Any]]:
    """Hyperparameters of each group of the optimizer, as it was built (step/optimizer.py)."""
    section = OptimizerSection.model_validate(manifest.config["optimizer"])
    plain = [any(part in name for part in section.no_decay) for name in manifest.parameters]
    decays = [section.weight_decay] * (not all(plain)) + [0.0] * any(plain)
    return [{"betas": section.betas, "eps": section.eps, "weight_decay": d} for d in decays]


def _whole_parameters(generation: Generation) -> Iterator[tuple[str, dict[str, F32]]]:
    """(name, flat array of each of KINDS) of every parameter, as soon as it is whole."""
    shapes = generation.manifest.parameters
    wanted = [Span(name, 0, int(np.prod(shape))) for name, shape in shapes.items()]
    under_way: dict[int, dict[str, F32]] = {}
    left = [span.length for span in wanted]
    for i, start, values in read_fragments(generation, wanted):
        name, _, length = wanted[i]
        if i not in under_way:
            under_way[i] = {kind: np.empty(length, np.float32) for kind in KINDS}
        for kind, part in values.items():
            under_way[i][kind][start : start + len(part)] = part
        left[i] -= len(values["master"])
        if not left[i]:
            yield name, under_way.pop(i)

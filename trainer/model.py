"""The model of a run: with random weights, or with a checkpoint's (another's: initial.py)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from model.config import ModelConfig
from model.lxmert import Lxmert, init_weights
from model.objectives import OBJECTIVES
from model.objectives.base import Objective
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.generations import Generation, find_generation, load_weights
from trainer.config import RunConfig, parse_config
from trainer.tasks import TASKS


def build_model(
    config: ModelConfig, seed: int, objectives: Mapping[str, Objective] = OBJECTIVES
) -> Lxmert:
    """A model for some objectives in fp32 on the CPU, with the random weights of the seed."""
    model = Lxmert(config, objectives)
    init_weights(model, seed)
    return model


def load_checkpoint(path: str) -> tuple[Lxmert, RunConfig, Generation]:
    """The model of a checkpoint (a run's folder or URL, or a generation's manifest), in fp32."""
    generation = find_generation(path)
    config = parse_config(generation.manifest.config, generation.url)
    model = build_model(config.model, config.run.seed, TASKS[config.task].objectives)
    weights = {name: torch.from_numpy(w) for name, w in load_weights(generation).items()}
    # A tied weight is saved once, under its first name.
    missing, unexpected = model.load_state_dict(weights, strict=False)
    own = dict(model.named_parameters())
    if unexpected or any(name in own for name in missing):
        raise CheckpointError(
            f"{generation.url} does not fit this version's model: "
            f"missing {sorted(set(missing) & own.keys())}, unexpected {sorted(unexpected)}"
        )
    return model, config, generation

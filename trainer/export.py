"""What comes out of a checkpoint without a cluster: a model, its metrics, a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from model.batch import Batch
from model.interchange import save_huggingface
from model.losses import PreTrainingOutput
from model.lxmert import LxmertForPreTraining
from shards.dataset import open_dataset
from trainer import setup
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.generations import Generation, find_generation, load_weights
from trainer.config import RunConfig, parse_config
from trainer.evaluate import Evaluation, evaluate


def load_model(path: str) -> tuple[LxmertForPreTraining, RunConfig, Generation]:
    """The model of a checkpoint (a run's folder or URL, or a generation's manifest), in fp32."""
    generation = find_generation(path)
    config = parse_config(generation.manifest.config, generation.url)
    model = LxmertForPreTraining(config.model)
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


def evaluate_checkpoint(
    path: str,
    data_url: str,
    *,
    cache: str | None = None,
    batch_size: int = 256,
    blind: bool = False,
    predictions: Path | None = None,
) -> dict[str, float]:
    """Every objective's metrics of a checkpoint over a data set, on this machine.

    Raises ConfigError when the data set has another vocabulary or answer table than the model was
    trained with.
    """
    model, config, generation = load_model(path)
    data = open_dataset(data_url, cache or config.data.cache)
    manifest = generation.manifest
    setup.check_same_tables(data, manifest.vocab_sha256, manifest.answers_sha256)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    found: list[dict[str, Any]] = []

    def forward(batch: Batch, objectives: frozenset[str]) -> PreTrainingOutput:
        with torch.no_grad():
            return model(
                batch.to(device),
                objectives=objectives,
                label_scope=config.objectives.label_scope,
                feature_loss=config.objectives.feature_loss,
            )

    task = Evaluation(
        data,
        setup.batch_settings(config, data),
        frozenset(setup.resolve_objectives(config, data)),
        batch_size,
        blind,
        found.append if predictions else None,
    )
    metrics = evaluate(forward, task)
    if predictions:
        predictions.write_text(json.dumps(found, indent=1) + "\n")
    return metrics


def export_huggingface(path: str, out: Path) -> Generation:
    """Write a checkpoint's model as a folder for `LxmertForPreTraining.from_pretrained`."""
    model, _, generation = load_model(path)
    save_huggingface(out, model)
    return generation

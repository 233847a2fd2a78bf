"""The model of a run: with random weights, with another model's, or with a checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.bert import PARTS, read_bert
from model.config import ModelConfig
from model.errors import ModelError
from model.interchange import is_part, read_config, read_lxmert
from model.lxmert import LxmertForPreTraining, init_weights
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.generations import Generation, find_generation, load_weights
from trainer.config import RunConfig, parse_config


def build_model(
    config: ModelConfig,
    seed: int,
    init_from: str | Path | None = None,
    fresh: Sequence[str] = (),
    rows: Mapping[str, Tensor] | None = None,
) -> LxmertForPreTraining:
    """A model in fp32 on the CPU: random weights of the seed, then those of `init_from`, if given
    (see load_initial_weights)."""
    model = LxmertForPreTraining(config)
    init_weights(model, seed)
    if init_from is not None:
        load_initial_weights(model, init_from, fresh, rows)
    return model


def load_checkpoint(path: str) -> tuple[LxmertForPreTraining, RunConfig, Generation]:
    """The model of a checkpoint (a run's folder or URL, or a generation's manifest), in fp32."""
    generation = find_generation(path)
    config = parse_config(generation.manifest.config, generation.url)
    model = build_model(config.model, config.run.seed)
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


def load_initial_weights(
    model: LxmertForPreTraining,
    path: str | Path,
    fresh: Sequence[str] = (),
    rows: Mapping[str, Tensor] | None = None,
) -> None:
    """Load the weights of another model: of an LXMERT (a Hugging Face folder, a .safetensors or a
    released .pth) all that this model has, of one without heads (a Hugging Face folder of an
    LxmertModel) the trunk, of a BERT (a Hugging Face folder) what it can give.

    fresh: parts of the model, by the beginning of their parameters' names, that stay as they are;
    the file may lack them or have them in other sizes. rows: for a parameter, the row of the file's
    that each of ours takes, i64 (rows,), -1 = stays as it is; for tables of other entries.

    Raises ModelError naming the first that does not fit; nothing is loaded then.
    """
    own, rows = dict(model.named_parameters()), rows or {}
    for part in fresh:
        if not any(is_part(name, [part]) for name in own):
            begin = ", ".join(sorted({name.split(".")[0] for name in own}))
            raise ModelError(
                f"train.init_fresh: this model has no parameter {part} or {part}.…; their names "
                f"begin with {begin}"
            )
    weights, parts = _read(path, model.config, fresh)
    wanted = [n for n in own if parts is None or is_part(n, parts)]
    taken = {n: own[n] for n in wanted if not is_part(n, fresh)}
    given = {n: w for n, w in weights.items() if not is_part(n, fresh)}
    ready = {}
    for name in sorted(taken.keys() | given.keys() | rows.keys()):
        if name not in given:
            hint = "is it an LXMERT with its pre-training heads?"
            if not any("x_layers." in n for n in weights):
                hint = "if it is a BERT, name its Hugging Face folder, with its config.json."
            raise ModelError(
                f"{path} has no {name}: {hint} What the file need not have is named in "
                "train.init_fresh"
            )
        if name not in taken:
            raise ModelError(f"{path} has {name}, which an LXMERT of this configuration has not")
        ready[name] = _fitted(name, taken[name], given[name], rows.get(name), path)
    with torch.no_grad():
        for name, value in ready.items():
            taken[name].copy_(value)


def _read(
    path: str | Path, config: ModelConfig, fresh: Sequence[str]
) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """The weights of a file or folder under our names, and the parts of a model that it gives;
    None: all."""
    tree = read_config(path)
    kind = tree.get("model_type", "lxmert")
    if kind == "bert":
        return read_bert(path, tree, config, fresh), PARTS
    if kind != "lxmert":
        raise ModelError(
            f"{Path(path) / 'config.json'} is not the configuration of an LXMERT or a BERT: "
            f"its model_type is {kind}"
        )
    trunk = tree.get("architectures") == ["LxmertModel"]
    return read_lxmert(path, tree, config, fresh), ("lxmert",) if trunk else None


def _fitted(
    name: str, ours: Tensor, theirs: Tensor, rows: Tensor | None, path: str | Path
) -> Tensor:
    """The value that a parameter takes; ModelError where the file's does not fit."""
    if not theirs.is_floating_point():
        raise ModelError(f"{path}: {name} is {theirs.dtype}: weights are floats")
    theirs = theirs.to(ours.dtype)
    if not theirs.isfinite().all():
        raise ModelError(
            f"{path}: {name} has values that are not finite: use another file, or leave the part "
            "fresh (train.init_fresh)"
        )
    if rows is None:
        if theirs.shape != ours.shape:
            raise ModelError(
                f"{path}: {name} is {list(theirs.shape)}, this model's is {list(ours.shape)}: use "
                "the sizes of that file, another file, or leave the part fresh (train.init_fresh)"
            )
        return theirs
    if theirs.shape[1:] != ours.shape[1:] or len(rows) != len(ours) or rows.max() >= len(theirs):
        raise ModelError(
            f"{path}: {name} is {list(theirs.shape)}, this model's is {list(ours.shape)}: its "
            f"{len(rows)} rows cannot be taken from there"
        )
    out = ours.detach().clone()
    out[rows >= 0] = theirs[rows[rows >= 0]]
    return out

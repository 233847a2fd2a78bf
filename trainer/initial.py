"""Initial weights from elsewhere: another run's, Hugging Face's, a released file's, a BERT's."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from model.bert import PARTS, read_bert
from model.config import ModelConfig
from model.errors import ModelError
from model.interchange import EMBEDDING, answers_of, is_part, read_config, read_lxmert
from model.lxmert import HEADS, Lxmert
from shards.dataset import Dataset
from shards.format.answers import answer_index, load_answers, normalise_answer
from shards.store import objects
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.generations import Generation, find_generation, load_weights
from trainer.config import RunConfig
from trainer.errors import ConfigError
from trainer.run_files import run_answers
from trainer.tasks import TASKS

log = logging.getLogger("lxscale")

# The layers that have a row an answer.
_ANSWERS = ("answer_head.logit_fc.3.", "pair_head.logit_fc.3.")
_FILES = (".pth", ".pt", ".bin", ".safetensors")
# What a folder of Hugging Face's has, one of these at least.
_MODEL = (
    "config.json",
    *(f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin")
      for end in ("", ".index.json")),
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """What another model has to give."""

    path: str
    weights: dict[str, Tensor]
    """Under our names."""
    parts: tuple[str, ...] | None = None
    """The parts of a model that it gives, by the beginning of their names; None: all."""
    answers: list[str] | None = None
    """Its answer table, where that is known."""
    vocab_sha256: str | None = None
    """Of its vocabulary, likewise."""


def begin_from(model: Lxmert, config: RunConfig, data: Dataset) -> None:
    """Give a run's model the weights of `train.init_from`. An answer of the data set begins with
    the weights that the same answer has there, after normalisation; a new one at random.

    Raises ModelError or CheckpointError naming the first that cannot be read or does not fit, and
    ConfigError where the words of both have other numbers.
    """
    train, fine_tunes = config.train, TASKS[config.task].fine_tunes
    assert train.init_from is not None
    source = read_source(train.init_from, model.config, train.init_fresh)
    known = not is_part(EMBEDDING, train.init_fresh)
    if known and source.vocab_sha256 not in (None, data.manifest.vocab.sha256):
        raise ConfigError(
            f"train.init_from={source.path} was trained with another vocabulary than that of "
            f"{data.url}: build the data set with --vocab and that run's vocab.txt"
        )
    table = source.answers
    if train.init_answers is not None:
        place = objects.local_path(train.init_answers)
        if place is None:
            raise ConfigError(
                f"train.init_answers={train.init_answers}: name a file of this machine"
            )
        table = load_answers(place)
    fresh = list(train.init_fresh)
    rows: dict[str, Tensor] = {}
    last = [
        name
        for name in dict(model.named_parameters())
        if name.startswith(_ANSWERS) and name in source.weights and not is_part(name, fresh)
    ]
    if table and last:
        if len(source.weights[last[0]]) != len(table):
            raise ConfigError(
                f"train.init_from={source.path} has {len(source.weights[last[0]])} answers, and "
                f"its answer table {len(table)}: give the right one with train.init_answers"
            )
        rows = dict.fromkeys(last, answer_rows(table, data.answers()))
    elif fine_tunes and last:
        log.warning(
            "answers begin at random, as it is not known which %s has: name its answer table in "
            "train.init_answers",
            source.path,
        )
        fresh += last
    take_weights(model, source, fresh, rows, "some" if fine_tunes else "all")
    if rows:
        found = rows[last[0]]
        told = int((found >= 0).sum()), len(found), source.path
        log.info("%d of %d answers begin with the weights that they have in %s", *told)


def answer_rows(theirs: Sequence[str], ours: Sequence[str]) -> Tensor:
    """i64 (answers of ours,): where each is in the other table, by its normal form; -1: nowhere."""
    index = answer_index(theirs)
    return torch.tensor([index.get(normalise_answer(a), -1) for a in ours], dtype=torch.int64)


def read_source(path: str | Path, config: ModelConfig, fresh: Sequence[str] = ()) -> Source:
    """The weights at a path: of an LXMERT (a run, a Hugging Face folder, a .safetensors or a
    released .pth) all that it has, of one without heads (a Hugging Face folder of an LxmertModel)
    the trunk, of a BERT (a Hugging Face folder) what it can give.

    config: of the model that they are for; fresh: parts of it that do not take them. ModelError or
    CheckpointError naming what cannot be read.
    """
    if generation := _generation(str(path)):
        return _of_run(str(path), generation, config)
    tree = read_config(path)
    kind = tree.get("model_type", "lxmert")
    if kind == "bert":
        return Source(str(path), read_bert(path, tree, config, fresh), PARTS)
    if kind != "lxmert":
        raise ModelError(
            f"{Path(path) / 'config.json'} is not the configuration of an LXMERT or a BERT: "
            f"its model_type is {kind}"
        )
    trunk = tree.get("architectures") == ["LxmertModel"]
    parts = ("lxmert",) if trunk else None
    return Source(str(path), read_lxmert(path, tree, config, fresh), parts, answers_of(tree))


def _generation(path: str) -> Generation | None:
    """The newest one of a run, or the one that is named; None where the path is none of a run."""
    local = objects.local_path(path)
    if local is not None and not local.exists():
        raise ModelError(f"{path} does not exist: name a run, a Hugging Face folder or a .pth file")
    if path.endswith(_FILES) or (local is not None and any((local / n).is_file() for n in _MODEL)):
        return None
    try:
        return find_generation(path)
    except CheckpointError as error:
        if local is None or (local / "checkpoints").is_dir() or local.is_file():
            raise
        raise ModelError(
            f"{path} is neither a run's folder nor a model's: {error}, and no config.json or "
            "weights either"
        ) from None


def _of_run(path: str, generation: Generation, config: ModelConfig) -> Source:
    manifest = generation.manifest
    heads = manifest.config["model"]["num_heads"]
    if heads != config.num_heads:
        raise ModelError(
            f"{generation.url} has model.num_heads={heads}, this model {config.num_heads}: use the "
            "sizes of that run"
        )
    weights = {name: torch.from_numpy(w) for name, w in load_weights(generation).items()}
    answers = run_answers(generation)
    return Source(path, weights, None, answers, manifest.vocab_sha256)


def take_weights(
    model: Lxmert,
    source: Source,
    fresh: Sequence[str] = (),
    rows: Mapping[str, Tensor] | None = None,
    heads: Literal["all", "some"] = "all",
) -> None:
    """Load what a source gives.

    fresh: parts of the model, by the beginning of their parameters' names, that stay as they are;
    the source may lack them or have them in other sizes. rows: for a parameter, the row of the
    source's that each of ours takes, i64 (rows,), -1 = stays as it is; for tables of other entries.
    heads: "some": heads that this model has not are left out, and those that the source has not
    stay as they are.

    Raises ModelError naming the first that does not fit; nothing is loaded then.
    """
    own, rows, path = dict(model.named_parameters()), rows or {}, source.path
    for part in fresh:
        if not any(is_part(name, [part]) for name in own):
            begin = ", ".join(sorted({name.split(".")[0] for name in own}))
            raise ModelError(
                f"train.init_fresh: this model has no parameter {part} or {part}.…; their names "
                f"begin with {begin}"
            )
    weights, parts = source.weights, source.parts
    if heads == "some":
        there = [h for h in HEADS if any(is_part(n, [h]) for n in weights)]
        ours = [h for h in HEADS if any(is_part(n, [h]) for n in own)]
        left_out = [h for h in there if h not in ours]
        weights = {n: w for n, w in weights.items() if not is_part(n, left_out)}
        fresh = [*fresh, *(h for h in ours if h not in there)]
    wanted = [n for n in own if parts is None or is_part(n, parts)]
    taken = {n: own[n] for n in wanted if not is_part(n, fresh)}
    given = {n: w for n, w in weights.items() if not is_part(n, fresh)}
    ready = {}
    for name in sorted(taken.keys() | given.keys() | rows.keys()):
        if name not in given:
            hint = "is it an LXMERT with its pre-training heads?"
            if not any("x_layers." in n for n in weights):
                hint = "if it is a BERT, name its Hugging Face folder, with its config.json."
            elif name.startswith("lxmert.encoder."):
                hint = "has it as many layers (model.language_layers, …)?"
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

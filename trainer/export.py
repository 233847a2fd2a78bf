"""What comes out of a checkpoint without a cluster: its metrics, a Hugging Face folder."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from model.interchange import config_to_huggingface, weights_to_huggingface
from model.lxmert import LxmertForPreTraining
from shards.dataset import open_dataset
from shards.errors import DataError
from shards.format.build import VOCAB
from shards.format.manifest import load_manifest
from shards.format.staging import publish_files, staging_folder
from shards.format.tokenizer import parse_vocab
from shards.store import objects
from trainer import setup
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.generations import Generation
from trainer.config import RunConfig
from trainer.evaluate import Evaluation, evaluate, without_gradient
from trainer.model import load_checkpoint

log = logging.getLogger("lxscale")

# Without it a folder is no model to Hugging Face: it is removed first and written last.
_CONFIG = "config.json"
_NOTHING = re.compile(r"(?!)")


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
    model, config, generation = load_checkpoint(path)
    data = open_dataset(data_url, cache or config.data.cache)
    manifest = generation.manifest
    setup.check_same_tables(data, manifest.vocab_sha256, manifest.answers_sha256)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    found: list[dict[str, Any]] = []

    task = Evaluation(
        data,
        setup.batch_settings(config, data, setup.order_version([generation])),
        frozenset(setup.resolve_objectives(config, data)),
        batch_size,
        blind,
        found.append if predictions else None,
    )
    metrics = evaluate(without_gradient(model, device, config.objectives.losses()), task)
    if predictions:
        predictions.write_text(json.dumps(found, indent=1) + "\n")
    return metrics


def export_huggingface(path: str, out: str | Path) -> Generation:
    """Write a checkpoint's model and its tokenizer to `out` (a folder or s3:// prefix), such that
    transformers' `AutoModel`, `AutoTokenizer` and `LxmertForPreTraining` load it.

    An export that fails leaves no file in it that is not whole, and no model. Raises
    CheckpointError when the run's vocabulary is not the one that the checkpoint was trained with,
    DataError naming the place when that cannot be written, or has something but an earlier export.
    """
    model, config, generation = load_checkpoint(path)
    vocab = _vocabulary(generation)
    with staging_folder(str(out)) as folder:
        write_model(folder, model)
        write_tokenizer(folder, vocab, _max_tokens(config))
        names = {p.name for p in folder.iterdir()} - {"lock", _CONFIG}
        files = [*sorted(names), _CONFIG]
        _check_place(str(out), files)
        publish_files(folder, str(out), files)
    return generation


def _check_place(out: str, files: list[str]) -> None:
    """DataError where there is something that is no earlier export: it would be lost, or be read as
    a part of this one (as tokenizers read files that ours has not)."""
    present = objects.list_names(out)
    others = [n for n in present if n not in files and not n.startswith(".")]
    if others:
        raise DataError(f"{out} has {others[0]}, which is no part of an export: name a new folder")
    if _CONFIG not in present:
        return
    try:
        tree = json.loads(objects.read_bytes(objects.join(out, _CONFIG)))
    except ValueError:
        tree = None
    if not isinstance(tree, dict) or tree.get("model_type") != "lxmert":
        raise DataError(f"{out} has the {_CONFIG} of something else: name a new folder")


def _vocabulary(generation: Generation) -> bytes:
    """The vocab.txt of the checkpoint's run, verified."""
    url = objects.join(generation.run_url, VOCAB)
    vocab = objects.read_bytes(url)
    if hashlib.sha256(vocab).hexdigest() != generation.manifest.vocab_sha256:
        raise CheckpointError(
            f"{url} is not the vocabulary that {generation.url} was trained with (their sha256 "
            f"differ): copy the training set's {VOCAB} there"
        )
    return vocab


def _max_tokens(config: RunConfig) -> int:
    """The longest sentence that the model was trained on, [CLS] and [SEP] included; where its data
    sets are out of reach, the longest that it has positions for."""
    try:
        return max(load_manifest(p.url).schema.max_tokens for p in config.data.specs())
    except DataError as error:
        longest = config.model.max_positions
        log.warning("model_max_length is model.max_positions=%d: %s", longest, error)
        return longest


def write_model(folder: Path, model: LxmertForPreTraining) -> None:
    """config.json and model.safetensors, as `save_pretrained` would write them."""
    config = json.dumps(config_to_huggingface(model.config), indent=2) + "\n"
    (folder / _CONFIG).write_text(config)
    weights = weights_to_huggingface(model)
    path = folder / "model.safetensors"
    try:
        safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # what the library makes of a full disk
        raise OSError(str(error)) from error
    # The library makes files that others may not read (0600).
    shutil.copymode(folder / _CONFIG, path)


def write_tokenizer(folder: Path, vocab: bytes, max_tokens: int) -> None:
    """Files from which `AutoTokenizer` makes the tokenizer of our builds, with [CLS] and [SEP]."""
    from transformers import BertTokenizer  # slow to import, and needed here alone

    ids = {token: i for i, token in enumerate(parse_vocab(vocab, VOCAB))}
    BertTokenizer(vocab=ids, model_max_length=max_tokens).save_pretrained(folder)
    (folder / VOCAB).write_bytes(vocab)  # for versions of transformers before 5

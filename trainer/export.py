"""A checkpoint's model as a Hugging Face folder."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch

from model.interchange import config_to_huggingface, weights_to_huggingface
from model.lxmert import Lxmert
from shards.errors import DataError
from shards.format.build import VOCAB
from shards.format.manifest import load_manifest
from shards.format.staging import publish_files, staging_folder
from shards.format.tokenizer import parse_vocab
from shards.store import objects
from trainer.checkpoint.generations import Generation
from trainer.config import RunConfig
from trainer.model import load_checkpoint
from trainer.run_files import run_answers, run_vocab

log = logging.getLogger("lxscale")

# Without it a folder is no model to Hugging Face: it is removed first and written last.
_CONFIG = "config.json"


def export_huggingface(path: str, out: str | Path) -> Generation:
    """Write a checkpoint's model and its tokenizer to `out` (a folder or s3:// prefix), such that
    transformers' `AutoModel`, `AutoTokenizer` and `LxmertForPreTraining` load it, or
    `LxmertForQuestionAnswering` where it was fine-tuned for VQA or GQA.

    An export that fails leaves no file in it that is not whole, and no model. Raises
    CheckpointError when the run's vocabulary is not the one that the checkpoint was trained with,
    DataError naming the place when that cannot be written, or has something but an earlier export.
    """
    model, config, generation = load_checkpoint(path)
    vocab, answers = run_vocab(generation), run_answers(generation)
    with staging_folder(str(out)) as folder:
        write_model(folder, model, answers)
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


def _max_tokens(config: RunConfig) -> int:
    """The longest sentence that the model was trained on, [CLS] and [SEP] included; where its data
    sets are out of reach, the longest that it has positions for."""
    try:
        return max(load_manifest(p.url).schema.max_tokens for p in config.data.specs())
    except DataError as error:
        longest = config.model.max_positions
        log.warning("model_max_length is model.max_positions=%d: %s", longest, error)
        return longest


def write_model(folder: Path, model: Lxmert, answers: Sequence[str] = ()) -> None:
    """config.json and model.safetensors, as `save_pretrained` would write them."""
    config = json.dumps(config_to_huggingface(model, answers), indent=2) + "\n"
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

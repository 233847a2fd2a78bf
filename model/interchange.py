"""Weights and sizes from and to Hugging Face's Lxmert and the released LXMERT files.

All share their parameter names but for prefixes: Hugging Face's trunk is `lxmert.`, the released
one `bert.`, which `module.` may precede; the answer head of both is `answer_head.`. A trunk saved
without heads has no prefix.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from model.config import ModelConfig
from model.errors import ModelError
from model.lxmert import Lxmert

# ours -> Hugging Face's LxmertConfig
_HF_NAMES = {
    "vocab_size": "vocab_size",
    "num_answers": "num_qa_labels",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "language_layers": "l_layers",
    "object_layers": "r_layers",
    "cross_layers": "x_layers",
    "max_positions": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "feature_dim": "visual_feat_dim",
    "box_dim": "visual_pos_dim",
    "num_object_classes": "num_object_labels",
    "num_attribute_classes": "num_attr_labels",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "initializer_range": "initializer_range",
}
# The class that has a head, and those that come after it here.
_ARCHITECTURES = {
    "cls": "LxmertForPreTraining",
    "answer_head": "LxmertForQuestionAnswering",
    "pair_head": "LxmertForStatementsAboutPairs",
}
# What every model here has, and another model's configuration may not.
_FIXED = {"hidden_act": "gelu", "position_embedding_type": "absolute"}
# What the names in a trunk without heads begin with.
_TRUNK = ("embeddings.", "encoder.", "pooler.")
# One parameter under two names: files may have either.
EMBEDDING = "lxmert.embeddings.word_embeddings.weight"
_TIED = "cls.predictions.decoder.weight"
# Under what training scripts, Lightning and DeepSpeed keep the state_dict in a checkpoint's file.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")


def config_to_huggingface(model: Lxmert, answers: Sequence[str] = ()) -> dict[str, Any]:
    """A config.json for `from_pretrained` of the class that has the model's heads. Hugging Face has
    none with a pair head: its folder has the layout of the others, and `AutoModel` loads the trunk.

    answers: the answer table, which becomes `id2label`.
    """
    if model.config.top_down:
        raise ModelError("Hugging Face has no model with top-down attention: there is no export")
    heads = {name.partition(".")[0] for name, _ in model.named_parameters()}
    labels: dict[str, Any] = {}
    if len(answers) == model.config.num_answers:
        labels["id2label"] = {str(i): answer for i, answer in enumerate(answers)}
        labels["label2id"] = {answer: i for i, answer in enumerate(answers)}
    return {
        "architectures": [next(a for head, a in _ARCHITECTURES.items() if head in heads)],
        "model_type": "lxmert",
        **{theirs: getattr(model.config, ours) for ours, theirs in _HF_NAMES.items()},
        "hidden_act": "gelu",
        "visual_loss_normalizer": 6.67,
        **labels,
    }


def answers_of(tree: dict[str, Any]) -> list[str] | None:
    """The answer table that a config.json of ours has as `id2label`; None where it has none."""
    labels = tree.get("id2label")
    if not isinstance(labels, dict) or len(labels) != tree.get("num_qa_labels"):
        return None
    table = [labels.get(str(i)) for i in range(len(labels))]
    found = [a for a in table if isinstance(a, str)]
    # Hugging Face's own names of what has no name.
    named = bool(found) and len(found) == len(table) and found[0] != "LABEL_0"
    return found if named else None


def weights_to_huggingface(model: Lxmert) -> dict[str, Tensor]:
    """What its model.safetensors holds: each parameter once."""
    state = model.state_dict()
    return {n: w.detach().cpu().contiguous() for n, w in state.items() if n != _TIED}


def read_config(path: str | Path) -> dict[str, Any]:
    """The config.json of a Hugging Face folder; empty where `path` has none, or is a file."""
    path = Path(path) / "config.json"
    try:
        tree = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from None
    if not isinstance(tree, dict):
        raise ModelError(f"{path} is not the configuration of a model")
    return tree


def misfits(tree: dict[str, Any], config: ModelConfig, ours: Iterable[str]) -> list[str]:
    """What in a config.json says that its weights are not for this model: each key with both
    values. ours: the sizes to compare, by their names here; an absent one is the base's."""
    wrong = [
        f"{key} is {tree[key]}, LXMERT's is {value}"
        for key, value in _FIXED.items()
        if tree.get(key, value) != value
    ]
    for key in ours:
        theirs = tree.get(_HF_NAMES[key], ModelConfig.model_fields[key].default)
        size = getattr(config, key)
        if theirs != size:
            wrong.append(f"{_HF_NAMES[key]} is {theirs}, this model.{key} is {size}")
    return wrong


def read_lxmert(
    path: str | Path, tree: dict[str, Any], config: ModelConfig, fresh: Sequence[str]
) -> dict[str, Tensor]:
    """Weights of a Hugging Face folder, a .safetensors or a released .pth, under our names.

    tree: the folder's config.json, or empty; fresh: parts of the model that do not take their
    weights. Raises ModelError naming the file and the key that is wrong in itself; whether names
    and shapes fit is for the caller to see.
    """
    # The number of heads is the one size that no weight's shape shows.
    if tree and (wrong := misfits(tree, config, ["num_heads"])):
        where = Path(path) / "config.json"
        raise ModelError(f"{where}: {'; '.join(wrong)}: use its sizes, or another folder")
    weights = renamed(read_tensors(path), _our_name, path)
    tied = weights.pop(_TIED, None)
    if tied is None or is_part(_TIED, fresh) or is_part(EMBEDDING, fresh):
        return weights
    # NaN, which is not even equal to itself, is for the caller to see.
    embedding = weights.get(EMBEDDING, tied)
    if not torch.equal(tied.nan_to_num(), embedding.nan_to_num()):
        raise ModelError(
            f"{path}: {_TIED} differs from {EMBEDDING}; an LXMERT ties them: use another file"
        )
    return weights


def _our_name(name: str) -> str | None:
    name = name.removeprefix("module.")
    if name.startswith(("bert.", *_TRUNK)):
        name = "lxmert." + name.removeprefix("bert.")
    # A buffer of old versions.
    return None if name == "lxmert.embeddings.position_ids" else name


def is_part(name: str, parts: Iterable[str]) -> bool:
    """Whether a parameter is of one of these parts, as cls.predictions.bias is of cls."""
    return any(f"{name}.".startswith(f"{part.rstrip('.')}.") for part in parts)


def renamed(
    weights: dict[str, Tensor], rename: Callable[[str], str | None], path: str | Path
) -> dict[str, Tensor]:
    """The weights under new names, without those whose new name is None."""
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        new = rename(name)
        if new in out:
            raise ModelError(f"{path} has {new} twice, the second time as {name}")
        if new is not None:
            out[new] = value
    return out


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The weights in a Hugging Face folder, a .safetensors or a .pth, under the names there.

    Nothing is unpickled but tensors. Raises ModelError naming the file when it cannot be read.
    """
    weights: dict[str, Tensor] = {}
    for file in _files_of(Path(path)):
        weights |= _read_file(file)
    return weights


def _files_of(path: Path) -> list[Path]:
    """The files that hold the weights of a folder: one, or those that an index names."""
    if not path.is_dir():
        return [path]
    # Older folders have the weights as a pickle, of which only tensors are read.
    names = ("model.safetensors", "pytorch_model.bin")
    for name in names:
        if (path / name).is_file():
            return [path / name]
        if (path / f"{name}.index.json").is_file():
            return _indexed(path / f"{name}.index.json")
    return [path / names[0]]


def _indexed(index: Path) -> list[Path]:
    """The files beside an index, {"weight_map": {name of a weight: file}}, that it names."""
    try:
        files = set(json.loads(index.read_text())["weight_map"].values())
        if not files or any(Path(file).name != file for file in files):
            raise ValueError("its files must lie beside it")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{index} does not say which files hold the weights ({error}): copy it again"
        ) from None
    return [index.parent / file for file in sorted(files)]


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            weights = safetensors.torch.load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(
            f"{path} does not exist: name a Hugging Face folder or a .pth file"
        ) from None
    except Exception as error:  # the readers raise whatever the bytes lead them to
        why = str(error)
        if isinstance(error, OSError):
            why = error.strerror or why
        elif path.suffix != ".safetensors":
            # torch's own words tell the user to unpickle it all the same.
            why = (
                "it is damaged, or holds more than tensors, which is not unpickled; name a file "
                "that was saved of a model's state_dict"
            )
        raise ModelError(f"{path} is not a file of weights: {why}") from None
    return _named_tensors(weights, path)


def _named_tensors(found: Any, path: Path) -> dict[str, Tensor]:
    """The weights of what a file holds: the tensors of a state_dict, or of one in a wrapper as
    training scripts save, without what else lies beside them (counts, settings)."""
    if not isinstance(found, dict):
        raise ModelError(
            f"{path} holds a {type(found).__name__}, not weights by name: name a file that was "
            "saved of a model's state_dict"
        )
    for wrapper in _WRAPPERS:
        if isinstance(found.get(wrapper), dict):
            return _named_tensors(found[wrapper], path)
    weights = {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not weights:
        keys = ", ".join(f"{key!r:.40}" for key in list(found)[:3]) or "none"
        raise ModelError(
            f"{path} holds no tensor under a parameter's name (its first keys: {keys}): name a "
            "file that was saved of a model's state_dict"
        )
    return weights

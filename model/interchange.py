"""Weights from and to Hugging Face's Lxmert and the released LXMERT files.

All share their parameter names but for prefixes: Hugging Face's trunk is `lxmert.`, the released
one `bert.`, which `module.` may precede; the answer head of both is `answer_head.`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from model.config import ModelConfig
from model.errors import ModelError
from model.lxmert import LxmertForPreTraining

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
_TIED = "cls.predictions.decoder.weight"
_EMBEDDING = "lxmert.embeddings.word_embeddings.weight"


def config_from_huggingface(tree: dict[str, Any]) -> ModelConfig:
    """Sizes of a config.json of Hugging Face's; what it leaves out has their default, the base."""
    return ModelConfig.model_validate(
        {ours: tree[theirs] for ours, theirs in _HF_NAMES.items() if theirs in tree}
    )


def config_to_huggingface(config: ModelConfig) -> dict[str, Any]:
    """A config.json for `LxmertForPreTraining.from_pretrained`."""
    tree = {theirs: getattr(config, ours) for ours, theirs in _HF_NAMES.items()}
    return {
        "architectures": ["LxmertForPreTraining"],
        "model_type": "lxmert",
        **tree,
        "hidden_act": "gelu",
        "visual_loss_normalizer": 6.67,
    }


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Weights of a Hugging Face folder, a .safetensors or a released .pth, under our names.

    Nothing is unpickled but tensors. Raises ModelError naming the file when it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        # Older folders have the weights as a pickle, of which only tensors are read.
        names = ("model.safetensors", "pytorch_model.bin")
        path = next((path / n for n in names if (path / n).is_file()), path / names[0])
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
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path} is not a file of weights: {first}") from None
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise ModelError(f"{path} is not a dictionary of tensors: name a file of weights")
    ours: dict[str, Tensor] = {}
    for name, value in weights.items():
        if _our_name(name) in ours:
            raise ModelError(f"{path} has {_our_name(name)} twice, the second time as {name}")
        ours[_our_name(name)] = value
    return ours


def _our_name(name: str) -> str:
    name = name.removeprefix("module.")
    if name.startswith("bert."):
        name = "lxmert." + name.removeprefix("bert.")
    return name


def load_weights_for(model: LxmertForPreTraining, path: str | Path) -> None:
    """Load weights into a model of the same sizes; ModelError names the first that does not fit."""
    weights = read_weights(path)
    weights.pop("lxmert.embeddings.position_ids", None)  # a buffer of old versions
    own = model.state_dict()
    weights.setdefault(_TIED, weights.get(_EMBEDDING, own[_EMBEDDING]))
    for name in sorted(own.keys() | weights.keys()):
        if name not in weights:
            raise ModelError(f"{path} has no {name}: is it an LXMERT with its pre-training heads?")
        if name not in own:
            raise ModelError(f"{path} has {name}, which an LXMERT of this configuration has not")
        if weights[name].shape != own[name].shape:
            raise ModelError(
                f"{path}: {name} is {list(weights[name].shape)}, this model's is "
                f"{list(own[name].shape)}: use the sizes of that file, or another file"
            )
        if not weights[name].is_floating_point():
            raise ModelError(f"{path}: {name} is {weights[name].dtype}: weights are floats")
    if not torch.equal(weights[_TIED], weights[_EMBEDDING]):  # one parameter here
        raise ModelError(
            f"{path}: {_TIED} differs from {_EMBEDDING}; an LXMERT ties them: use another file"
        )
    model.load_state_dict(weights)


def load_huggingface(folder: str | Path) -> LxmertForPreTraining:
    """The model of a `save_pretrained` folder: config.json and model.safetensors, or the older
    pytorch_model.bin. ModelError names the file and the key that do not fit."""
    path = Path(folder) / "config.json"
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from None
    if not isinstance(tree, dict) or tree.get("model_type") != "lxmert":
        raise ModelError(f"{path} is not the configuration of an LXMERT")
    if tree.get("hidden_act", "gelu") != "gelu":
        raise ModelError(f"{path}: hidden_act is {tree['hidden_act']}, LXMERT's is gelu")
    try:
        config = config_from_huggingface(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(_HF_NAMES.get(str(part), str(part)) for part in first["loc"])
        raise ModelError(f"{path}: {key + ': ' if key else ''}{first['msg']}") from None
    model = LxmertForPreTraining(config)
    load_weights_for(model, folder)
    return model


def save_huggingface(folder: str | Path, model: LxmertForPreTraining) -> None:
    """Write a folder that `transformers.LxmertForPreTraining.from_pretrained` loads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: value.detach().cpu().contiguous()
        for name, value in model.state_dict().items()
        if name != _TIED
    }
    temporary = folder / ".model.safetensors.tmp"
    safetensors.torch.save_file(weights, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / "model.safetensors")
    config = json.dumps(config_to_huggingface(model.config), indent=2) + "\n"
    (folder / "config.json").write_text(config)

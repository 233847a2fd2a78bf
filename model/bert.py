"""The part of an LXMERT that a BERT can give: the embeddings and the language encoder.

It is the paper's "from BERT". Their parameters have BERT's names, after a prefix.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from model.config import ModelConfig
from model.errors import ModelError
from model.interchange import is_part, misfits, read_tensors, renamed

PARTS = ("lxmert.embeddings", "lxmert.encoder.layer")

_SIZES = ("hidden_size", "num_heads", "intermediate_size")
# Sizes of one embedding each, which need not fit where that embedding is not taken.
_SIZE_OF = {
    "vocab_size": "lxmert.embeddings.word_embeddings.weight",
    "max_positions": "lxmert.embeddings.position_embeddings.weight",
    "type_vocab_size": "lxmert.embeddings.token_type_embeddings.weight",
}
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.")
# As files of before 2019 call them.
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def read_bert(
    folder: str | Path, tree: dict[str, Any], config: ModelConfig, fresh: Sequence[str]
) -> dict[str, Tensor]:
    """The weights for PARTS in a Hugging Face folder of a BERT, under our names.

    tree: its config.json; fresh: parts of the model that do not take their weights. Of its layers,
    the first `language_layers`. Raises ModelError naming the keys of its configuration that do not
    fit, with both values.
    """
    sizes = [*_SIZES, *(key for key, name in _SIZE_OF.items() if not is_part(name, fresh))]
    wrong = misfits(tree, config, sizes)
    layers = tree.get("num_hidden_layers", 12)  # the default is that of Hugging Face's BertConfig
    if not isinstance(layers, int) or layers < config.language_layers:
        wrong.append(
            f"num_hidden_layers is {layers}, this model.language_layers is {config.language_layers}"
        )
    if wrong:
        raise ModelError(
            f"{Path(folder) / 'config.json'}: {'; '.join(wrong)}: use its sizes (and vocabulary), "
            "a BERT that fits, or leave an embedding that does not fit fresh (train.init_fresh)"
        )

    def rename(name: str) -> str | None:
        name = name.removeprefix("bert.")
        for old, new in _OLD_NAMES.items():
            name = name.replace(old, new)
        layer = _LAYER.match(name)
        deep = layer is not None and int(layer[1]) >= config.language_layers
        if deep or name == "embeddings.position_ids" or not is_part(f"lxmert.{name}", PARTS):
            return None
        return f"lxmert.{name}"

    return renamed(read_tensors(folder), rename, folder)

"""The vocabulary of a tokenizer of Hugging Face's, where its tokens are ours.

Data sets are tokenised as uncased BERT tokenises (shards/format/tokenizer.py). A vocabulary is
enough for that, so what is taken of a tokenizer is its vocabulary, once it is known that both give
the same tokens.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from shards.errors import DataError
from shards.format.tokenizer import SPECIAL, make_tokenizer, parse_vocab

log = logging.getLogger("lxscale")

_HUB_S = 10.0  # that the hub may take to say whether it has a name

_SUPPORTED = (
    "data sets are tokenised as uncased BERT's: name one of its kind (WordPiece, lower case), or "
    "give a vocab.txt with --vocab"
)
# Words, accents, punctuation, other scripts, unknown and overlong words, control characters.
_PROBES = (
    "What color is the man's T-shirt, red or blue?",
    "Crème brûlée naïve Ångström ÉCOLE straße İstanbul",
    "Is it 3.14% of $1,000 — or 'less'? (yes/no) [x] {y} @home #1 a_b",
    "東京 の猫 Привет мир مرحبا ไทย 🙂 ½ ﬁn e\u0301",
    "unaffable embeddings transformerizationally zzzzqqqq " + "x" * 120,
    "tab\there\u00a0and\u200bthere\u0000nul\ufffd",
    *"abcdefghijklmnopqrstuvwxyz",
)


def pretrained_vocab(name: str) -> list[str]:
    """Tokens in id order of a tokenizer for `transformers.AutoTokenizer`: a folder, or a name on
    Hugging Face's hub.

    Code that comes with a tokenizer is never run. DataError where it cannot be had, and where it
    does not tokenise as uncased BERT does.
    """
    tokenizer = _load(name)
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unsupported(name, f"a {type(tokenizer).__name__} without rules that can be read")
    rules = json.loads(backend.to_str())
    if problem := _other_rules(rules):
        raise _unsupported(name, problem)
    ids = backend.get_vocab(with_added_tokens=True)
    tokens = sorted(ids, key=lambda token: ids[token])
    if [ids[t] for t in tokens] != list(range(len(tokens))):
        raise _unsupported(name, f"one whose {len(tokens)} tokens are not numbered without gaps")
    if missing := [t for t in SPECIAL if t not in ids]:
        raise _unsupported(name, f"one without the token {missing[0]}")
    if parse_vocab("".join(f"{t}\n" for t in tokens).encode(), name) != tokens:
        raise _unsupported(name, "one with line ends in its tokens")
    ours = make_tokenizer(tokens)
    for text in _PROBES:
        theirs, due = backend.encode(text, add_special_tokens=False), ours.encode(text)
        if theirs.ids != due.ids:
            raise _unsupported(
                name, f"one that makes {theirs.tokens} of {text!r}, where BERT makes {due.tokens}"
            )
    return tokens


def _unsupported(name: str, what: str) -> DataError:
    return DataError(f"the tokenizer {name} is {what}: {_SUPPORTED}")


def _other_rules(rules: dict[str, Any]) -> str | None:
    """What a tokenizer of other rules than ours is; None for one of ours."""
    ours = json.loads(make_tokenizer(SPECIAL).to_str())
    model, due = rules["model"], ours["model"]
    if model["type"] != due["type"]:
        return f"of kind {model['type']}"
    for key in due.keys() - {"type", "vocab"}:
        if model.get(key) != due[key]:
            return f"WordPiece with {key} {model.get(key)!r} instead of {due[key]!r}"
    normalizer, due = rules["normalizer"] or {"type": "no"}, ours["normalizer"]
    # In lower case BERT strips accents unless it is told not to.
    if normalizer.get("strip_accents") is True:
        normalizer["strip_accents"] = None
    if not normalizer.get("lowercase"):
        return "a cased one"
    if normalizer != due:
        return f"WordPiece with the normaliser {normalizer}"
    if rules["pre_tokenizer"] != ours["pre_tokenizer"]:
        return f"WordPiece that splits words by {rules['pre_tokenizer']}"
    added = [t["content"] for t in rules["added_tokens"] if not t["special"]]
    return f"one with added tokens, as {added[0]!r}" if added else None


def _load(name: str) -> Any:
    import huggingface_hub
    import transformers  # slow to import, and needed here alone

    local = Path(name).is_dir()
    try:
        return _from(transformers, name, only_local=True)
    except Exception as error:
        if local:
            raise DataError(
                f"cannot load the tokenizer in {name} ({_first_line(error)}): give a folder that "
                "save_pretrained wrote, or a vocab.txt with --vocab"
            ) from None
        log.debug("%s is not in the hub's cache: %s", name, error)
    try:
        # One request first: transformers' own tries of a hub that is not there take a minute.
        huggingface_hub.HfApi().model_info(name, timeout=_HUB_S)
        return _from(transformers, name, only_local=False)
    except Exception as error:
        raise DataError(
            f"there is no folder {name}, and no tokenizer of that name can be had from Hugging "
            f"Face's hub ({_first_line(error)}): give a folder that save_pretrained wrote"
        ) from None


def _from(transformers: Any, name: str, only_local: bool) -> Any:
    return transformers.AutoTokenizer.from_pretrained(
        name, local_files_only=only_local, trust_remote_code=False
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"

"""Vocabularies of Hugging Face tokenizers: those that tokenise as we do, and those that do not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from cluster.cli.main import main
from shards.errors import DataError
from shards.format.pretrained import pretrained_vocab
from shards.format.tokenizer import SPECIAL, make_tokenizer
from tests.conftest import files_of

VOCAB = [*SPECIAL, *"abcdefghijklmnop", *(f"##{c}" for c in "abcdefgh"), "the", "red"]


def saved(folder: Path, tokenizer: Any) -> str:
    tokenizer.save_pretrained(folder)
    return str(folder)


def bert(folder: Path, vocab: list[str] = VOCAB, **options: Any) -> str:
    file = folder / "vocab.txt"
    file.write_text("".join(f"{t}\n" for t in vocab))
    return saved(folder / "saved", BertTokenizer(vocab=str(file), **options))


def test_berts_own(shared_data: Path, tmp_path: Path) -> None:
    file = shared_data / "bert-base-uncased-vocab.txt"
    folder = saved(tmp_path, BertTokenizer(vocab=str(file)))
    assert "".join(f"{t}\n" for t in pretrained_vocab(folder)).encode() == file.read_bytes()


def test_small_ones(tmp_path: Path) -> None:
    assert pretrained_vocab(bert(tmp_path)) == VOCAB
    ours = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(VOCAB), unk_token="[UNK]")
    assert pretrained_vocab(saved(tmp_path / "ours", ours)) == VOCAB


def test_a_folder_with_nothing_but_berts_files(tmp_path: Path) -> None:
    """As BERT's own releases have it: a vocabulary, and a configuration that names the model."""
    (tmp_path / "vocab.txt").write_text("".join(f"{t}\n" for t in VOCAB))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert pretrained_vocab(str(tmp_path)) == VOCAB


def gpt2(folder: Path) -> str:
    pieces = {t: i for i, t in enumerate(["<|endoftext|>", *"abcdefg"])}
    return saved(folder, GPT2Tokenizer(vocab=pieces, merges=[]))


def added(folder: Path) -> str:
    tokenizer = BertTokenizer.from_pretrained(bert(folder))
    tokenizer.add_tokens(["quux"])
    return saved(folder / "added", tokenizer)


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> str:
    """One of ours with other rules."""
    rules = json.loads(make_tokenizer(VOCAB).to_str())
    change(rules)
    backend = Tokenizer.from_str(json.dumps(rules))
    return saved(folder, PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"))


def without_mask(rules: dict[str, Any]) -> None:
    rules["model"]["vocab"]["[mask]"] = rules["model"]["vocab"].pop("[MASK]")


OTHERS: list[tuple[Callable[[Path], str], str]] = [
    (lambda folder: bert(folder, do_lower_case=False), "a cased one"),
    (gpt2, "of kind BPE"),
    (added, "added tokens, as 'quux'"),
    (lambda folder: bert(folder, strip_accents=False), "with the normaliser"),
    (lambda folder: bert(folder, tokenize_chinese_chars=False), "with the normaliser"),
    (
        lambda folder: changed(folder, lambda r: r["model"]["vocab"].update(extra=99)),
        "not numbered without gaps",
    ),
    (
        lambda folder: changed(folder, lambda r: r["model"].update(max_input_chars_per_word=7)),
        "max_input_chars_per_word 7",
    ),
    (
        lambda folder: changed(folder, lambda r: r.update(pre_tokenizer={"type": "Whitespace"})),
        "splits words by",
    ),
    (lambda folder: changed(folder, without_mask), r"without the token \[MASK\]"),
]


@pytest.mark.parametrize(("make", "message"), OTHERS)
def test_others_are_refused_with_what_they_are(
    tmp_path: Path, make: Callable[[Path], str], message: str
) -> None:
    folder = make(tmp_path)
    with pytest.raises(DataError, match=f"the tokenizer {folder} is .*{message}") as caught:
        pretrained_vocab(folder)
    assert "tokenised as uncased BERT's" in str(caught.value)


def test_what_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One error, no minutes of tries, nothing read but the tokenizer."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    pictures = tmp_path / "s.json"
    pictures.write_text("[]")
    for name in ("nobody/nothing", str(tmp_path / "none")):
        arguments = ["--features", str(tmp_path), "--features-format", "grid"]
        arguments += ["--sentences", str(pictures)]
        arguments += ["--tokenizer", name, "--out", str(tmp_path / "out")]
        assert main(["shards", "build", *arguments]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith(f"error: there is no folder {name}, and no tokenizer of that name")
    assert time.monotonic() - began < 30
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=f"cannot load the tokenizer in {empty}.*--vocab"):
        pretrained_vocab(str(empty))


def test_code_that_comes_along_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="cannot load the tokenizer"):
        pretrained_vocab(str(folder))
    assert not ran.exists()


def test_a_build_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    sentences = [{"text": "the red", "source": "coco_cap"}]
    (tmp_path / "s.json").write_text(json.dumps([{"image": "0.png", "sentences": sentences}]))
    arguments = [
        *("--features", str(tmp_path), "--sentences", str(tmp_path / "s.json")),
        *("--feature-option", "boxes=1", "--workers", "1", "--quiet"),
        *("--out", str(tmp_path / "out")),
    ]
    folder = bert(tmp_path)
    assert main(["shards", "build", *arguments, "--tokenizer", folder]) == 0
    assert (files_of(tmp_path / "out") / "vocab.txt").read_text().split("\n")[:-1] == VOCAB
    with pytest.raises(SystemExit):
        main(["shards", "build", *arguments, "--tokenizer", folder, "--vocab", "v.txt"])
    assert "not allowed with argument" in capsys.readouterr().err

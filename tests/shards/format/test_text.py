"""Vocabulary and answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shards.errors import DataError
from shards.format.answers import answer_index, load_answers, normalise_answer, normalise_answers
from shards.format.tokenizer import load_tokenizer, make_tokenizer, parse_vocab, train_vocab
from tests.conftest import subprocess_environment


def test_the_trained_vocabulary_does_not_depend_on_the_process(tmp_path: Path) -> None:
    script = (
        "import sys, hashlib\nfrom shards.format.tokenizer import train_vocab\n"
        "rows = [f'{a}{b} naïve grün {b}{a}x{i}' for i in range(40) for a in 'abcdefgh' "
        "for b in 'stuvw']\n"
        "rows = rows[::int(sys.argv[1])]\n"
        "print(hashlib.sha256('\\n'.join(train_vocab(rows, 400)).encode()).hexdigest())"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", script, order],
            env=subprocess_environment(PYTHONHASHSEED=seed, TOKENIZERS_PARALLELISM=parallel),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for order, seed, parallel in (("1", "1", "true"), ("-1", "2", "true"), ("1", "3", "false"))
    }
    assert len(hashes) == 1


def test_vocabulary() -> None:
    vocab = train_vocab(["the cat", "the cats", "[MASK] me"] * 3, 100)
    assert vocab[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(set(vocab)) == len(vocab) and "the" in vocab
    tokenizer = make_tokenizer(vocab)
    assert 4 not in tokenizer.encode("[MASK] the cat").ids  # data cannot speak special tokens
    with pytest.raises(DataError, match="no room"):
        train_vocab(["abcdefgh"], 12)


def test_berts_vocabulary_gives_berts_tokens(shared_data: Path) -> None:
    from transformers import BertTokenizer

    path = shared_data / "bert-base-uncased-vocab.txt"
    ours, theirs = load_tokenizer(path), BertTokenizer(vocab=str(path))
    for text in ("A very clean kitchen, isn't it?", "Crème brûlée 東京 unaffable!", "[MASK] x"):
        expected = theirs.tokenize(text.replace("[MASK]", "mask"))
        assert ours.encode(text.replace("[MASK]", "mask")).tokens == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n", r"v.txt has no \[MASK\]"),
        (b"[PAD]\na\nb\na\n", "line 2 and line 4"),
        (b"[PAD]\n\na\n", "empty line 2"),
        (b"\xff\n", "not UTF-8"),
    ],
)
def test_bad_vocabularies(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_vocab(data, "v.txt")


def test_answers_normal_form_and_table(shared_data: Path) -> None:
    forms = {
        "Two": "2", "a man": "man", "The Grey": "gray", " on.": "on", "an a1": "a1", "ten": "10",
        "none": "none", "another": "another",
    }  # fmt: skip
    assert {a: normalise_answer(a) for a in forms} == forms
    assert normalise_answers({"Gray": 0.3, "grey": 0.9, "a gray": 0.6, ".": 1}) == {"gray": 0.9}
    table = load_answers(shared_data / "lxmert_all_ans.json")
    assert len(table) == 9500
    index = answer_index(table)
    # Every entry in normal form finds itself.
    assert all(index[a] == i for i, a in enumerate(table) if normalise_answer(a) == a)
    assert answer_index(["A man", "man", "Yes"]) == {"man": 1, "yes": 2}

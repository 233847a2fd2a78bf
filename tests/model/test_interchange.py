"""Names, sizes and files of Hugging Face's model and of the released one."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from model.errors import ModelError
from model.interchange import is_part, read_config, read_lxmert, read_tensors
from tests.model.test_model import CONFIG


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.pth does not exist"):
        read_tensors(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ModelError, match=r"text\.pth is not a file of weights"):
        read_tensors(tmp_path / "text.pth")
    for content, message in (
        ({"config": 3}, r"no tensor under a parameter's name \(its first keys: 'config'\)"),
        ({0: torch.zeros(2), 1: torch.ones(2)}, r"a parameter's name \(its first keys: 0, 1\)"),
        ({"model": {0: torch.zeros(2)}}, r"a parameter's name \(its first keys: 0\)"),
        ({}, r"a parameter's name \(its first keys: none\)"),
        ([torch.zeros(2)], "holds a list, not weights by name"),
        (torch.zeros(2), "holds a Tensor, not weights by name"),
    ):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ModelError, match=rf"other\.pth .*{message}.* state_dict$"):
            read_tensors(tmp_path / "other.pth")
    for text in ("[1]", "hello"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=r"config\.json"):
            read_config(tmp_path)


def test_weights_in_a_training_scripts_file_are_read(tmp_path: Path) -> None:
    """In a wrapper, and beside what is no weight."""
    weights, path = {"a.b": torch.ones(2)}, tmp_path / "w.pth"
    beside = {0: torch.zeros(3), 1: "x", "epoch": 3, "lr": [0.1]}
    for content in (
        weights | beside,
        {"model": weights} | beside,
        {"state_dict": weights | beside, "loss": torch.zeros(())},
        {"model_state_dict": weights},
        {"module": {"model": weights}, "optimizer": {"state": {0: torch.zeros(2)}}},
    ):
        torch.save(content, path)
        assert {k: w.tolist() for k, w in read_tensors(path).items()} == {"a.b": [1.0, 1.0]}


def test_torchs_advice_is_not_passed_on(tmp_path: Path) -> None:
    """To unpickle all the same is what nobody should do."""
    path = tmp_path / "w.bin"
    torch.save({"a": torch.zeros(2), "args": argparse.Namespace(lr=1)}, path)
    whole = path.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    for data in (whole, whole[:300], pickle.dumps({"a": Path("b")}, 2), pointer, b"hello", b""):
        path.write_bytes(data)
        with pytest.raises(ModelError, match=r"w\.bin is not a file of weights: .*state_dict") as e:
            read_tensors(path)
        assert "weights_only" not in str(e.value) and "trust" not in str(e.value)


def sharded(folder: Path, kind: str) -> Path:
    """A folder with two tensors, in a file each."""
    write: Any = torch.save if kind.endswith(".bin") else safetensors.torch.save_file
    files = [f"{i}-of-2.{kind.rsplit('.', 1)[1]}" for i in (1, 2)]
    for i, (name, file) in enumerate(zip("ab", files, strict=True)):
        write({name: torch.full((2,), float(i))}, folder / file)
    weight_map = dict(zip("ab", files, strict=True))
    (folder / f"{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_weights_in_several_files_are_read(tmp_path: Path, kind: str) -> None:
    found = read_tensors(sharded(tmp_path, kind))
    assert {k: w.tolist() for k, w in found.items()} == {"a": [0.0, 0.0], "b": [1.0, 1.0]}
    file = next(tmp_path.glob("2-of-2.*"))
    file.unlink()
    with pytest.raises(ModelError, match=f"{file.name} does not exist"):
        read_tensors(tmp_path)
    for text in (
        "{}",
        "[]",
        "hello",
        '{"weight_map": {"a": "../w.bin"}}',
        '{"weight_map": {"a": 1}}',
    ):
        (tmp_path / f"{kind}.index.json").write_text(text)
        with pytest.raises(ModelError, match=r"index\.json"):
            read_tensors(tmp_path)


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return open, (str(tmp_path / "sprung"), "w")

    torch.save({"a": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ModelError, match=r"trap\.pth"):
        read_tensors(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


def test_released_names_become_ours(tmp_path: Path) -> None:
    names = ("module.bert.pooler.dense.bias", "answer_head.logit_fc.3.bias", "cls.predictions.bias")
    weights = {name: torch.full((2,), float(i)) for i, name in enumerate(names)}
    torch.save({**weights, "bert.embeddings.position_ids": torch.arange(3)}, tmp_path / "w.pth")
    found = read_lxmert(tmp_path / "w.pth", {}, CONFIG, ())
    assert list(found) == ["lxmert.pooler.dense.bias", *names[1:]]
    assert [float(w[0]) for w in found.values()] == [0.0, 1.0, 2.0]


def test_a_part_is_whole_names() -> None:
    assert is_part("answer_head.logit_fc.3.bias", ["cls", "answer_head.logit_fc.3"])
    assert is_part("cls.predictions.bias", ["cls.predictions.bias"]) and is_part("a.b", ["a."])
    assert not is_part("answer_head.logit_fc.30.bias", ["answer_head.logit_fc.3", "answer"])

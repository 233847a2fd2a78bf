"""Weights to and from Hugging Face's model and the released file's layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from model.errors import ModelError
from model.interchange import load_huggingface, load_weights_for, read_weights, save_huggingface
from model.lxmert import LxmertForPreTraining
from tests.model.test_model import CONFIG, close, make_batch, make_model, padded


def test_an_export_is_what_hugging_face_loads(tmp_path: Path) -> None:
    model = make_model().eval()
    save_huggingface(tmp_path, model)
    theirs, report = transformers.LxmertForPreTraining.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    batch = make_batch()
    with torch.no_grad():
        ours, *_ = model.encode(batch)
        hidden = theirs.eval().lxmert(**padded(batch))
    close(ours.pooled, hidden.pooled_output)


def test_what_hugging_face_saves_comes_back_equal(tmp_path: Path) -> None:
    model = make_model()
    save_huggingface(tmp_path / "ours", model)
    theirs = transformers.LxmertForPreTraining.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_huggingface(tmp_path / "theirs")
    assert again.config == model.config
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_released_layout_loads(tmp_path: Path, prefix: str) -> None:
    model = make_model(1)
    released = {
        prefix + name.replace("lxmert.", "bert.", 1): value
        for name, value in model.state_dict().items()
    }
    torch.save(released, tmp_path / "model_LXRT.pth")
    other = LxmertForPreTraining(CONFIG)
    load_weights_for(other, tmp_path / "model_LXRT.pth")
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_key_or_shape_that_does_not_fit_is_named(tmp_path: Path) -> None:
    model = make_model()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    path = tmp_path / "w.safetensors"

    def saved(changed: dict[str, torch.Tensor]) -> Path:
        safetensors.torch.save_file({k: v.clone() for k, v in changed.items()}, path)
        return path

    bias = "answer_head.logit_fc.3.bias"
    without = {k: v for k, v in weights.items() if k != bias}
    with pytest.raises(ModelError, match=rf"w\.safetensors has no {bias}"):
        load_weights_for(model, saved(without))
    with pytest.raises(ModelError, match=r"has extra\.weight"):
        load_weights_for(model, saved(weights | {"extra.weight": torch.zeros(1)}))
    with pytest.raises(ModelError, match=rf"{bias} is \[12\], this model's is \[11\]"):
        load_weights_for(model, saved(weights | {bias: torch.zeros(12)}))


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.pth does not exist"):
        read_weights(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ModelError, match=r"text\.pth is not a file of weights"):
        read_weights(tmp_path / "text.pth")
    torch.save({"config": 3}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match=r"other\.pth is not a dictionary of tensors"):
        read_weights(tmp_path / "other.pth")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match=r"config\.json is not the configuration of an LXMERT"):
        load_huggingface(tmp_path)


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return open, (str(tmp_path / "sprung"), "w")

    torch.save({"a": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ModelError, match=r"trap\.pth"):
        read_weights(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()

"""A run's model: random weights, another LXMERT's, a BERT's, or a part of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from model.config import ModelConfig
from model.errors import ModelError
from model.interchange import config_to_huggingface
from model.lxmert import Lxmert, init_weights
from model.packing import Rows
from tests.model.test_model import CONFIG, close, make_batch, make_model, padded
from trainer.config import parse_config
from trainer.errors import ConfigError
from trainer.export import write_model
from trainer.initial import read_source, take_weights
from trainer.model import build_model

EMBEDDING = "lxmert.embeddings.word_embeddings.weight"
DECODER = "cls.predictions.decoder.weight"
ANSWERS = "answer_head.logit_fc.3"
BERT_SIZES: dict[str, Any] = {
    "vocab_size": CONFIG.vocab_size,
    "hidden_size": CONFIG.hidden_size,
    "num_attention_heads": CONFIG.num_heads,
    "intermediate_size": CONFIG.intermediate_size,
    "max_position_embeddings": CONFIG.max_positions,
    "num_hidden_layers": CONFIG.language_layers + 1,
}


def load(model: Lxmert, path: Path, fresh: Sequence[str] = (), **more: Any) -> None:
    take_weights(model, read_source(path, model.config, fresh), fresh, **more)


def built(config: ModelConfig, seed: int, path: Path, **more: Any) -> Lxmert:
    model = build_model(config, seed)
    load(model, path, **more)
    return model


def equal(a: Lxmert, b: Lxmert, *but: str) -> None:
    """Bitwise, but for the parameters named, which differ somewhere."""
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y) != (name in but), name


def saved(path: Path, weights: dict[str, torch.Tensor]) -> Path:
    safetensors.torch.save_file({k: v.detach().clone() for k, v in weights.items()}, path)
    return path


# --- an LXMERT's --------------------------------------------------------------------------------


def test_hugging_face_loads_what_we_write(tmp_path: Path) -> None:
    model = make_model().eval()
    write_model(tmp_path, model)
    theirs, report = transformers.LxmertForPreTraining.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    batch = make_batch()
    with torch.no_grad():
        ours = model.encode(batch)
        hidden = theirs.eval().lxmert(**padded(batch))
    close(ours.pooled, hidden.pooled_output)


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_what_hugging_face_saves_comes_back_equal(tmp_path: Path, size: str) -> None:
    """In one file or in several."""
    model = make_model()
    (tmp_path / "ours").mkdir()
    write_model(tmp_path / "ours", model)
    theirs = transformers.LxmertForPreTraining.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == (size == "20KB")
    tree = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config_to_huggingface(model).items() <= tree.items()
    equal(built(CONFIG, 9, tmp_path / "theirs"), model)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_released_layout_loads(tmp_path: Path, prefix: str) -> None:
    model = make_model(1)
    released = {
        prefix + name.replace("lxmert.", "bert.", 1): value
        for name, value in model.state_dict().items()
    }
    for content in (released, {"model": released, "epoch": 3}, {0: torch.zeros(1), **released}):
        torch.save(content, tmp_path / "model_LXRT.pth")
        equal(built(CONFIG, 9, tmp_path / "model_LXRT.pth"), model)


def test_an_older_folder_with_a_bin_loads(tmp_path: Path) -> None:
    model = make_model()
    write_model(tmp_path, model)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    equal(built(CONFIG, 9, tmp_path), model)


def test_a_key_or_shape_that_does_not_fit_is_named(tmp_path: Path) -> None:
    model = make_model()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    path = tmp_path / "w.safetensors"
    bias = f"{ANSWERS}.bias"
    without = {k: v for k, v in weights.items() if k != bias}
    with pytest.raises(ModelError, match=rf"w\.safetensors has no {bias}.*train\.init_fresh"):
        load(model, saved(path, without))
    with pytest.raises(ModelError, match=r"has extra\.weight"):
        load(model, saved(path, weights | {"extra.weight": torch.zeros(1)}))
    message = rf"{bias} is \[12\], this model's is \[11\].*train\.init_fresh"
    with pytest.raises(ModelError, match=message):
        load(model, saved(path, weights | {bias: torch.zeros(12)}))


def test_weights_that_only_seem_to_fit_are_refused(tmp_path: Path) -> None:
    model = make_model()
    weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
    bias = "lxmert.pooler.dense.bias"
    for changed, message in (
        ({DECODER: weights[DECODER] + 1}, f"{DECODER} differs from {EMBEDDING}"),
        ({"bert.pooler.dense.bias": weights[bias] + 1}, f"has {bias} twice"),
        ({bias: torch.zeros(24, dtype=torch.int64)}, f"{bias} is torch.int64"),
    ):
        torch.save(weights | changed, tmp_path / "w.pth")
        other = make_model(1)
        before = {k: v.clone() for k, v in other.state_dict().items()}
        with pytest.raises(ModelError, match=rf"w\.pth.*{message}"):
            load(other, tmp_path / "w.pth")
        for k, v in other.state_dict().items():
            assert torch.equal(v, before[k]), k


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is relu, LXMERT's is gelu"),
        ({"num_attention_heads": 4}, r"num_attention_heads is 4, this model\.num_heads is 3"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    write_model(tmp_path, make_model())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=rf"config\.json: .*{message}"):
        built(CONFIG, 0, tmp_path)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, wrong: float) -> None:
    for name in (f"{ANSWERS}.bias", EMBEDDING):
        weights = {k: v.detach().clone() for k, v in make_model().state_dict().items()}
        weights[name].view(-1)[-1] = wrong
        if name == EMBEDDING:
            weights[DECODER] = weights[name]
        path = saved(tmp_path / "w.safetensors", weights)
        with pytest.raises(ModelError, match=rf"w\.safetensors: {name} has .*not finite"):
            built(CONFIG, 9, path)
        # What is not taken does not matter.
        if name != EMBEDDING:
            built(CONFIG, 9, path, fresh=["answer_head"])


def test_a_trunk_alone_gives_the_trunk(tmp_path: Path) -> None:
    """As AutoModel's save_pretrained writes what we export: names without a prefix."""
    model = make_model()
    write_model(tmp_path, model)
    transformers.AutoModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "trunk")
    found, random = built(CONFIG, 9, tmp_path / "trunk"), build_model(CONFIG, 9)
    for name, p in found.named_parameters():
        expected = model if name.startswith("lxmert.") else random
        assert torch.equal(p, expected.get_parameter(name)), name


# --- a part of them -----------------------------------------------------------------------------


def test_fresh_parts_keep_their_random_weights(tmp_path: Path) -> None:
    """Whatever the file has of them: nothing, other sizes, or other names."""
    model = make_model()
    weights = dict(model.state_dict())
    path = tmp_path / "w.safetensors"
    wide = {f"{ANSWERS}.weight": torch.zeros(12, 48), f"{ANSWERS}.bias": torch.zeros(12)}
    none = {k: v for k, v in weights.items() if not k.startswith("answer_head")}
    random = build_model(CONFIG, 9)
    for changed in (weights, weights | wide, none, weights | {"answer_head.extra": torch.ones(2)}):
        found = built(CONFIG, 9, saved(path, changed), fresh=["answer_head"])
        for name, p in found.named_parameters():
            expected = random if name.startswith("answer_head.") else model
            assert torch.equal(p, expected.get_parameter(name)), name


def test_fresh_words_leave_the_tied_decoder_fresh(tmp_path: Path) -> None:
    model = make_model()
    weights = dict(model.state_dict())
    words = {EMBEDDING: torch.zeros(7, 24), DECODER: torch.ones(7, 24)}
    bias = {"cls.predictions.bias": torch.zeros(7)}
    path = saved(tmp_path / "w.safetensors", weights | words | bias)
    found = built(CONFIG, 9, path, fresh=[EMBEDDING, "cls.predictions.bias"])
    equal(found, model, EMBEDDING, DECODER, "cls.predictions.bias")
    assert torch.equal(
        found.cls.predictions.decoder.weight, build_model(CONFIG, 9).get_parameter(EMBEDDING)
    )


def test_a_table_of_other_entries_takes_rows(tmp_path: Path) -> None:
    """As fine-tuning takes the answers that both tables have."""
    model = make_model()
    write_model(tmp_path, model)
    config = CONFIG.model_copy(update={"num_answers": 4})
    take = torch.tensor([3, -1, 10, 3])
    rows = {f"{ANSWERS}.weight": take, f"{ANSWERS}.bias": take}
    found, random = built(config, 9, tmp_path, rows=rows), build_model(config, 9)
    for name, p in found.named_parameters():
        theirs = model.get_parameter(name)
        if name in rows:
            assert torch.equal(p[[0, 2, 3]], theirs[[3, 10, 3]])
            assert torch.equal(p[1], random.get_parameter(name)[1])
        else:
            assert torch.equal(p, theirs), name
    for wrong in (take[:3], take + 1):
        with pytest.raises(ModelError, match=rf"{ANSWERS}\.bias is \[11\], .* is \[4\]"):
            built(config, 9, tmp_path, rows={f"{ANSWERS}.bias": wrong})
    with pytest.raises(ModelError, match=r"has no answers\.bias"):
        built(config, 9, tmp_path, rows={**rows, "answers.bias": take})


def test_a_part_that_the_model_has_not_is_named(tmp_path: Path) -> None:
    write_model(tmp_path, make_model())
    message = r"train\.init_fresh: .* no parameter answer_hed .*answer_head, cls, lxmert"
    with pytest.raises(ModelError, match=message):
        built(CONFIG, 0, tmp_path, fresh=["answer_head", "answer_hed"])
    tree = {"data": {"train": "d"}, "train": {"steps": 1, "init_fresh": ["answer_head"]}}
    with pytest.raises(ConfigError, match=r"train\.init_fresh goes with train\.init_from"):
        parse_config(tree, "test")


# --- a BERT's -----------------------------------------------------------------------------------


def bert(kind: Any = transformers.BertModel, **changes: Any) -> Any:
    return kind(transformers.BertConfig(**BERT_SIZES | changes))


def from_bert(model: Lxmert, theirs: Any) -> None:
    """Embeddings and language layers are the BERT's, all else is random."""
    random = build_model(CONFIG, 9)
    for name, p in model.named_parameters():
        if name.startswith(("lxmert.embeddings.", "lxmert.encoder.layer.")):
            expected = theirs.get_parameter(name.removeprefix("lxmert."))
            assert not torch.equal(p, random.get_parameter(name)) or p.dim() == 1, name
        else:
            expected = random.get_parameter(name)
        assert torch.equal(p, expected), name
    assert model.cls.predictions.decoder.weight is model.lxmert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("kind", [transformers.BertModel, transformers.BertForPreTraining])
def test_a_bert_gives_embeddings_and_language_layers(tmp_path: Path, kind: Any) -> None:
    theirs = bert(kind)
    theirs.save_pretrained(tmp_path)
    trunk = theirs if kind is transformers.BertModel else theirs.bert
    model = built(CONFIG, 9, tmp_path)
    from_bert(model, trunk)
    # And they compute what BERT computes.
    ids = torch.tensor([[2, 5, 7, 3]])
    with torch.no_grad():
        x = model.eval().lxmert.embeddings(ids[0], torch.arange(4))
        for layer in model.lxmert.encoder.layer:
            x = layer(x, Rows(torch.tensor([4]), 4, 4))
        hidden = trunk.eval()(ids, output_hidden_states=True).hidden_states
    close(x, hidden[CONFIG.language_layers][0])


def test_an_old_bert_loads(tmp_path: Path) -> None:
    """A pickle with the names of 2018, and a buffer."""
    theirs = bert()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    old = {
        f"bert.{k}".replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v
        for k, v in theirs.state_dict().items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(16)
    torch.save(old, tmp_path / "pytorch_model.bin")
    from_bert(built(CONFIG, 9, tmp_path), theirs)


@pytest.mark.parametrize("kind", [transformers.BertModel, transformers.BertForPreTraining])
def test_a_bert_without_its_configuration_is_named(tmp_path: Path, kind: Any) -> None:
    bert(kind).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(ModelError, match=r"BERT.*config\.json"):
            built(CONFIG, 9, path)


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        ({"vocab_size": 51}, [r"vocab_size is 51, this model\.vocab_size is 50"]),
        (
            {"hidden_size": 32, "num_attention_heads": 4},
            ["hidden_size is 32, .* is 24", r"num_attention_heads is 4, .*num_heads is 3"],
        ),
        ({"intermediate_size": 48}, ["intermediate_size is 48, .* is 40"]),
        (
            {"max_position_embeddings": 32},
            [r"max_position_embeddings is 32, .*max_positions is 16"],
        ),
        ({"type_vocab_size": 1}, ["type_vocab_size is 1, .* is 2"]),
        ({"num_hidden_layers": 1}, [r"num_hidden_layers is 1, .*language_layers is 2"]),
        ({"hidden_act": "relu"}, ["hidden_act is relu, LXMERT's is gelu"]),
        ({"model_type": "roberta"}, ["an LXMERT or a BERT: its model_type is roberta"]),
    ],
)
def test_a_bert_that_does_not_fit_is_named(
    tmp_path: Path, change: dict[str, Any], messages: list[str]
) -> None:
    bert().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for message in messages:
        with pytest.raises(ModelError, match=rf"config\.json.*{message}"):
            built(CONFIG, 9, tmp_path)


def test_a_bert_of_another_vocabulary_leaves_the_words_fresh(tmp_path: Path) -> None:
    theirs = bert(vocab_size=99)
    theirs.save_pretrained(tmp_path)
    model = built(CONFIG, 9, tmp_path, fresh=[EMBEDDING])
    random = build_model(CONFIG, 9)
    assert torch.equal(model.get_parameter(EMBEDDING), random.get_parameter(EMBEDDING))
    name = "embeddings.position_embeddings.weight"
    assert torch.equal(model.get_parameter(f"lxmert.{name}"), theirs.get_parameter(name))


def test_random_weights_are_those_of_the_seed() -> None:
    by_hand = Lxmert(CONFIG)
    init_weights(by_hand, 9)
    equal(build_model(CONFIG, 9), by_hand)

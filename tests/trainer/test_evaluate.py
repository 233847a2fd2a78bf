"""What comes out of a trained run: metrics, predictions, a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from cluster.cli.main import main
from shards.dataset import open_dataset
from shards.errors import DataError
from shards.format.build import BuildSettings, build
from shards.format.tokenizer import encode_batch, load_tokenizer
from shards.store import objects
from tests.conftest import files_of, small_records, subprocess_environment
from tests.ranks import config_tree, run_ranks
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.generations import find_generation, load_weights
from trainer.errors import ConfigError
from trainer.export import export_huggingface, write_tokenizer
from trainer.model import load_checkpoint
from trainer.predict import evaluate_checkpoint, predict


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a training set, a held-out set with the same vocabulary and a run."""
    root = tmp_path_factory.mktemp("evaluate")
    records = small_records(40, labels=True)
    build(records[:30], root / "train", BuildSettings("t", "test", images_per_shard=10))
    settings = BuildSettings(
        "v",
        "test",
        vocab=files_of(root / "train") / "vocab.txt",
        answers=json.loads((files_of(root / "train") / "answers.json").read_text()),
        images_per_shard=4,
    )
    build(records[30:], root / "test", settings)
    tree = config_tree(
        root / "train",
        root,
        "run",
        data={"validation": str(root / "test")},
        model={"max_positions": 24},
        train={"validate_every": 4, "validation_batch": 7, "zero_stage": 3},
    )
    assert not run_ranks(2, [(tree, None, False)])
    return root


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    assert main(["checkpoint", "export", str(trained / "run"), "--out", str(trained / "hf")]) == 0
    return trained / "hf"


def logged_validation(run: Path) -> dict[str, float]:
    """The last validation that the run wrote for TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        if tag.startswith("validation/"):
            points = events.Scalars(tag)
            assert [p.step for p in points] == [4, 8]
            found[tag.removeprefix("validation/")] = points[-1].value
    return found


def test_metrics_do_not_depend_on_who_computes_them(trained: Path) -> None:
    """Two ZeRO-3 workers in training, one process with another batch size afterwards."""
    test = str(trained / "test")
    every = evaluate_checkpoint(str(trained / "run"), test, batch_size=64)
    behaviour = {name for name in every if name.startswith("accuracy/objects/")}
    assert behaviour and all(0 <= every[name] <= 1 for name in behaviour)
    one = {name: value for name, value in every.items() if name.count("/") == 1}
    assert set(one) == {
        *(f"loss/{n}" for n in ("masked_lm", "masked_feature", "masked_object")),
        *(f"loss/{n}" for n in ("masked_attribute", "matching", "qa")),
        *(f"accuracy/{n}" for n in ("masked_lm", "masked_object", "masked_attribute")),
        "accuracy/matching",
        "accuracy/qa",
    }
    other = evaluate_checkpoint(str(trained / "run"), test, batch_size=5)
    assert other == pytest.approx(every, rel=1e-5)
    assert logged_validation(trained / "run") == pytest.approx(one, rel=1e-4)


def test_predictions_name_every_question_and_give_the_accuracy(trained: Path) -> None:
    out = trained / "predictions.json"
    metrics = evaluate_checkpoint(str(trained / "run"), str(trained / "test"))
    predict(str(trained / "run"), str(trained / "test"), out)
    predictions = json.loads(out.read_text())
    data = open_dataset(str(trained / "test"), trained / "cache")
    truth = {}
    for image in range(data.manifest.images):
        for sentence in json.loads(data.record(image))["sentences"]:
            if "answers" in sentence:
                truth[sentence["id"]] = (sentence["text"], sentence["answers"])
    assert {p["question_id"] for p in predictions} == truth.keys()
    scores = [truth[p["question_id"]][1].get(p["answer"], 0.0) for p in predictions]
    assert all(truth[p["question_id"]][0] == p["question"] for p in predictions)
    assert np.mean(scores) == pytest.approx(metrics["accuracy/qa"], rel=1e-6)


def test_blind_takes_the_features_away(trained: Path) -> None:
    seeing = evaluate_checkpoint(str(trained / "run"), str(trained / "test"))
    blind = evaluate_checkpoint(str(trained / "run"), str(trained / "test"), blind=True)
    assert blind["loss/qa"] != seeing["loss/qa"]
    # Zeroed features are easy to regress to: the targets are zero too.
    assert blind["loss/masked_feature"] != seeing["loss/masked_feature"]


def test_an_export_has_the_weights_of_the_checkpoint(trained: Path, exported: Path) -> None:
    theirs = transformers.LxmertForPreTraining.from_pretrained(exported).state_dict()
    weights = load_weights(find_generation(str(trained / "run")))
    for name, value in weights.items():
        np.testing.assert_array_equal(theirs[name].numpy(), value)
    model, config, _ = load_checkpoint(str(trained / "run"))
    assert config.model.num_answers == model.config.num_answers == 4
    with torch.no_grad():
        assert torch.isfinite(torch.cat([p.flatten() for p in model.parameters()])).all()


def test_an_export_is_a_model_and_its_tokenizer(trained: Path, exported: Path) -> None:
    """A question, tokenized and answered by transformers alone, without a network."""
    script = """
import socket, sys
import numpy, torch, transformers
def refused(*_): raise AssertionError("opened a connection")
socket.socket.connect = refused
folder, out = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
trunk = transformers.AutoModel.from_pretrained(folder)
whole = transformers.LxmertForPreTraining.from_pretrained(folder)
assert type(trunk).__name__ == "LxmertModel" and tokenizer.model_max_length == 20
inputs = tokenizer(["what color is it 3?", "a red circle"], padding=True, return_tensors="pt")
seen = dict(visual_feats=torch.rand(2, 3, 8), visual_pos=torch.rand(2, 3, 4))
with torch.no_grad():
    answers = whole(**inputs, **seen).question_answering_score
    pooled = trunk(**inputs, **seen).pooled_output
numpy.savez(out, answers=answers, pooled=pooled, **inputs, **seen)
"""
    out = trained / "theirs.npz"
    environment = subprocess_environment(HF_HUB_OFFLINE="1")
    subprocess.run(
        [sys.executable, "-c", script, str(exported), str(out)], env=environment, check=True
    )
    found = {k: torch.from_numpy(v) for k, v in np.load(out).items()}
    tokenizer = load_tokenizer(files_of(trained / "train") / "vocab.txt")
    cls, sep = (tokenizer.token_to_id(t) for t in ("[CLS]", "[SEP]"))
    own = encode_batch(tokenizer, ["what color is it 3?", "a red circle"], 18)
    mask = found["attention_mask"].bool()
    for ids, real, words in zip(found["input_ids"], mask, own, strict=True):
        assert ids[real].tolist() == [cls, *words, sep]
    model, *_ = load_checkpoint(str(trained / "run"))
    model.eval()
    with torch.no_grad():
        trunk = model.lxmert(found["input_ids"], mask, found["visual_feats"], found["visual_pos"])
        answers = model.answer_head(trunk.pooled)
    torch.testing.assert_close(trunk.pooled, found["pooled"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(answers, found["answers"], rtol=1e-5, atol=1e-5)


def test_an_exported_tokenizer_gives_the_ids_of_training(shared_data: Path, tmp_path: Path) -> None:
    """Over BERT's vocabulary and real sentences, long ones and other scripts among them."""
    vocab = shared_data / "bert-base-uncased-vocab.txt"
    write_tokenizer(tmp_path, vocab.read_bytes(), 20)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "lxmert"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    captions = next((shared_data / "tiny_coco").rglob("captions*.json"))
    texts = [a["caption"] for a in json.loads(captions.read_text())["annotations"]]
    assert len(texts) > 100
    texts += [
        "Übergröße, naïve  café\t\u200b—北京 😀?!",
        "x" * 101,
        "isn't #hashtag_9",
        "word " * 30,
        "",
    ]
    ours = encode_batch(load_tokenizer(vocab), texts, 18)
    found = theirs(texts, truncation=True)["input_ids"]
    assert found == [[101, *words, 102] for words in ours]
    assert max(map(len, found)) == 20 and (theirs.mask_token_id, theirs.pad_token_id) == (103, 0)


def test_an_export_without_its_vocabulary_writes_nothing(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    (run / "vocab.txt").write_bytes((run / "vocab.txt").read_bytes() + b"more\n")
    with pytest.raises(CheckpointError, match=r"vocab\.txt is not the vocabulary"):
        export_huggingface(str(run), tmp_path / "out")
    (run / "vocab.txt").unlink()
    with pytest.raises(CheckpointError, match=r"vocab\.txt does not exist.*copy the training"):
        export_huggingface(str(run), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_that_fails_leaves_no_half(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in a new folder nor over an earlier export."""

    def broken(folder: Path, vocab: bytes, max_tokens: int) -> None:
        (folder / "tokenizer.json").write_text("{")
        raise OSError("no space left")

    run, out = str(trained / "run"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("trainer.export.write_tokenizer", broken)
        with pytest.raises(DataError, match=f"cannot write {out}: no space left"):
            export_huggingface(run, out)
        assert not list(out.glob("*"))
    export_huggingface(run, out)
    files = {p.name: p.read_bytes() for p in out.iterdir()}
    assert files.keys() >= {"config.json", "model.safetensors", "tokenizer.json", "vocab.txt"}
    with monkeypatch.context() as patch:
        patch.setattr("trainer.export.write_tokenizer", broken)
        with pytest.raises(DataError, match=f"cannot write {out}: no space left"):
            export_huggingface(run, out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == files
    export_huggingface(run, out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == files


FULL = """
import resource, signal, sys
from cluster.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
sys.exit(main(["checkpoint", "export", *sys.argv[1:]]))
"""


def test_an_export_that_cannot_be_written_is_one_error(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(trained / "run"), tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", FULL, run, "--out", str(out)],
        env=subprocess_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: cannot write {out}: " in done.stderr and "room" in done.stderr
    assert not out.exists()
    (tmp_path / "file").touch()
    assert main(["checkpoint", "export", run, "--out", str(tmp_path / "file")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: cannot write {tmp_path / 'file'}: File exists")
    export_huggingface(run, out)
    before = {p.name for p in out.iterdir()}
    (out / "vocab.txt").unlink()
    (out / "vocab.txt").mkdir()
    assert main(["checkpoint", "export", run, "--out", str(out)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {out / 'vocab.txt'} is a folder") and "remove it" in error
    assert {p.name for p in out.iterdir()} == before  # the earlier export is as it was
    (out / "vocab.txt").rmdir()
    (out / "config.json").unlink()
    (out / "config.json").mkdir()
    assert main(["checkpoint", "export", run, "--out", str(out)]) == 2
    assert f"error: {out / 'config.json'} is a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", "{}"),  # a data set's
        ("special_tokens_map.json", '{"cls_token": "<s>"}'),  # would be read with ours
        ("config.json", '{"model_type": "bert"}'),
        ("config.json", "[]"),
    ],
)
def test_an_export_replaces_nothing_but_an_export(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    assert main(["checkpoint", "export", str(trained / "run"), "--out", str(tmp_path)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path} has " in error and name in error and "name a new folder" in error
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == content


def test_an_export_is_for_all_that_the_umask_allows(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    due = (tmp_path / "other").stat().st_mode
    assert {p.stat().st_mode for p in exported.iterdir()} == {due}


def test_an_export_to_s3_has_the_same_bytes(exported: Path, trained: Path, s3: str) -> None:
    assert main(["checkpoint", "export", str(trained / "run"), "--out", f"{s3}/hf/"]) == 0
    assert objects.list_names(f"{s3}/hf") == sorted(p.name for p in exported.iterdir())
    for path in exported.iterdir():
        assert objects.read_bytes(f"{s3}/hf/{path.name}") == path.read_bytes()


def test_without_its_data_an_export_knows_the_models_length(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    (trained / "train").rename(trained / "away")
    try:
        export_huggingface(str(run), tmp_path / "out")
    finally:
        (trained / "away").rename(trained / "train")
    tree = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tree["model_max_length"] == 24


def test_a_data_set_of_another_vocabulary_is_refused(trained: Path) -> None:
    other = trained / "other"
    build(small_records(9, seed=3), other, BuildSettings("o", "test", vocab_size=65))
    with pytest.raises(ConfigError, match="another vocabulary"):
        evaluate_checkpoint(str(trained / "run"), str(other))


def test_the_command_line_says_what_is_wrong(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error_of(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line

    run, test = str(trained / "run"), str(trained / "test")
    assert "no checkpoint under" in error_of("evaluate", str(tmp_path / "x"), "--data", test)
    assert "no data set at" in error_of("evaluate", run, "--data", str(tmp_path / "y"))
    assert "absent.yaml" in error_of("train", str(tmp_path / "absent.yaml"))
    (tmp_path / "run.yaml").write_text("data: {train: x}\ntrain: {steps: 1, stepz: 2}\n")
    assert "train.stepz: no such key" in error_of("train", str(tmp_path / "run.yaml"))
    assert main(["evaluate", run, "--data", test, "--cache", str(trained / "cache")]) == 0
    shown = capsys.readouterr().out
    assert "accuracy/qa" in shown and "loss/masked_lm" in shown

"""What comes out of a trained run: metrics, predictions, a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from cluster.cli.main import main
from shards.dataset import open_dataset
from shards.format.build import BuildSettings, build
from tests.conftest import small_records
from tests.ranks import config_tree, run_ranks
from trainer.checkpoint.generations import find_generation, load_weights
from trainer.config import ConfigError
from trainer.export import evaluate_checkpoint, load_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a training set, a held-out set with the same vocabulary and a run."""
    root = tmp_path_factory.mktemp("evaluate")
    records = small_records(40, labels=True)
    build(records[:30], root / "train", BuildSettings("t", "test", images_per_shard=10))
    settings = BuildSettings(
        "v",
        "test",
        vocab=root / "train" / "vocab.txt",
        answers=json.loads((root / "train" / "answers.json").read_text()),
        images_per_shard=4,
    )
    build(records[30:], root / "test", settings)
    tree = config_tree(
        root / "train",
        root,
        "run",
        data={"validation": str(root / "test")},
        train={"validate_every": 4, "validation_batch": 7, "zero_stage": 3},
    )
    assert not run_ranks(2, [(tree, None, False)])
    return root


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
    one = evaluate_checkpoint(str(trained / "run"), test, batch_size=64)
    assert set(one) == {
        *(f"loss/{n}" for n in ("masked_lm", "masked_feature", "masked_object")),
        *(f"loss/{n}" for n in ("masked_attribute", "matching", "qa")),
        *(f"accuracy/{n}" for n in ("masked_lm", "masked_object", "masked_attribute")),
        "accuracy/matching",
        "accuracy/qa",
    }
    other = evaluate_checkpoint(str(trained / "run"), test, batch_size=5)
    assert other == pytest.approx(one, rel=1e-5)
    assert logged_validation(trained / "run") == pytest.approx(one, rel=1e-4)


def test_predictions_name_every_question_and_give_the_accuracy(trained: Path) -> None:
    out = trained / "predictions.json"
    metrics = evaluate_checkpoint(str(trained / "run"), str(trained / "test"), predictions=out)
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


def test_an_export_has_the_weights_of_the_checkpoint(trained: Path) -> None:
    assert main(["export", str(trained / "run"), "--out", str(trained / "hf")]) == 0
    theirs = transformers.LxmertForPreTraining.from_pretrained(trained / "hf").state_dict()
    weights = load_weights(find_generation(str(trained / "run")))
    for name, value in weights.items():
        np.testing.assert_array_equal(theirs[name].numpy(), value)
    model, config, _ = load_model(str(trained / "run"))
    assert config.model.num_answers == model.config.num_answers == 4
    with torch.no_grad():
        assert torch.isfinite(torch.cat([p.flatten() for p in model.parameters()])).all()


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

"""Fine-tuning: the losses beside slow ones, where weights begin, exact resume, what comes out."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from model.batch import Batch
from model.config import ModelConfig
from model.flops import training_flops
from model.lxmert import Lxmert
from shards.dataset import Dataset, open_dataset
from shards.errors import DataError
from shards.format.build import BuildSettings, build
from shards.format.manifest import load_manifest
from shards.format.record import ImageRecord, Picture, Sentence
from shards.order.settings import SamplerSettings
from tests.conftest import files_of, small_records
from tests.ranks import config_tree, run_ranks
from tests.trainer.test_resume import assert_bitwise, losses
from trainer.behaviour import Behaviour
from trainer.checkpoint.generations import (
    Generation,
    find_generation,
    generations,
    load_weights,
)
from trainer.config import parse_config
from trainer.data.batch import make_batch, settings_of
from trainer.errors import ConfigError
from trainer.evaluate import Answered
from trainer.export import export_huggingface
from trainer.initial import begin_from
from trainer.model import build_model, load_checkpoint
from trainer.partial import END, Partial
from trainer.predict import evaluate_checkpoint, predict
from trainer.run_status import run_status
from trainer.tasks import TASKS

OFF = {"dropout": 0.0, "attention_dropout": 0.0}


def pairs_of_images(n: int, seed: int = 3) -> list[ImageRecord]:
    """Records of two images with one to four objects each, and two statements about both."""
    found, rng = small_records(2 * n, seed=seed), np.random.default_rng(seed)
    out = []
    for i, (a, b) in enumerate(zip(found[::2], found[1::2], strict=True)):
        labels = rng.permutation(["True", "False"]).tolist()
        statements = tuple(
            Sentence(f"the circle {j} is on the left line", "nlvr2", {label: 1.0}, f"dev-{i}-0-{j}")
            for j, label in enumerate(labels)
        )
        out.append(
            replace(
                a,
                image=f"dev-{i}-0",
                boxes=np.concatenate([a.boxes, b.boxes]),
                features=np.concatenate([a.features, b.features]),
                sentences=statements,
                sides=np.repeat(np.arange(2, dtype=np.uint8), [len(a.boxes), len(b.boxes)]),
                pictures=(Picture(f"dev-{i}-0-img0", 640, 480), Picture(f"dev-{i}-0-img1", 64, 48)),
            )
        )
    return out


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets of one vocabulary, and a pre-trained run: `pre` with captions and a table of its
    own, `vqa` and `vqa-test` with kinds of questions, `nlvr2` of two images a record."""
    root = tmp_path_factory.mktemp("tasks")
    records = small_records(34, labels=True)
    build(records, root / "pre", BuildSettings("pre", "test", answers=["blue", "red", "rare", "x",
                                                                       "green"]))  # fmt: skip
    settings = BuildSettings("vqa", "test", vocab=root / "pre", images_per_shard=6)
    asked = [
        replace(r, sentences=tuple(replace(s, kind=f"kind {i % 3}") for s in r.sentences))
        for i, r in enumerate(records)
    ]
    build(asked[:26], root / "vqa", settings)
    table = json.loads((files_of(root / "vqa") / "answers.json").read_text())
    build(asked[26:], root / "vqa-test", replace(settings, answers=table, images_per_shard=3))
    build(pairs_of_images(12), root / "nlvr2", settings)
    tree = config_tree(root / "pre", root, "pre-run", train={"steps": 2})
    assert not run_ranks(1, [(tree, None, False)])
    return root


def tree_of(root: Path, task: str, name: str, **sections: Any) -> dict[str, Any]:
    return {"task": task, **config_tree(root / task, root, name, **sections)}


def batch_of(data: Dataset, pairs: int = 8) -> Batch:
    sampler = data.sampler(SamplerSettings(mismatch=0.0), 0)
    step = sampler.step(sampler.start(), pairs)
    settings = settings_of(data, 0, 0.0, 0.0, questions=True)
    return make_batch(data, sampler, sampler.slice(step, 0, 1), settings)


def model_for(data: Dataset, task: str) -> Lxmert:
    schema, answers = data.manifest.schema, data.manifest.answers.count
    sizes = config_tree(Path(), Path(), "x")["model"] | OFF
    config = ModelConfig(
        **sizes, vocab_size=schema.vocab_size, num_answers=answers, feature_dim=schema.feature_dim
    )
    return build_model(config, 1, TASKS[task].objectives).double()


def alone(model: Lxmert, batch: Batch, pair: int, first: int, end: int) -> torch.Tensor:
    """The cross-modality vector of a pair with some objects of its image, by itself."""
    begin, stop = batch.token_start[pair : pair + 2].tolist()
    image = int(batch.image_index[pair])
    features, boxes = (t[image, first:end][None].double() for t in (batch.features, batch.boxes))
    return model.lxmert(batch.tokens[begin:stop][None], None, features, boxes).pooled[0]


def test_answers_are_trained_by_all_their_scores(root: Path) -> None:
    data = open_dataset(str(root / "vqa"), root / "cache")
    batch, model = batch_of(data), model_for(data, "vqa")
    out, m = model(batch), data.index
    due, hits = torch.zeros((), dtype=torch.float64), 0.0
    questions = batch.questions
    assert questions is not None and len(questions.pair) == batch.pairs
    for pair in range(batch.pairs):
        count = int(batch.num_objects[batch.image_index[pair]])
        logits = model.answer_head(alone(model, batch, pair, 0, count))
        target = torch.zeros_like(logits)
        span = slice(*m.answer_start[batch.pair_id[pair] :][:2].tolist())
        for answer, score in zip(m.answer_id[span], m.answer_score[span], strict=True):
            target[answer] = float(score)
        # The released code: the mean over answers, times their number.
        due += F.binary_cross_entropy_with_logits(logits, target) * len(target)
        hits += float(target[logits.argmax()])
    torch.testing.assert_close(out.loss_sum["answers"].double(), due, rtol=1e-5, atol=0)
    assert float(out.correct["answers"]) == pytest.approx(hits)
    assert {n for n, _ in model.named_children()} == {"lxmert", "answer_head"}


def test_a_statement_is_about_both_images(root: Path) -> None:
    data = open_dataset(str(root / "nlvr2"), root / "cache")
    batch, model = batch_of(data), model_for(data, "nlvr2")
    assert batch.first_objects is not None
    out = model(batch)
    due = torch.zeros((), dtype=torch.float64)
    for pair in range(batch.pairs):
        image = batch.image_index[pair]
        first, count = int(batch.first_objects[image]), int(batch.num_objects[image])
        both = [alone(model, batch, pair, 0, first), alone(model, batch, pair, first, count)]
        logits = model.pair_head(torch.cat(both))
        due += F.cross_entropy(logits, batch.answer_target[batch.answer_pair == pair][0])
    torch.testing.assert_close(out.loss_sum["statement"].double(), due, rtol=1e-5, atol=0)
    out.loss_sum["statement"].backward()
    # Every parameter is seen in every backward, as ZeRO needs.
    assert all(p.grad is not None for p in model.parameters())
    # Twice the same image and sentence are two pairs' operations: the pair head apart.
    assert training_flops(model.config, batch, ["statement"]) > 0


def test_top_down_attention_is_one_look(root: Path) -> None:
    """The paper's baseline, beside a slow one for each pair."""
    data = open_dataset(str(root / "vqa"), root / "cache")
    batch = batch_of(data)
    config = model_for(data, "vqa").config.model_copy(update={"cross_layers": 0, "top_down": True})
    model = build_model(config, 1, TASKS["vqa"].objectives).double()
    encoder, out = model.lxmert.encoder, model.encode(batch)
    look = encoder.top_down
    for pair in range(batch.pairs):
        count = int(batch.num_objects[batch.image_index[pair]])
        begin, stop = batch.token_start[pair : pair + 2].tolist()
        image = int(batch.image_index[pair])
        seen = model.lxmert(
            batch.tokens[begin:stop][None],
            None,
            batch.features[image, :count][None].double(),
            batch.boxes[image, :count][None].double(),
        )
        # What the language encoder says, before it is asked: a model whose look is undone.
        asked, vision = _before_the_look(model, batch, pair), seen.vision[0]
        score = look.score(torch.tanh(look.of_object(vision) + look.of_sentence(asked)))
        found = (score.softmax(0) * vision).sum(0)
        joint = look.sentence(asked).relu() * look.seen(found).relu()
        torch.testing.assert_close(
            out.pooled[pair], model.lxmert.pooler(joint), rtol=1e-5, atol=1e-7
        )


def _before_the_look(model: Lxmert, batch: Batch, pair: int) -> torch.Tensor:
    from model.packing import Rows

    begin, stop = batch.token_start[pair : pair + 2].tolist()
    rows = Rows(torch.tensor([stop - begin]), stop - begin, stop - begin)
    words = model.lxmert.embeddings(batch.tokens[begin:stop], rows.place)
    for layer in model.lxmert.encoder.layer:
        words = layer(words, rows, None)
    first: torch.Tensor = words[0]
    return first


# --- where weights begin ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(root: Path) -> Path:
    """A run for VQA from the pre-trained one, with a rate so small that weights hardly move."""
    tree = tree_of(
        root,
        "vqa",
        "vqa-run",
        data={"validation": str(root / "vqa-test")},
        train={"init_from": str(root / "pre-run"), "epochs": 1, "steps": None, "global_batch": 8},
        optimizer={"lr": 1e-12, "weight_decay": 0.0},
        model=OFF,
    )
    assert not run_ranks(2, [(tree, None, False)])
    return root / "vqa-run"


@pytest.fixture(scope="module")
def judged(root: Path) -> Path:
    """A run for NLVR2."""
    assert not run_ranks(1, [(tree_of(root, "nlvr2", "judged", train={"steps": 2}), None, False)])
    return root / "judged"


def test_answers_begin_from_the_same_answers(root: Path, tuned: Path) -> None:
    """By their text: the tables have other orders, and one answer is new."""
    before, after = (load_weights(find_generation(str(p))) for p in (root / "pre-run", tuned))
    theirs = json.loads((root / "pre-run" / "answers.json").read_text())
    ours = json.loads((tuned / "answers.json").read_text())
    assert theirs != ours and set(ours) == {"red", "green", "blue", "rare"}
    last = "answer_head.logit_fc.3.weight"
    rows = [theirs.index(a) for a in ours]
    np.testing.assert_allclose(after[last], before[last][rows], atol=1e-6)
    for name in after.keys() - {last, "answer_head.logit_fc.3.bias"}:
        np.testing.assert_allclose(after[name], before[name], atol=1e-6, err_msg=name)
    heads = {n.split(".")[0] for n in after}
    assert heads == {"lxmert", "answer_head"}, "no head of pre-training is trained or saved"


def test_an_export_is_a_model_of_transformers(root: Path, tuned: Path, tmp_path: Path) -> None:
    """With equal logits, its answers by name, and as a beginning of another run here."""
    export_huggingface(str(tuned), tmp_path / "hf")
    theirs, report = transformers.LxmertForQuestionAnswering.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    model, _, _ = load_checkpoint(str(tuned))
    data = open_dataset(str(root / "vqa"), root / "cache")
    batch = batch_of(data)
    with torch.no_grad():
        encoded = model.eval().encode(batch)
        ours = model.answer_head(encoded.pooled)
        for pair in range(batch.pairs):
            begin, stop = batch.token_start[pair : pair + 2].tolist()
            image = int(batch.image_index[pair])
            count = int(batch.num_objects[image])
            logits = theirs.eval()(
                input_ids=batch.tokens[begin:stop][None],
                visual_feats=batch.features[image, :count][None].float(),
                visual_pos=batch.boxes[image, :count][None],
            ).question_answering_score
            torch.testing.assert_close(logits[0], ours[pair], rtol=1e-5, atol=1e-6)
    table = json.loads((tuned / "answers.json").read_text())
    assert [theirs.config.id2label[i] for i in range(len(table))] == table
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")("red").input_ids
    train = {"init_from": str(tmp_path / "hf"), "steps": 1}
    small = {"optimizer": {"lr": 1e-12, "weight_decay": 0.0}}
    again = tree_of(root, "vqa", "from-export", train=train, model=OFF, **small)
    statements = tree_of(root, "nlvr2", "statements", train=train, model=OFF, **small)
    assert not run_ranks(1, [(again, None, False), (statements, None, False)])
    one = load_weights(find_generation(str(tuned)))
    two = load_weights(find_generation(str(root / "from-export")))
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=1e-6, err_msg=name)
    export_huggingface(str(root / "statements"), tmp_path / "pairs")
    tree = json.loads((tmp_path / "pairs" / "config.json").read_text())
    assert tree["id2label"] == {"0": "false", "1": "true"}


def test_an_epoch_is_of_questions(tuned: Path) -> None:
    """Though the data set has captions, too: 26 questions in batches of 8."""
    assert find_generation(str(tuned)).step == 4
    assert run_status(str(tuned)).total == 4


def test_true_and_false_begin_as_themselves(root: Path, judged: Path, tmp_path: Path) -> None:
    """Which is first in the table depends on what a data set has more of."""
    theirs = json.loads((judged / "answers.json").read_text())
    settings = BuildSettings("n", "test", vocab=root / "pre", answers=theirs[::-1])
    build(pairs_of_images(3), tmp_path / "set", settings)
    data = open_dataset(str(tmp_path / "set"), root / "cache")
    tree = tree_of(root, "nlvr2", "x", train={"init_from": str(judged)})
    before, _, _ = load_checkpoint(str(judged))
    model = build_model(before.config, 1, TASKS["nlvr2"].objectives)
    begin_from(model, parse_config(tree, "test"), data)
    ours, other = (m.pair_head.logit_fc[3] for m in (model, before))
    assert torch.equal(ours.weight, other.weight.flip(0))
    assert torch.equal(ours.bias, other.bias.flip(0))
    assert torch.equal(model.pair_head.logit_fc[0].weight, before.pair_head.logit_fc[0].weight)


def test_a_pre_training_is_measured_without_questions(root: Path, tmp_path: Path) -> None:
    captions = [replace(r, sentences=(Sentence("a line", "coco_cap"),)) for r in small_records(3)]
    table = json.loads((root / "pre-run" / "answers.json").read_text())
    settings = BuildSettings("c", "test", vocab=root / "pre", answers=table)
    build(captions, tmp_path / "captions", settings)
    metrics = evaluate_checkpoint(str(root / "pre-run"), str(tmp_path / "captions"))
    assert {"loss/masked_lm", "loss/matching"} <= set(metrics)
    assert "loss/qa" not in metrics


# --- exact resume -------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["vqa", "nlvr2"])
def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(root: Path, task: str) -> None:
    """And another world size goes on with the same losses."""

    def tree(kind: str) -> dict[str, Any]:
        start = {"init_from": str(root / "pre-run"), "zero_stage": 2, "global_batch": 7}
        return tree_of(root, task, f"{task}-{kind}", train=start, model=OFF)

    assert not run_ranks(2, [(tree("whole"), None, False)])
    run_ranks(2, [(tree("killed"), 5, True)])
    assert not run_ranks(2, [(tree("killed"), None, False)])
    assert_bitwise(root / f"{task}-whole", root / f"{task}-killed")
    assert losses(tree("whole")) == losses(tree("killed"))
    assert not run_ranks(2, [(tree("grown"), 3, False)])
    assert not run_ranks(1, [(tree("grown"), None, False)])
    name = f"loss/{next(iter(TASKS[task].objectives))}"
    whole, grown = losses(tree("whole")), losses(tree("grown"))
    assert [grown[s][name] for s in range(1, 9)] == pytest.approx(
        [whole[s][name] for s in range(1, 9)], rel=1e-5
    )


# --- what comes out -----------------------------------------------------------------------------


def test_predictions_go_on_where_they_were_cut(
    root: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    test = str(root / "vqa-test")
    count = predict(str(tuned), test, out, batch_size=3)
    found = json.loads(out.read_text())
    assert [row["question_id"] for row in found] == list(range(26, 34)) and count == len(found)
    asked = []
    forward = Lxmert.forward

    def dying(self: Lxmert, batch: Batch, *args: Any) -> Any:
        asked.append(batch.pairs)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return forward(self, batch, *args)

    monkeypatch.setattr(Lxmert, "forward", dying)
    with pytest.raises(KeyboardInterrupt):
        predict(str(tuned), test, cut, batch_size=3)
    assert not cut.exists() and (tmp_path / f"cut.json{END}").exists()
    with pytest.raises(DataError, match=r"predictions of another checkpoint"):
        older = [g for g in generations(str(tuned)) if isinstance(g, Generation)][-1]
        predict(older.url, test, cut, batch_size=3)
    predict(str(tuned), test, cut, batch_size=3)
    assert cut.read_bytes() == out.read_bytes() and sorted(tmp_path.iterdir()) == [cut, out]
    pairs = load_manifest(test).pairs
    assert sum(asked) == pairs + 3, "the batch that was answered before is not asked again"

    # The metrics are those of the file.
    data = open_dataset(test, root / "cache")
    scores, kinds = [], []
    answer_of = {row["question_id"]: row["answer"] for row in found}
    for image in range(data.manifest.images):
        for s in json.loads(data.record(image))["sentences"]:
            if "answers" in s:
                scores.append(s["answers"].get(answer_of[s["id"]], 0.0))
                kinds.append(s["kind"])
    metrics = evaluate_checkpoint(str(tuned), test)
    assert metrics["accuracy"] == pytest.approx(np.mean(scores))
    for kind in set(kinds):
        due = np.mean([s for s, k in zip(scores, kinds, strict=True) if k == kind])
        assert metrics[f"accuracy/kind/{kind}"] == pytest.approx(due)


def test_statements_are_judged_by_sentence(root: Path, judged: Path, tmp_path: Path) -> None:
    run, out = str(judged), tmp_path / "out.csv"
    predict(run, str(root / "nlvr2"), out)
    rows = dict(line.split(",") for line in out.read_text().split())
    truth = {s.id: s.answers for r in pairs_of_images(12) for s in r.sentences}
    assert set(rows) == set(truth) and list(rows) == sorted(rows)
    right = {i: {answer: 1.0} == truth[i] for i, answer in rows.items()}
    metrics = evaluate_checkpoint(run, str(root / "nlvr2"))
    assert metrics["accuracy"] == pytest.approx(np.mean(list(right.values())))
    # Every statement here is about one pair, so that both are the same.
    assert metrics["consistency"] == metrics["accuracy"] and metrics["majority"] == 0.5
    given = tmp_path / "dev.json"
    lines = [{"identifier": i, "sentence": "x", "label": next(iter(a or {}))}
             for i, a in truth.items()]  # fmt: skip
    given.write_text("".join(json.dumps(line) + "\n" for line in lines))
    official = evaluate_checkpoint(run, str(root / "nlvr2"), annotations=[given])
    assert official == metrics


def test_behaviour_by_kind_answer_and_objects() -> None:
    def asked(question: str, kind: str | None, objects: int, answer: str, score: float) -> Answered:
        return Answered(None, "i", question, "s", kind, objects, {answer: 1.0}, "x", score)

    behaviour = Behaviour()
    behaviour.add(
        [asked("How many, then?", None, 3, "2", 1.0), asked("is it", "exist", 36, "No", 0)]
    )
    behaviour.add([asked("how many", None, 40, "red", 0.3)])
    assert behaviour.metrics() == {
        "accuracy/kind/how many": 0.65,
        "accuracy/kind/exist": 0.0,
        "accuracy/answer/number": 1.0,
        "accuracy/answer/yes/no": 0.0,
        "accuracy/answer/other": 0.3,
        "accuracy/objects/3": 1.0,
        "accuracy/objects/31-40": 0.15,
    }


def test_one_call_predicts_to_a_file(root: Path, tuned: Path, tmp_path: Path) -> None:
    """Another one at the same time says so, and takes nothing away."""
    out, test = tmp_path / "out.json", str(root / "vqa-test")
    with Partial(out, {"checkpoint": "x"}).opened():
        with pytest.raises(DataError, match=r"another call is predicting to .*out\.json\.partial"):
            predict(str(tuned), test, out)
        assert out.with_name(f"out.json{END}").exists()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="is a folder: name a file"):
        predict(str(tuned), test, tmp_path)
    predict(str(tuned), test, out)


def test_partial_predictions_that_are_damaged(tmp_path: Path) -> None:
    def opened(cut: bool = True) -> list[Any]:
        with Partial(tmp_path / "out", {"checkpoint": "x"}).opened() as partial:
            if cut:
                partial.add([(1, {"answer": "red"}), (2, {"answer": "blue"})], 3)
                raise KeyboardInterrupt
            assert partial.done == 3
            return list(partial.rows())

    with pytest.raises(KeyboardInterrupt):
        opened()
    path = tmp_path / f"out{END}"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"blue", b"glue"))
    with pytest.raises(DataError, match=r"out\.partial is damaged: remove it, and predict"):
        opened(cut=False)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"out.partial .*remove it"):
        opened(cut=False)
    path.write_bytes(whole)
    assert [row["answer"] for _, row in opened(cut=False)] == ["red", "blue"]
    assert not path.exists()


def test_questions_that_cannot_be_told_apart_or_measured(
    root: Path, tuned: Path, tmp_path: Path, said: list[logging.LogRecord]
) -> None:
    table = json.loads((files_of(root / "vqa") / "answers.json").read_text())
    settings = BuildSettings("x", "test", vocab=root / "pre", answers=table)
    records = small_records(4)

    def made(name: str, sentences: list[Sentence]) -> str:
        given = [replace(r, sentences=(s,)) for r, s in zip(records, sentences, strict=False)]
        build(given, tmp_path / name, settings)
        return str(tmp_path / name)

    def asked(i: str | int | None, source: str = "vqa", answers: Any = None) -> Sentence:
        return Sentence("what color is it?", source, answers, i)

    red, out = {"red": 1.0}, tmp_path / "out.json"
    for name, ids, message in (
        ("twice", (7, 7), "id 7 comes twice in the data set"),
        ("beyond", (2**63, 1), "is beyond 64 bits"),
    ):
        data = made(name, [asked(i, answers=red) for i in ids])
        with pytest.raises(DataError, match=message):
            predict(str(tuned), data, out)
        assert not list(tmp_path.glob("out*")), "nothing of no use stays"
    # A test set beside captions: what has an id is answered, without any answer to learn from.
    data = made("test", [asked(1), asked("b"), Sentence("a line", "coco_cap")])
    assert predict(str(tuned), data, out) == 2
    assert [row["question_id"] for row in json.loads(out.read_text())] == [1, "b"]
    captions = made("captions", [Sentence("a line", "coco_cap")])
    with pytest.raises(DataError, match=r"no sentence of .*captions has an id"):
        predict(str(tuned), captions, out)
    with pytest.raises(DataError, match="has no question with an answer: there is nothing"):
        evaluate_checkpoint(str(tuned), captions)
    # Those that nobody has answered are left out of the mean.
    some = made("some", [asked(1, answers=red), asked(2, answers=red), asked(3), asked(4)])
    half = made("half", [asked(1, answers=red), asked(2, answers=red)])
    metrics = evaluate_checkpoint(str(tuned), some)
    assert "2 questions have no answers, and are not measured" in said[-1].getMessage()
    assert metrics["accuracy"] == evaluate_checkpoint(str(tuned), half)["accuracy"]
    for files, message in (
        ({"choices": [out]}, "--choices are GQA's"),
        ({"annotations": [tmp_path / "absent"]}, "cannot read .*absent"),
    ):
        with pytest.raises((DataError, ConfigError), match=message):
            evaluate_checkpoint(str(tuned), half, **files)


def test_a_run_that_was_trained_anew_is_another_checkpoint(
    root: Path, tuned: Path, tmp_path: Path
) -> None:
    """Though its checkpoints have the same names."""
    model, out = str(tuned), tmp_path / "out.json"
    with pytest.raises(KeyboardInterrupt), Partial(out, {"checkpoint": "x", "data set": "y",
                                                         "batch size": "2"}).opened():  # fmt: skip
        raise KeyboardInterrupt
    with pytest.raises(DataError, match="has predictions of another checkpoint: remove it"):
        predict(model, str(root / "vqa-test"), out, batch_size=2)


# --- bad input ----------------------------------------------------------------------------------


def test_what_does_not_fit_the_task_is_refused(
    root: Path, tuned: Path, judged: Path, tmp_path: Path
) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        (tree_of(root, "nlvr2", "a", data={"train": str(root / "vqa")}),
         "task nlvr2 is about two images a record, and those of .*vqa are of one image"),
        (tree_of(root, "vqa", "b", data={"train": str(root / "nlvr2")}),
         "task vqa is about one image a record, and those of .*nlvr2 are of two images"),
        (tree_of(root, "vqa", "judged"),
         "judged is a run of task nlvr2, not vqa: give this one another run.name"),
        (config_tree(root / "nlvr2", root, "c"), "task pretrain is about one image a record"),
    ]  # fmt: skip
    captions = [replace(r, sentences=(Sentence("a line", "coco_cap"),)) for r in small_records(3)]
    build(captions, tmp_path / "captions", BuildSettings("c", "test", vocab=root / "pre"))
    cases.append(
        (tree_of(root, "gqa", "d", data={"train": str(tmp_path / "captions")}),
         "task gqa needs questions with answers, and .*captions has none")
    )  # fmt: skip
    wide = BuildSettings("n", "test", vocab=root / "pre", answers=["true", "false", "maybe"])
    build(pairs_of_images(3), tmp_path / "wide", wide)
    cases.append(
        (tree_of(root, "nlvr2", "f", data={"train": str(tmp_path / "wide")}),
         "task nlvr2 has the answers false and true, and .*wide a table of 3")
    )  # fmt: skip
    build(small_records(5), tmp_path / "words", BuildSettings("w", "test", vocab_size=60))
    cases.append(
        (tree_of(root, "vqa", "e", data={"train": str(tmp_path / "words")},
                 train={"init_from": str(tuned)}),
         "vqa-run was trained with another vocabulary than that of .*words")
    )  # fmt: skip
    for tree, message in cases:
        found = run_ranks(1, [(tree, None, False)])
        assert len(found) == 1, found
        assert found[0].startswith("ConfigError")
        assert re.search(message, found[0]), found[0]
    with pytest.raises(ConfigError, match="of two images"):
        evaluate_checkpoint(str(tuned), str(root / "nlvr2"))
    with pytest.raises(ConfigError, match="has another answer table than the training set"):
        evaluate_checkpoint(str(tuned), str(root / "pre"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "vq"}, r'task: "vq" is no task: give one of pretrain, vqa, gqa, nlvr2'),
        ({"sampler": {"mismatch": 0.5}}, r"sampler\.mismatch: task vqa shows every question"),
        ({"objectives": {"token_mask": 0.1}}, r"objectives\.token_mask: task vqa shows"),
        ({"objectives": {"qa": 0.0}}, r"objectives\.qa is of pre-training, and task vqa trains"),
        ({"sampler": {"mode": "balanced"}}, r"sampler\.mode=balanced: task vqa needs natural"),
    ],
)
def test_settings_that_are_of_pre_training(change: dict[str, Any], message: str) -> None:
    tree = {"task": "vqa", "data": {"train": "d"}, "train": {"steps": 1}, **change}
    with pytest.raises(ConfigError, match=message):
        parse_config(tree, "test")


def test_a_stored_configuration_is_read_back() -> None:
    tree = {"task": "nlvr2", "data": {"train": "d"}, "train": {"steps": 1}}
    config = parse_config(tree, "test")
    assert config.sampler.mismatch == config.objectives.token_mask == 0
    assert parse_config(config.model_dump(mode="json"), "test") == config
    assert parse_config(config.given(), "test") == config


def test_a_file_whose_answers_are_not_known(
    root: Path, tmp_path: Path, said: list[logging.LogRecord]
) -> None:
    """They begin at random, and it is said; with the table they do not."""
    model, _, _ = load_checkpoint(str(root / "pre-run"))
    torch.save(model.state_dict(), tmp_path / "released.pth")
    data = open_dataset(str(root / "vqa"), root / "cache")
    last = "answer_head.logit_fc.3.weight"

    def begun(**train: str) -> Lxmert:
        settings = {"init_from": str(tmp_path / "released.pth"), **train}
        config = parse_config(tree_of(root, "vqa", "x", train=settings), "test")
        ours = build_model(
            model.config.model_copy(update={"num_answers": 4}), 1, TASKS["vqa"].objectives
        )
        before = ours.get_parameter(last).detach().clone()
        begin_from(ours, config, data)
        changed = (ours.get_parameter(last) != before).any(1)
        assert torch.equal(ours.lxmert.pooler.dense.weight, model.lxmert.pooler.dense.weight)
        assert bool(changed.all()) == ("init_answers" in train)
        return ours

    begun()
    assert "answers begin at random" in said[-1].getMessage()
    begun(init_answers=str(root / "pre-run" / "answers.json"))
    assert "4 of 4 answers begin with the weights" in said[-1].getMessage()
    (tmp_path / "short.json").write_text('["red"]')
    with pytest.raises(ConfigError, match=r"has 5 answers, and its answer table 1"):
        begun(init_answers=str(tmp_path / "short.json"))

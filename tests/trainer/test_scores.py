"""The tasks' official metrics: hand-made cases, slow plain re-computations, damaged files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.cli.main import main
from shards.errors import DataError
from trainer.scores import submission
from trainer.scores.gqa import score_gqa
from trainer.scores.nlvr2 import read_labels, score_nlvr2
from trainer.scores.vqa import score_vqa, soft_accuracy


def written(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


# --- VQA ---


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        # Of ten, 1, 2, 3 and 4 gave it: the mean over nine others each, worked out by hand.
        ("2", ["two"] + ["3"] * 9, (1 * 0 + 9 * 1 / 3) / 10),
        ("Two", ["2", "two"] + ["3"] * 8, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("2", ["two"] * 3 + ["3"] * 7, (3 * 2 / 3 + 7 * 1) / 10),
        ("none", ["0"] * 4 + ["3"] * 6, 1.0),
        ("blue", ["red"] * 9 + ["green"], 0.0),
        # A tie: both are right.
        ("red", ["red", "blue"] * 5, 1.0),
        ("blue", ["red", "blue"] * 5, 1.0),
        # Articles, marks within words and beside spaces, marks of an answer with a grouped number.
        ("A dog.", ["the dog"] * 3 + ["an cat"] * 7, 0.9),
        ("black/white", ["black white"] * 3 + ["x"] * 7, 0.9),
        ("black-and-white", ["black and white"] * 3 + ["x"] * 7, 0.9),
        ("yes, sir!", ["yes sir"] * 3 + ["x"] * 7, 0.9),
        ("sir (yes)", ["sir yes"] * 3 + ["x"] * 7, 0.9),
        ("1,000-2", ["10002"] * 3 + ["x"] * 7, 0.9),
        ("1,b-2", ["1 b 2"] * 3 + ["x"] * 7, 0.9),
        # Periods stay in decimals alone; colons and apostrophes stay.
        ("U.S.", ["us"] * 3 + ["x"] * 7, 0.9),
        ("1.5", ["1.5."] * 3 + ["15"] * 7, 0.9),
        ("10:30", ["10 30"] * 3 + ["1030"] * 7, 0.0),
        ("cats'", ["cats"] * 3 + ["x"] * 7, 0.0),
        # Contractions get their apostrophe.
        ("dont", ["don't"] * 3 + ["x"] * 7, 0.9),
        ("its", ["it's"] * 3 + ["x"] * 7, 0.0),  # is not in the table
        # What has no words in its normal form is an answer as others are.
        ("the", ["a", "an", "", *["x"] * 7], 0.9),
        ("", ["x"] * 5 + ["y"] * 5, 0.0),
        # Where all agree, answers are compared as they are, spaces around them apart.
        ("yes", ["yes"] * 10, 1.0),
        (" yes\n", ["\tyes "] * 10, 1.0),
        ("Yes", ["yes"] * 10, 0.0),
        ("2", ["two"] * 10, 0.0),
        ("two", ["two"] * 9 + ["2"], 1.0),
    ],
)
def test_soft_accuracy(prediction: str, answers: list[str], expected: float) -> None:
    assert soft_accuracy(prediction, answers) == pytest.approx(expected, abs=1e-12)


# Ways to write an answer that are one in their normal form.
_WAYS = {
    "3": ["3", "three", "Three.", "a three", "3 ;"],
    "don't": ["dont", "don't", "Don't", "the dont"],
    "t shirt": ["t-shirt", "t shirt", "T_SHIRT!", "a t/shirt"],
    "1000": ["1,000", "1000", "1000.", "[1,000]"],
}


def vqa_questions(rng: random.Random, count: int) -> tuple[list[Any], dict[int, str], list[float]]:
    """Annotations, predictions, and the scores that these have, by a plain walk."""
    annotations, predictions, expected = [], {}, []
    for number in range(count):
        kinds = rng.choices(list(_WAYS), weights=[4, 3, 2, 1], k=10)
        texts = [rng.choice(_WAYS[kind]) for kind in kinds]
        if len(set(texts)) == 1:
            continue
        guess = rng.choice(list(_WAYS))
        predictions[number] = rng.choice(_WAYS[guess])
        each = []
        for left_out in range(10):
            others = kinds[:left_out] + kinds[left_out + 1 :]
            each.append(min(1.0, sum(kind == guess for kind in others) / 3))
        expected.append(sum(each) / 10)
        annotations.append(
            {
                "question_id": number,
                "answer_type": ["yes/no", "number", "other"][number % 3],
                "question_type": ["how many", "what is"][number % 2],
                "multiple_choice_answer": texts[0],
                "answers": [{"answer": t, "answer_id": i + 1} for i, t in enumerate(texts)],
            }
        )
    return annotations, predictions, expected


def test_vqa_by_types_over_files(tmp_path: Path) -> None:
    annotations, predictions, expected = vqa_questions(random.Random(1), 200)
    files = [
        written(tmp_path / "a.json", {"info": {}, "annotations": annotations[:90]}),
        written(tmp_path / "b.json", {"annotations": annotations[90:], "license": {}}),
    ]
    found = score_vqa(predictions, files)

    def mean(key: str, name: str) -> float:
        of = [s for a, s in zip(annotations, expected, strict=True) if a[key] == name]
        return sum(of) / len(of)

    assert found == pytest.approx(
        {
            "accuracy": sum(expected) / len(expected),
            **{f"accuracy/{n}": mean("answer_type", n) for n in ("number", "other", "yes/no")},
            **{
                f"accuracy/question_type/{n}": mean("question_type", n)
                for n in ("how many", "what is")
            },
        }
    )
    assert 0.2 < found["accuracy"] < 0.95
    pairs = list(predictions.items())
    random.Random(2).shuffle(pairs)
    assert score_vqa(iter(pairs), files) == found


def annotation(number: int, answers: list[str], **more: Any) -> dict[str, Any]:
    return {"question_id": number, "answers": [{"answer": a} for a in answers], **more}


@pytest.fixture
def vqa_file(tmp_path: Path) -> Path:
    annotations = [
        annotation(7, ["red"] * 10, answer_type="other", question_type="what color"),
        annotation(5, ["no"] * 8 + ["yes"] * 2, answer_type="yes/no", question_type="is"),
        annotation(6, ["2"] * 5 + ["3"] * 5, answer_type="number", question_type="how many"),
        annotation(8, ["2"] * 10, answer_type="number"),
    ]
    return written(tmp_path / "annotations.json", {"annotations": annotations})


def test_vqa_that_lacks_predictions(vqa_file: Path) -> None:
    given = {7: "red", 6: "2"}
    with pytest.raises(DataError, match=r"2 of 4 questions have no prediction \(first: 5\)"):
        score_vqa(given, [vqa_file])
    assert score_vqa(given, [vqa_file], missing="zero") == {
        "accuracy": 0.5,
        "accuracy/number": 0.5,
        "accuracy/other": 1.0,
        "accuracy/question_type/how many": 1.0,
        "accuracy/question_type/is": 0.0,
        "accuracy/question_type/what color": 1.0,
        "accuracy/yes/no": 0.0,
    }


def test_vqa_predictions_that_are_wrong(vqa_file: Path) -> None:
    whole = [(5, "yes"), (6, "x"), (7, "x"), (8, "2")]
    with pytest.raises(DataError, match=r"2 predictions are of questions .*\(first: 70\)"):
        score_vqa([*whole, (70, "x"), (71, "x")], [vqa_file], missing="zero")
    with pytest.raises(DataError, match="question 6 has a second prediction"):
        score_vqa([*whole, (6, "x")], [vqa_file])
    with pytest.raises(DataError, match="first: '5'"):
        score_vqa({"5": "yes"}, [vqa_file], missing="zero")
    with pytest.raises(DataError, match="prediction of question 5 is 1, no text"):
        score_vqa({5: 1}, [vqa_file], missing="zero")
    with pytest.raises(DataError, match="question_id 7 comes twice: name each file once"):
        score_vqa(whole, [vqa_file, vqa_file])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"annotations": [{"question_id": 1', "is not JSON: "),
        ("[]", "is not an object"),
        ('{"questions": []}', "has no list 'annotations'"),
        ('{"annotations": []}', "there is no question in the files"),
        ('{"annotations": [7]}', "annotation 0 has no question_id and answers"),
        ('{"annotations": [{"question_id": 1, "answers": 3}]}', "annotation 0 has no"),
        ('{"annotations": [{"question_id": 1, "answers": []}]}', "annotation 0 has no"),
        ('{"annotations": [{"question_id": 1, "answers": ["a"]}]}', "annotation 0 has no"),
        ('{"annotations": [{"question_id": 1, "answers": [{"answer": 2}]}]}', "annotation 0 has"),
        ('{"annotations": [{"question_id": "1", "answers": [{"answer": "a"}]}]}', "annotation 0"),
        (
            '{"annotations": [{"question_id": 1, "answers": [{"answer": "a"}], "answer_type": 3}]}',
            "annotation 0: the answer_type is 3, no name",
        ),
    ],
)
def test_damaged_annotations(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "annotations.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        score_vqa({}, [path], missing="zero")
    with pytest.raises(DataError, match=r"cannot read the file of annotations .*none\.json"):
        score_vqa({}, [tmp_path / "none.json"])


# --- GQA ---


def question(answer: str, **more: Any) -> dict[str, Any]:
    return {"question": "?", "imageId": "1", "answer": answer, "isBalanced": True, **more}


def types(structural: str, semantic: str, detailed: str = "") -> dict[str, str]:
    return {"structural": structural, "semantic": semantic, "detailed": detailed}


@pytest.fixture
def gqa_files(tmp_path: Path) -> tuple[list[Path], Path]:
    """Files of questions, and of choices."""
    first = {
        "02": question(
            "red",
            types=types("query", "attr"),
            groups={"global": "color", "local": "x"},
            entailed=["02", "2", "009"],
        ),
        "2": question(
            "yes",
            types=types("verify", "attr"),
            groups={"global": None, "local": "x"},
            entailed=["009"],
        ),
        "009": question("no", isBalanced=False, types=types("verify", "rel"), entailed=["02"]),
    }
    second = {
        "03": question(
            "color", types=types("compare", "attr", "twoCommon"), groups={"global": None}
        ),
        "04": question("blue", types=types("query", "obj"), groups={"global": "color"}),
        "05": question("red", types=types("query", "obj"), groups={"global": "color"}),
        "06": question("left", types=types("choose", "rel"), groups={"global": "side"}),
    }
    choices = {
        "02": {"valid": ["red", "blue", "green"], "plausible": ["red"]},
        "2": {"valid": ["yes", "no"], "plausible": ["yes", "no"]},
        "009": {"valid": [], "plausible": []},
        "03": {"valid": [], "plausible": []},
        "04": {"valid": ["red", "blue", "green"], "plausible": ["blue"]},
        "05": {"valid": ["red", "blue", "green"], "plausible": ["red", "blue"]},
        "06": {"valid": ["left", "right"], "plausible": ["left"]},
        "99": {"valid": [], "plausible": []},
    }
    files = [written(tmp_path / "a.json", first), written(tmp_path / "b.json", second)]
    return files, written(tmp_path / "choices.json", choices)


def test_gqa_by_hand(gqa_files: tuple[list[Path], Path]) -> None:
    files, choices = gqa_files
    given = {"02": "red", "2": "yes", "009": "yes", "03": "shape", "04": "green", "05": "dog"}
    given["06"] = "left"
    found = score_gqa(given, files, [choices])
    assert found == pytest.approx(
        {
            # 02, 2 and 06 are right; 009 is not balanced and counts for consistency alone.
            "accuracy": 3 / 6,
            "accuracy/binary": 2 / 3,
            "accuracy/open": 1 / 3,
            "accuracy/semantic/attr": 2 / 3,
            "accuracy/semantic/obj": 0.0,
            "accuracy/semantic/rel": 1.0,
            "accuracy/structural/choose": 1.0,
            "accuracy/structural/compare": 0.0,
            "accuracy/structural/query": 1 / 3,
            "accuracy/structural/verify": 1.0,
            # 02 entails 2 (right) and 009 (wrong), itself not counted; 2 entails 009 (wrong).
            "consistency": (1 / 2 + 0) / 2,
            # "dog" is no colour; "shape" is one of the three things in common.
            "validity": 5 / 6,
            # Neither is "green" of 04 plausible.
            "plausibility": 4 / 6,
            # color: red 2 against 1, blue 1 against 0, three questions; side: 1 against 1, one.
            "distribution": ((1 / 2 + 1 / 1) * 3 + 0 * 1) / 4 / 100,
        }
    )
    assert list(found)[:2] == ["accuracy", "accuracy/binary"]


def test_gqa_without_what_scores_need(gqa_files: tuple[list[Path], Path], tmp_path: Path) -> None:
    files, _ = gqa_files
    given = {"02": "red", "2": "yes", "03": "shape", "04": "green", "05": "dog", "06": "left"}
    # Nothing that is not balanced is predicted: no consistency, and everything else as ever.
    found = score_gqa(given, files)
    assert {"consistency", "validity", "plausibility"} & set(found) == set()
    assert found["accuracy"] == 0.5 and "distribution" in found
    # An entailed question is in no file.
    absent = written(tmp_path / "absent.json", {"1": question("a", entailed=["1", "77"])})
    assert score_gqa({"1": "a"}, [absent]) == {"accuracy": 1.0}
    # None is entailed but the question itself.
    alone = written(tmp_path / "alone.json", {"1": question("a", entailed=["1"])})
    assert score_gqa({"1": "a"}, [alone]) == {"accuracy": 1.0}
    # All entailed ones are balanced.
    closed = {"1": question("a", entailed=["2"]), "2": question("b", entailed=["1"])}
    file = written(tmp_path / "closed.json", closed)
    assert score_gqa({"1": "a", "2": "a"}, [file]) == {"accuracy": 0.5, "consistency": 0.0}
    assert score_gqa({"1": "b", "2": "a"}, [file])["consistency"] == 0.0
    assert score_gqa({"1": "a", "2": "b"}, [file])["consistency"] == 1.0
    # Answers alone, all of them balanced as nothing is said.
    plain = written(tmp_path / "plain.json", {"1": {"answer": "a"}, "01": {"answer": "b"}})
    assert score_gqa({"1": "b", "01": "b"}, [plain]) == {"accuracy": 0.5}


def test_gqa_that_lacks_predictions(gqa_files: tuple[list[Path], Path]) -> None:
    files, choices = gqa_files
    with pytest.raises(DataError, match=r"5 of 6 questions have no prediction \(first: '2'\)"):
        score_gqa({"02": "red"}, files)
    # One that is not balanced is predicted, so all are due.
    with pytest.raises(DataError, match=r"5 of 7 questions have no prediction \(first: '2'\)"):
        score_gqa({"02": "red", "009": "no"}, files)
    found = score_gqa({"02": "red", "009": "no"}, files, [choices], missing="zero")
    assert found["accuracy"] == found["validity"] == found["plausibility"] == 1 / 6
    assert found["consistency"] == 1 / 2  # of 02: 2 is not, 009 is right
    assert found["distribution"] == pytest.approx(((1 / 2 + 1) * 3 + 1 * 1) / 4 / 100)
    assert "consistency" not in score_gqa({"02": "red"}, files, missing="zero")


def test_gqa_ids_keep_their_zeros(gqa_files: tuple[list[Path], Path]) -> None:
    files, _ = gqa_files
    with pytest.raises(DataError, match=r"1 predictions are of .*\(first: '3'\)"):
        score_gqa({"3": "color"}, files, missing="zero")
    with pytest.raises(DataError, match="question '02' has a second prediction"):
        score_gqa([("02", "red"), ("2", "yes"), ("02", "red")], files)
    with pytest.raises(DataError, match="prediction of question '02' is None, no text"):
        score_gqa({"02": None}, files, missing="zero")


def test_gqa_against_a_plain_walk(tmp_path: Path) -> None:
    rng = random.Random(5)
    ids = [f"{i:04d}" for i in rng.sample(range(2000), 300)]
    words = ["red", "blue", "yes", "no"]
    document: dict[str, Any] = {}
    choices = {}
    for number in ids:
        document[number] = question(
            rng.choice(words),
            isBalanced=rng.random() < 0.6,
            types=types(rng.choice(["query", "verify"]), "obj", rng.choice(["aCommon", "exist"])),
            groups={"global": rng.choice([None, "g", "h"])},
            entailed=rng.sample(ids, rng.randrange(4)),
        )
        choices[number] = {"valid": rng.sample(words, 3), "plausible": rng.sample(words, 1)}
    given = {number: rng.choice([*words, "color"]) for number in ids}
    found = score_gqa(
        given,
        [written(tmp_path / "q.json", document)],
        [written(tmp_path / "c.json", choices)],
    )

    def good(number: str) -> bool:
        return given[number] == document[number]["answer"]

    balanced = [number for number in ids if document[number]["isBalanced"]]
    common = {n for n in ids if "Common" in document[n]["types"]["detailed"]}
    kinds: dict[str, list[bool]] = {"valid": [], "plausible": []}
    for kind, each in kinds.items():
        for number in balanced:
            allowed = ["color", "material", "shape"] if number in common else choices[number][kind]
            each.append(given[number] in allowed)
    shares = []
    for number in balanced:
        others = [e for e in document[number]["entailed"] if e != number]
        if good(number) and others:
            shares.append(np.mean([good(e) for e in others]))
    total = 0.0
    grouped = [n for n in balanced if document[n]["groups"]["global"]]
    for group in ("g", "h"):
        members = [n for n in grouped if document[n]["groups"]["global"] == group]
        for word in words:
            true = sum(document[n]["answer"] == word for n in members)
            said = sum(given[n] == word for n in members)
            total += len(members) * (said - true) ** 2 / true
    query = [n for n in balanced if document[n]["types"]["structural"] == "query"]
    verify = [n for n in balanced if n not in query]
    assert found == pytest.approx(
        {
            "accuracy": np.mean([good(n) for n in balanced]),
            "accuracy/binary": np.mean([good(n) for n in verify]),
            "accuracy/open": np.mean([good(n) for n in query]),
            "accuracy/semantic/obj": np.mean([good(n) for n in balanced]),
            "accuracy/structural/query": np.mean([good(n) for n in query]),
            "accuracy/structural/verify": np.mean([good(n) for n in verify]),
            "consistency": np.mean(shares),
            "validity": np.mean(kinds["valid"]),
            "plausibility": np.mean(kinds["plausible"]),
            "distribution": total / len(grouped) / 100,
        }
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"1": {"answer": "a"}', "is not JSON: "),
        ('[{"answer": "a"}]', "is not an object"),
        ("{}", "there is no question in the files"),
        ('{"1": 3}', "question 1 has no answer"),
        ('{"1": {"question": "?"}}', "question 1 has no answer: name questions that come with"),
        ('{"1": {"answer": "a"}, "1": {"answer": "a"}}', "question 1 comes twice"),
        ('{"1": {"answer": "a", "isBalanced": "yes"}}', "isBalanced is 'yes', not true or false"),
        ('{"1": {"answer": "a", "isBalanced": false}}', "no question is balanced"),
        ('{"1": {"answer": "a", "entailed": [2]}}', "entailed is no list of question ids"),
        ('{"1": {"answer": "a", "types": ["query"]}}', "types is \\['query'\\], no object"),
        ('{"1": {"answer": "a", "types": {"semantic": 1}}}', "the semantic type is 1, no name"),
        ('{"1": {"answer": "a", "groups": {"global": 1}}}', "the global group is 1, no name"),
    ],
)
def test_damaged_questions(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "questions.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        score_gqa({}, [path], missing="zero")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"02": {"valid": ["red"]', "is not JSON: "),
        ('{"02": {"valid": ["red"]}}', "question 02 has no list 'plausible'"),
        ('{"02": {"valid": "red", "plausible": []}}', "question 02 has no list 'valid'"),
        ('{"02": {"valid": [], "plausible": []}}', r"5 questions are in no file of .*\(first: '2'"),
    ],
)
def test_damaged_choices(
    gqa_files: tuple[list[Path], Path], tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "damaged.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        score_gqa({}, gqa_files[0], [path], missing="zero")
    with pytest.raises(DataError, match="question 02 comes twice"):
        score_gqa({}, gqa_files[0], [gqa_files[1], gqa_files[1]], missing="zero")


# --- NLVR2 ---

_LABELS = {
    "dev-1-0-0": True,  # one sentence with three pairs
    "dev-1-1-0": False,
    "dev-1-2-0": True,
    "dev-1-0-1": False,  # another sentence of that set
    "dev-2-0-0": True,  # the first's number in another set
    "test1-1-0-0": True,  # and in another split
}


def test_nlvr2() -> None:
    perfect = {"accuracy": 1.0, "consistency": 1.0, "majority": 4 / 6}
    assert score_nlvr2(_LABELS, _LABELS) == perfect
    words = {i: str(label).upper() for i, label in _LABELS.items()}
    assert score_nlvr2(words.items(), _LABELS.items()) == perfect
    assert score_nlvr2({i: np.bool_(label) for i, label in _LABELS.items()}, words) == perfect
    # One wrong pair of the sentence with three, wherever it comes, and the sentence alone.
    for pair in range(3):
        name = f"dev-1-{pair}-0"
        found = score_nlvr2(_LABELS | {name: not _LABELS[name]}, _LABELS)
        assert found == {"accuracy": 5 / 6, "consistency": 3 / 4, "majority": 4 / 6}
    always = score_nlvr2(dict.fromkeys(_LABELS, True), _LABELS)
    assert always == {"accuracy": 4 / 6, "consistency": 2 / 4, "majority": 4 / 6}
    few = {"dev-1-0-0": False, "dev-1-1-0": False, "dev-2-0-0": True}
    assert score_nlvr2(few, few)["majority"] == 2 / 3


def test_nlvr2_predictions_that_are_wrong() -> None:
    less = {i: label for i, label in _LABELS.items() if i != "dev-1-1-0"}
    with pytest.raises(DataError, match=r"1 of 6 questions .*\(first: 'dev-1-1-0'\)"):
        score_nlvr2(less, _LABELS)
    # A wrong judgement even of a statement whose label is False.
    found = score_nlvr2(less, _LABELS, missing="zero")
    assert found["accuracy"] == 5 / 6 and found["consistency"] == 3 / 4
    with pytest.raises(DataError, match=r"1 predictions are of .*\(first: 'dev-9-0-0'\)"):
        score_nlvr2(_LABELS | {"dev-9-0-0": True}, _LABELS)
    with pytest.raises(DataError, match="question 'dev-1-0-0' has a second prediction"):
        score_nlvr2([*_LABELS.items(), ("dev-1-0-0", True)], _LABELS)
    with pytest.raises(DataError, match="question 'dev-1-0-0' has a second label"):
        score_nlvr2(_LABELS, [*_LABELS.items(), ("dev-1-0-0", True)])
    with pytest.raises(DataError, match="the prediction of 'dev-1-0-0' is 1, not True or False"):
        score_nlvr2(_LABELS | {"dev-1-0-0": 1}, _LABELS)
    with pytest.raises(DataError, match="'dev-1-0' is no identifier"):
        score_nlvr2({"dev-1-0": True}, {"dev-1-0": True})


def nlvr2_file(path: Path, labels: dict[str, Any] = _LABELS) -> Path:
    lines = [{"identifier": i, "sentence": "A dog.", "label": str(v)} for i, v in labels.items()]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_nlvr2_labels_of_files(tmp_path: Path) -> None:
    names = list(_LABELS)
    first = nlvr2_file(tmp_path / "a.json", {i: _LABELS[i] for i in names[:2]})
    second = nlvr2_file(tmp_path / "b.json", {i: _LABELS[i] for i in names[2:]})
    assert list(read_labels([first, second])) == list(_LABELS.items())
    for line, message in [
        ('{"identifier": "dev-1-0-0"}', "line 7: the statement has no label"),
        ('{"identifier": "dev-1-0", "label": "True"}', "line 7: 'dev-1-0' is no identifier"),
        ('{"identifier": "dev-1-0-0", "label": "yes"}', "line 7: the label is 'yes', not True"),
        ('{"identifier": "dev', "line 7 is not JSON"),
    ]:
        damaged = nlvr2_file(tmp_path / "c.json")
        damaged.write_text(damaged.read_text() + line)
        with pytest.raises(DataError, match=message):
            list(read_labels([damaged]))


# --- files of predictions ---

_VQA_ROWS = [(5, 'a "dog"'), (70, ""), (300, "naïve")]
_GQA_ROWS = [("02", "red"), ("2", "yes")]
_NLVR2_ROWS = [("dev-1-0-0", True), ("dev-1-0-1", False)]


def test_submissions_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "submission"
    submission.write_vqa(path, iter(_VQA_ROWS))
    assert json.loads(path.read_text()) == [
        {"question_id": 5, "answer": 'a "dog"'},
        {"question_id": 70, "answer": ""},
        {"question_id": 300, "answer": "naïve"},
    ]
    assert list(submission.read_vqa(path)) == _VQA_ROWS
    once = path.read_bytes()
    submission.write_vqa(path, ((np.int64(number), answer) for number, answer in _VQA_ROWS))
    assert path.read_bytes() == once
    submission.write_gqa(path, iter(_GQA_ROWS))
    assert json.loads(path.read_text()) == [
        {"questionId": "02", "prediction": "red"},
        {"questionId": "2", "prediction": "yes"},
    ]
    assert list(submission.read_gqa(path)) == _GQA_ROWS
    submission.write_nlvr2(path, iter(_NLVR2_ROWS))
    assert path.read_text() == "dev-1-0-0,True\ndev-1-0-1,False\n"
    assert list(submission.read_nlvr2(path)) == _NLVR2_ROWS
    path.write_bytes(b"\xef\xbb\xbfdev-1-0-0,true\r\n\r\ndev-1-0-1, FALSE")
    assert list(submission.read_nlvr2(path)) == _NLVR2_ROWS
    for write, read in (
        (submission.write_vqa, submission.read_vqa),
        (submission.write_gqa, submission.read_gqa),
    ):
        write(path, [])
        assert json.loads(path.read_text()) == list(read(path)) == []
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("write", "rows", "message"),
    [
        (submission.write_vqa, [(5, "a"), (5, "b")], "of question 5 comes after that of 5: sort"),
        (submission.write_vqa, [(10, "a"), (9, "b")], "of question 9 comes after that of 10"),
        (submission.write_vqa, [("6", "a"), (5, "b")], "of question 5 comes after that of '6'"),
        (submission.write_vqa, [(5, "a"), (True, "b")], "question_id True is no whole number"),
        (submission.write_vqa, [(5, "a"), (6, None)], "of question 6 is None, no text"),
        (submission.write_gqa, [("02", "a"), ("02", "b")], "'02' comes after that of '02'"),
        (submission.write_gqa, [("2", "a"), ("02", "b")], "'02' comes after that of '2'"),
        (submission.write_gqa, [("02", "a"), (3, "b")], "question id 3 is no text"),
        (submission.write_nlvr2, [("dev-1-0-0", True), ("dev-1,0-0-0", True)], "no identifier"),
        (submission.write_nlvr2, [("dev-1-0-0", True), ("dev-1-0-1", 1)], "is 1, not True or"),
    ],
)
def test_a_submission_that_fails_leaves_nothing(
    tmp_path: Path, write: Callable[[Path, Any], None], rows: list[Any], message: str
) -> None:
    path = tmp_path / "submission"
    with pytest.raises(DataError, match=message):
        write(path, iter(rows))
    assert list(tmp_path.iterdir()) == []
    path.write_text("of before")

    def cut() -> Iterator[Any]:
        yield rows[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, cut())
    assert path.read_text() == "of before" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(DataError, match="is a folder: name a file"):
        write(tmp_path, iter(rows[:1]))


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (submission.read_vqa, b'[{"question_id": 1, "answer": "a"}', "is not JSON: "),
        (submission.read_vqa, b'{"question_id": 1}', "is not a list"),
        (submission.read_vqa, b"[1]", "prediction 0 is 1, no object"),
        (submission.read_vqa, b'[{"answer": "a"}]', "the question_id is None, no whole number"),
        (submission.read_vqa, b'[{"question_id": 1}]', "prediction 0: the answer is None"),
        (submission.read_gqa, b'[{"questionId": 2, "prediction": "a"}]', "with its leading zeros"),
        (submission.read_gqa, b'[{"questionId": "2", "answer": "a"}]', "the prediction is None"),
        (submission.read_nlvr2, b"dev-1-0-0,True\ndev-1-0-1\n", "line 2: it is not identifier,"),
        (submission.read_nlvr2, b"dev-1-0-0,True,x\n", "line 1: the prediction is 'True,x', not"),
        (submission.read_nlvr2, b"dev-1-0-0,\n", "line 1: the prediction is '', not True"),
        (submission.read_nlvr2, b"identifier,label\n", "line 1: 'identifier' is no identifier"),
        (submission.read_nlvr2, b"\xff\xfe,True\n", "are no UTF-8 text"),
    ],
)
def test_damaged_submissions(
    tmp_path: Path, read: Callable[[Path], Iterator[Any]], content: bytes, message: str
) -> None:
    path = tmp_path / "submission"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read(path))
    with pytest.raises(DataError, match=r"cannot read the .*predictions .*/none"):
        list(read(tmp_path / "none"))


# --- the command ---


def run(capsys: pytest.CaptureFixture[str], *line: object) -> tuple[int, str, str]:
    status = main(["score", *map(str, line)])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command(
    tmp_path: Path,
    vqa_file: Path,
    gqa_files: tuple[list[Path], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    submission.write_vqa(tmp_path / "vqa", [(5, "yes"), (6, "two"), (7, "red")])
    vqa = ("vqa", tmp_path / "vqa", "--annotations", vqa_file)
    status, out, err = run(capsys, *vqa)
    assert (status, out) == (2, "")
    assert "error: 1 of 4 questions have no prediction (first: 8)" in err
    status, out, err = run(capsys, *vqa, "--missing", "zero")
    # Two of ten said yes: 0.6.
    assert status == 0 and [text.rsplit(" ", 1) for text in out.splitlines()[:2]] == [
        ["accuracy".ljust(len("accuracy/question_type/what color")), "0.6500"],
        ["accuracy/number".ljust(len("accuracy/question_type/what color")), "0.5000"],
    ]

    files, choices = gqa_files
    rows = {"02": "red", "03": "color", "04": "blue", "05": "red", "06": "left", "2": "no"}
    submission.write_gqa(tmp_path / "gqa", rows.items())
    gqa = ("gqa", tmp_path / "gqa", "--annotations", *files, "--json")
    status, out, err = run(capsys, *gqa)
    assert status == 0 and json.loads(out) == score_gqa(rows, files)
    assert "consistency is left out: it needs every entailed question" in err
    assert "validity is left out: it needs the file of choices" in err
    status, out, err = run(capsys, *gqa, "--choices", choices)
    assert json.loads(out) == score_gqa(rows, files, [choices]) and "validity" not in err

    labels = nlvr2_file(tmp_path / "labels.json")
    submission.write_nlvr2(tmp_path / "nlvr2", sorted((i, True) for i in _LABELS))
    status, out, err = run(capsys, "nlvr2", tmp_path / "nlvr2", "--annotations", labels)
    assert (status, err) == (0, "")
    assert out == "accuracy    0.6667\nconsistency 0.5000\nmajority    0.6667\n"

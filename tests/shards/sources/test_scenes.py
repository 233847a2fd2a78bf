"""Scenes: sentences are true of their pictures, language alone tells nothing, files are a pure
function of the settings, and `build` reads them."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.cli.main import main
from shards.convert.convert import convert
from shards.convert.inputs import FeatureInput, Inputs, SentenceInput
from shards.convert.pool import in_processes
from shards.errors import DataError
from shards.format.answers import load_answers
from shards.format.build import BuildSettings
from shards.format.tokenizer import SPECIAL, load_tokenizer
from shards.format.verify import verify
from shards.sources.features import tsv
from shards.sources.regions import Options
from shards.sources.scenes import SceneSettings, Written, language_prior, write_scenes
from shards.sources.scenes.picture import FEATURE_DIM, OBJECTS
from shards.webdataset import as_webdataset

SMALL = SceneSettings(images=500, pairs=160)
TINY = SceneSettings(images=100, pairs=4, questions=3)

Things = list[dict[str, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Written]:
    out = tmp_path_factory.mktemp("scenes") / "made"
    return out, write_scenes(out, SMALL)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as f:
        yield from map(json.loads, f)


def _scenes(folder: Path) -> dict[str, Things]:
    return {entry["image"]: entry["things"] for entry in _lines(folder / "scenes.jsonl")}


def _contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


# --- truth, read from the sentences alone -------------------------------------------------------

_SIZE, _COLOUR = r"small|large", r"red|green|blue|yellow|purple|orange"
_SHAPE = r"circle|square|triangle|star|cross|shape|one"
_NOUN = rf"(?:(?:{_SIZE}) )?(?:(?:{_COLOUR}) )?(?:{_SHAPE})(?:es|s)?"
_WHERE = r"left of|right of|above|below"
_NUMBER = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}


def _those(things: Things, noun: str) -> Things:
    """The things that a noun (`large red stars`) is about."""
    found = things
    for word in noun.removeprefix("an ").removeprefix("a ").split():
        if re.fullmatch(_SIZE, word):
            found = [t for t in found if t["size"] == word]
        elif re.fullmatch(_COLOUR, word):
            found = [t for t in found if t["colour"] == word]
        elif not re.fullmatch("(shape|one)s?", word):
            (shape,) = (s for s in _SHAPE.split("|") if word in (s, f"{s}s", f"{s}es"))
            found = [t for t in found if t["shape"] == shape]
    return found


def _stands(a: dict[str, Any], where: str, b: dict[str, Any]) -> bool:
    return {
        "left of": a["x"] < b["x"],
        "right of": a["x"] > b["x"],
        "above": a["y"] < b["y"],
        "below": a["y"] > b["y"],
    }[where]


def _answer(text: str, things: Things) -> str:
    """What is to be answered; fails where the question makes no sense or is of no known form."""
    if m := re.fullmatch(rf"how many ({_NOUN}) are there\?", text):
        return str(len(_those(things, m[1])))
    if m := re.fullmatch(rf"is there an? ({_NOUN})\?", text):
        return "yes" if _those(things, m[1]) else "no"
    if m := re.fullmatch(rf"are there more ({_NOUN}) than ({_NOUN})\?", text):
        return "yes" if len(_those(things, m[1])) > len(_those(things, m[2])) else "no"
    if m := re.fullmatch(rf"what (colour|shape|size) is the ({_NOUN})\?", text):
        (thing,) = _those(things, m[2])
        return str(thing[m[1]])
    if m := re.fullmatch(rf"what shape is ({_WHERE}) the ({_NOUN})\?", text):
        (to,) = _those(things, m[2])
        (thing,) = (t for t in things if _stands(t, m[1], to))
        return str(thing["shape"])
    m = re.fullmatch(rf"is the ({_NOUN}) ({_WHERE}) the ({_NOUN})\?", text)
    assert m, text
    (a,), (b,) = _those(things, m[1]), _those(things, m[3])
    return "yes" if _stands(a, m[2], b) else "no"


def _true_caption(text: str, things: Things) -> bool:
    if m := re.fullmatch(rf"(\w+) shapes, (\w+) of them ({_COLOUR})", text):
        return [_NUMBER[m[1]], _NUMBER[m[2]]] == [len(things), len(_those(things, m[3]))]
    if m := re.fullmatch(rf"(an? {_NOUN}) ({_WHERE}) (an? {_NOUN})", text):
        return any(_stands(a, m[2], b) for a in _those(things, m[1]) for b in _those(things, m[3]))
    named = Counter(re.split(", | and ", text))
    return all(len(_those(things, noun)) >= n for noun, n in named.items())


_STATEMENTS: dict[str, Callable[[int, int], bool]] = {
    rf"both pictures have an? ({_NOUN})": lambda a, b: a > 0 and b > 0,
    rf"one picture shows an? ({_NOUN}) and the other does not": lambda a, b: (a > 0) != (b > 0),
    rf"the left picture has more ({_NOUN}) than the right one": lambda a, b: a > b,
    rf"the left picture has fewer ({_NOUN}) than the right one": lambda a, b: a < b,
    rf"the two pictures have the same number of ({_NOUN})": lambda a, b: a == b,
    rf"there are exactly two ({_NOUN}) in all": lambda a, b: a + b == 2,
    rf"there are exactly three ({_NOUN}) in all": lambda a, b: a + b == 3,
    rf"there are exactly four ({_NOUN}) in all": lambda a, b: a + b == 4,
}


def test_questions_and_captions_are_true(made: tuple[Path, Written]) -> None:
    out, written = made
    for split in ("train", "valid", "test"):
        scenes = _scenes(out / split)
        assert all(2 <= len(things) <= 6 for things in scenes.values())
        kinds: Counter[str] = Counter()
        for entry in _lines(out / split / "questions.jsonl"):
            assert _answer(entry["sentence"], scenes[entry["image"]]) == next(
                iter(entry["answers"])
            )
            kinds[entry["kind"]] += 1
        assert set(kinds) == {"count", "exist", "compare", "attribute", "relation"}
        if split == "train":  # what balance costs is little, and no kind bears it alone
            assert min(kinds.values()) > 0.6 * SMALL.images, kinds
        told = Counter(e["image"] for e in _lines(out / split / "captions.jsonl"))
        assert set(told) == set(scenes) and set(told.values()) == {2, 3}
        for entry in _lines(out / split / "captions.jsonl"):
            assert _true_caption(entry["sentence"], scenes[entry["image"]]), entry
        assert written.counts[split]["questions"] == kinds.total()


def test_statements_are_labelled_as_their_pairs_are(made: tuple[Path, Written]) -> None:
    out, _ = made
    forms: Counter[str] = Counter()
    labels: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for split in ("train", "valid", "test"):
        scenes = _scenes(out / f"pairs-{split}")
        for entry in _lines(out / f"pairs-{split}" / "statements.json"):
            _, set_, pair, number = entry["identifier"].split("-")
            (form, match) = next(
                (f, m) for f in _STATEMENTS if (m := re.fullmatch(f, entry["sentence"]))
            )
            left, right = (scenes[f"{split}-{set_}-{pair}-img{side}"] for side in (0, 1))
            true = _STATEMENTS[form](len(_those(left, match[1])), len(_those(right, match[1])))
            assert entry["label"] == str(true)
            forms[form] += 1
            labels[split, set_, number].append(entry["label"])
    assert set(forms) == set(_STATEMENTS)
    assert all(sorted(of) == ["False", "False", "True", "True"] for of in labels.values())


# --- balance ------------------------------------------------------------------------------------


def test_a_question_alone_tells_nothing(made: tuple[Path, Written]) -> None:
    out, written = made
    for split in ("train", "valid", "test"):
        answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for entry in _lines(out / split / "questions.jsonl"):
            answers[entry["sentence"]].update(entry["answers"].keys())
        assert all(len(set(of.values())) == 1 and len(of) > 1 for of in answers.values())
    for split in ("valid", "test"):
        assert set(written.prior[split]) == {"count", "exist", "compare", "attribute", "relation"}
        for prior in written.prior[split].values():
            assert prior.accuracy == pytest.approx(prior.chance)
        assert written.prior[split]["count"].chance == pytest.approx(1 / 4)
        assert written.prior[split]["exist"].chance == pytest.approx(1 / 2)


def test_a_statement_alone_tells_nothing_and_one_picture_little(
    made: tuple[Path, Written],
) -> None:
    out, written = made
    for split in ("valid", "test"):
        assert written.prior[f"pairs-{split}"]["statement"].accuracy == 0.5
    labels: defaultdict[str, Counter[str]] = defaultdict(Counter)
    by_left: defaultdict[tuple[str, int], Counter[str]] = defaultdict(Counter)
    scenes = _scenes(out / "pairs-train")
    for entry in _lines(out / "pairs-train" / "statements.json"):
        form, match = next((f, m) for f in _STATEMENTS if (m := re.fullmatch(f, entry["sentence"])))
        left = scenes[entry["identifier"].rpartition("-")[0] + "-img0"]
        labels[entry["sentence"]][entry["label"]] += 1
        by_left[form, len(_those(left, match[1]))][entry["label"]] += 1
    assert all(of["True"] == of["False"] for of in labels.values())
    best = sum(max(of.values()) for of in by_left.values()) / sum(
        map(Counter.total, by_left.values())
    )
    assert best < 0.68  # fitted to these very pairs


def test_the_prior_finds_what_texts_give_away(tmp_path: Path) -> None:
    def write(name: str, rows: list[tuple[str, str, str]]) -> Path:
        path = tmp_path / name
        lines = [{"kind": k, "sentence": s, "answers": {a: 1}} for k, s, a in rows]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    learned = write("a", [("k", "s", "x"), ("k", "s", "x"), ("k", "s", "y"), ("k", "t", "y")])
    held_out = write("b", [("k", "s", "x"), ("k", "s", "y"), ("k", "new", "x"), ("k", "t", "y")])
    prior = language_prior(learned, held_out)["k"]
    assert (prior.questions, prior.accuracy) == (4, 0.5)
    assert prior.chance == (1 / 2 + 1 / 2 + 1 / 2 + 1) / 4
    learned.write_text('{"sentence": "s"}\n')
    with pytest.raises(DataError, match="a, line 1"):
        language_prior(learned, held_out)


# --- pictures and regions -----------------------------------------------------------------------


def test_features_tell_what_a_thing_is(made: tuple[Path, Written]) -> None:
    """A network with one layer of random units, fitted to train, finds shape, colour and size in
    the features of valid."""
    out, _ = made

    def regions(split: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        x, y = [], defaultdict(list)
        path, scenes = str(out / split / "features.tsv"), _scenes(out / split)
        options = Options(feature_dim=FEATURE_DIM)
        with tsv.FORMAT.reader(path, options) as read:
            for entry in tsv.FORMAT.entries(path, options):
                found = read(entry)
                assert found.features.shape == (8, FEATURE_DIM) and found.labels is not None
                centres = (found.boxes[:, :2] + found.boxes[:, 2:]) * 48
                things = scenes[entry.image]
                shown = [
                    i for i, o in enumerate(found.labels.object_id) if OBJECTS[o] != "background"
                ]
                assert len(shown) == len(things)
                for i in shown:
                    apart = [np.hypot(*(centres[i] - (t["x"], t["y"]))) for t in things]
                    thing = things[int(np.argmin(apart))]
                    assert min(apart) < 3 and OBJECTS[found.labels.object_id[i]] == thing["shape"]
                    x.append(np.append(found.features[i], 1.0))
                    for part in ("shape", "colour", "size"):
                        y[part].append(thing[part])
        return np.array(x), {part: np.array(values) for part, values in y.items()}

    hidden = np.random.default_rng(0).normal(size=(FEATURE_DIM + 1, 300))
    x, y = regions("train")
    held_out, truth = regions("valid")
    x, held_out = (np.maximum(given @ hidden, 0) for given in (x, held_out))
    for part, values in y.items():
        names = sorted(set(values))
        weights = np.linalg.solve(x.T @ x + np.eye(300), x.T @ (values[:, None] == names))
        right = np.mean(np.array(names)[(held_out @ weights).argmax(1)] == truth[part])
        assert right > 0.9, (part, right)


def test_pictures_show_the_scenes(made: tuple[Path, Written]) -> None:
    out, _ = made
    for image, things in list(_scenes(out / "train").items())[:50]:
        pixels = np.asarray(Image.open(out / "train" / "pictures" / f"{image}.png")).astype(int)
        assert pixels.shape == (96, 96, 3)
        for thing in things:
            r, g, b = pixels[round(thing["y"]), round(thing["x"])]
            assert {
                "red": r > g + 80 and r > b + 80,
                "green": g > r + 50 and g > b + 50,
                "blue": b > r + 80 and b > g + 80,
                "yellow": min(r, g) > b + 100 and r - g < 60,
                "purple": min(r, b) > g + 40,
                "orange": r - g > 60 and g > b + 60,
            }[thing["colour"]], (image, thing, (r, g, b))


# --- the folder ---------------------------------------------------------------------------------


def test_the_same_settings_give_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        write_scenes(tmp_path / name, SceneSettings(**{**vars(TINY), "seed": seed}))
    one, two, three = (_contents(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two and one.keys() == three.keys()
    same = {name for name in one if one[name] == three[name]}
    assert same == {"vocab.txt", "answers.json", "objects.txt", "attributes.txt"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "three", "two"]


def test_what_is_there_is_kept_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    first = write_scenes(out, TINY)
    before = _contents(out)
    again = write_scenes(out, TINY)
    assert (first.fresh, again.fresh) == (True, False)
    assert (again.counts, again.prior) == (first.counts, first.prior)
    with pytest.raises(DataError, match=r"other settings \(seed is 0\)"):
        write_scenes(out, SceneSettings(**{**vars(TINY), "seed": 1}))
    assert _contents(out) == before
    (out / "valid" / "captions.jsonl").write_text("")
    with pytest.raises(DataError, match=r"captions.jsonl is not as it was written"):
        write_scenes(out, TINY)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine").touch()
    assert main(["shards", "scenes", str(other)]) == 2
    assert f"{other} is not empty" in capsys.readouterr().err
    assert [p.name for p in other.iterdir()] == ["mine"]


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def stop(_what: str, _done: int, _total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "out", TINY, stop)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_leaves_is_no_folder_of_scenes(tmp_path: Path) -> None:
    def die(_what: str, _done: int, _total: int | None) -> None:
        os._exit(9)

    child = os.fork()
    if not child:
        write_scenes(tmp_path / "out", TINY, die)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".")
    assert write_scenes(tmp_path / "out", TINY).fresh
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# --- into a data set ----------------------------------------------------------------------------


def test_a_build_reads_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "in"
    line = f"shards scenes {out} --images 100 --pairs 8 --json --quiet"
    assert main(shlex.split(line)) == 0
    told = json.loads(capsys.readouterr().out)
    answers, vocab = load_answers(out / "answers.json"), out / "vocab.txt"
    unknown = load_tokenizer(vocab).token_to_id("[UNK]")
    for name, counts in told["counts"].items():
        files = ("statements.json",) if "pairs" in name else ("captions.jsonl", "questions.jsonl")
        manifest = convert(
            Inputs(
                (FeatureInput(str(out / name / "features.tsv")),),
                (SentenceInput(tuple(out / name / f for f in files)),),
            ),
            tmp_path / name,
            BuildSettings(name, "scenes", vocab=vocab, answers=answers),
            options=Options(feature_dim=told["feature_dim"]),
            workers=in_processes(1),
        )
        # A record of statements is of two pictures.
        assert manifest.counts.images * (1 + ("pairs" in name)) == counts.pop("images")
        assert manifest.counts.pairs == sum(counts.values())
    assert verify(str(tmp_path / "train")) == []
    written = {e["id"]: e for e in _lines(out / "train" / "questions.jsonl")}
    read = {}
    for record in as_webdataset(str(tmp_path / "train")):
        for sentence in record["sentences"]:
            if "id" in sentence:
                read[sentence["id"]] = (record["image"], sentence)
    assert read.keys() == written.keys()
    for number, entry in written.items():
        image, sentence = read[number]
        assert (image, sentence["text"]) == (entry["image"], entry["sentence"])
        assert (sentence["answers"], sentence["kind"]) == (entry["answers"], entry["kind"])
    every = [e["sentence"] for path in out.rglob("*.json*") if path.parent != out
             for e in _lines(path) if "sentence" in e]  # fmt: skip
    tokens = load_tokenizer(vocab).encode_batch(every)
    assert not any(unknown in t.ids for t in tokens) and max(len(t.ids) for t in tokens) <= 18
    assert set(vocab.read_text().split()) >= set(SPECIAL)


def test_the_commands_that_it_prints_build(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "with space"
    line = ["shards", "scenes", str(out), "--images", "100", "--pairs", "4", "--quiet"]
    assert main(line) == 0
    commands = [shlex.split(c) for c in capsys.readouterr().out.splitlines() if " build " in c]
    assert len(commands) == 6
    assert main([*commands[3][1:], "--quiet", "--workers", "1"]) == 0
    assert verify(str(tmp_path / "with space-shards" / "pairs-train")) == []

"""Pictures as a source, and the commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from cluster.cli.main import parse
from shards.convert.convert import records
from shards.convert.inputs import FeatureInput, Inputs, SentenceInput
from shards.errors import DataError
from shards.format.manifest import load_manifest
from shards.format.record import Report
from shards.sources.easy_vqa import write_easy_vqa
from shards.sources.features.grid import LAYOUTS, describe, grid_boxes
from tests.conftest import contents, files_of, subprocess_environment


def cli(*arguments: object) -> int:
    args = parse(["shards", *map(str, arguments)])
    return int(args.func(args))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven random pictures and their sentences.json."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    entries = []
    for i in range(7):
        size = (24 + i, 32, 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{i}.png")
        color = ["Red", "a blue.", "grey"][i % 3]
        sentences = [
            {"text": f"What color has the picture {i}?", "answers": {color: 1.0}, "id": f"00{i}"},
            {"text": "A picture of nothing.", "source": "coco_cap"},
        ]
        entries.append({"image": f"{i}.png", "split": "train", "sentences": sentences})
    (folder / "sentences.json").write_text(json.dumps(entries))
    return folder


def inputs(folder: Path, sentences: Path) -> Inputs:
    features = FeatureInput(str(folder), "grid", settings={"boxes": "1"})
    return Inputs((features,), (SentenceInput((sentences,), "pictures"),))


def test_two_processes_build_the_same_bytes(tmp_path: Path, pictures: Path) -> None:
    script = (
        "import sys\nfrom cluster.cli.main import main\n"
        "if __name__ == '__main__':\n    sys.exit(main())\n"
    )
    (tmp_path / "run.py").write_text(script)
    for seed, workers, out in (("1", "1", "a/data"), ("2", "2", "b/data")):
        subprocess.run(
            [
                *(sys.executable, tmp_path / "run.py", "shards", "build", "--quiet"),
                *("--features", pictures, "--sentences", pictures / "sentences.json"),
                *("--source", "vqa", "--feature-option", "boxes=5", "--images-per-shard", "3"),
                *("--workers", workers, "--out", tmp_path / out),
            ],
            env=subprocess_environment(PYTHONHASHSEED=seed),
            check=True,
        )
    assert len(contents(tmp_path / "a/data")) == 9
    assert contents(tmp_path / "a/data") == contents(tmp_path / "b/data")
    manifest = load_manifest(str(tmp_path / "a/data"))
    assert json.loads((files_of(tmp_path / "a/data") / "answers.json").read_text()) == [
        "red",
        "blue",
        "gray",
    ]
    assert manifest.counts.sentences == {"coco_cap": 7, "vqa": 7}


def test_grids_and_features() -> None:
    for n in LAYOUTS:
        boxes = grid_boxes(n)
        assert boxes.shape == (n, 4) and boxes.min() == 0 and boxes.max() == 1
        assert len(np.unique(boxes, axis=0)) == n
        assert (boxes[:, 0] < boxes[:, 2]).all() and (boxes[:, 1] < boxes[:, 3]).all()
    np.testing.assert_allclose(grid_boxes(10)[5], [0.25, 0.25, 0.75, 0.75])
    with pytest.raises(DataError, match="choose one of"):
        grid_boxes(7)
    image = Image.new("RGB", (3, 2), (255, 0, 0))
    features = describe(image, grid_boxes(36))
    assert features.shape == (36, 2048) and features.dtype == np.float16
    np.testing.assert_array_equal(features[:, :6], [[1, 0, 0, 0, 0, 0]] * 36)
    with pytest.raises(DataError, match="at least 442"):
        describe(image, grid_boxes(1), 100)


def test_grey_of_16_bits_is_not_white(tmp_path: Path) -> None:
    grey = np.tile(np.arange(16, dtype=np.uint16) * 4000, (16, 1))
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray((grey >> 8).astype(np.uint8)).save(tmp_path / "b.png")
    entries = [{"image": f"{n}.png", "sentences": [{"text": "x"}]} for n in "ab"]
    (tmp_path / "s.json").write_text(json.dumps(entries))
    one, other = records(inputs(tmp_path, tmp_path / "s.json"))
    np.testing.assert_array_equal(one.features, other.features)


def test_bad_pictures_and_sentences(pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.json"

    def read(entries: object, **options: bool) -> list:
        file.write_text(json.dumps(entries))
        return list(records(inputs(pictures, file), **options))

    sentence = {"text": "x", "source": "vqa"}
    cases: list[tuple[object, str]] = [
        ({}, "not a list"),
        ([{"image": "0.png", "sentences": [{"source": "vqa"}]}], r"entry 0 \(0.png\), sentence 0"),
        ([{"image": "../0.png", "sentences": [sentence]}], "out of the folder"),
        ([{"image": "0.png", "sentences": [sentence]}] * 2, "same image as entry 0"),
        ([{"image": "0.png", "sentences": [sentence], "x": 1}], "unknown key 'x'"),
        ([{"image": "0.png", "sentences": [{**sentence, "answers": {"a": 2}}]}], "not 0..1"),
        ([{"image": "no.png", "sentences": [sentence]}], "no features .first: no"),
    ]
    for entries, message in cases:
        with pytest.raises(DataError, match=message):
            read(entries)
    report = Report()
    file.write_text(
        json.dumps(
            [
                {"image": "no.png", "sentences": [sentence]},
                {"image": "1.png", "sentences": []},
                {"image": "2.png", "sentences": [sentence]},
                {"image": "6.png", "sentences": [sentence]},
            ]
        )
    )
    (pictures / "6.png").write_bytes(b"no picture")
    kept = records(inputs(pictures, file), skip_bad=True, report=report)
    assert [r.image for r in kept] == ["2.png"]
    assert report.counts == {
        "images with sentences but without features": 1,
        "images without sentences": 5,
        "bad records": 1,
    }


def test_easy_vqa_and_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = write_easy_vqa(tmp_path / "easy")
    entries = json.loads(written.sentences["test"].read_text())
    assert len(entries) == 1000 and sum(len(e["sentences"]) for e in entries) == 9673
    few = tmp_path / "few.json"
    few.write_text(json.dumps(entries[:8]))
    out = tmp_path / "data"
    code = cli(
        *("build", "--features", written.images["test"], "--sentences", few, "--skip-bad"),
        *("--feature-option", "boxes=10", "--answers", written.answers, "--workers", 1),
        *("--vocab-size", 300, "--out", out),
    )
    assert code == 0 and "source       easy_vqa" in capsys.readouterr().out
    assert cli("info", out) == 0
    assert "answers      13" in capsys.readouterr().out
    assert cli("info", out, "--json") == 0 == cli("verify", out, "--json")
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (told[0]["answers"], told[0]["images"], told[1]["whole"]) == (13, 8, True)
    assert cli("verify", out) == 0
    (files_of(out) / "answers.json").write_text("[]")
    assert cli("verify", out) == 1
    assert "answers.json has 2 bytes" in capsys.readouterr().out


_BUILDER = """
import sys
from pathlib import Path
from shards.convert.convert import convert
from shards.convert.inputs import FeatureInput, Inputs, SentenceInput
from shards.convert.pool import in_processes
from shards.format.build import BuildSettings
if __name__ == "__main__":
    def progress(what, done, total):
        if what == "images written":
            print("up", flush=True)
            sys.stdin.read()
    inputs = Inputs((FeatureInput(sys.argv[1], "grid"),), (SentenceInput((Path(sys.argv[2]),)),))
    settings = BuildSettings("set", "test", images_per_shard=1)
    try:
        convert(inputs, sys.argv[3], settings, workers=in_processes(2), progress=progress)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_the_one_that_they_work_for(tmp_path: Path, number: int) -> None:
    """And say nothing of a Ctrl-C, which a terminal sends to all of them."""
    entries = []
    for i in range(100):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
        entries.append({"image": f"{i}.png", "sentences": [{"text": "a"}]})
    (tmp_path / "s.json").write_text(json.dumps(entries))
    (tmp_path / "builder.py").write_text(_BUILDER)
    process = subprocess.Popen(
        [sys.executable, *(tmp_path / n for n in ("builder.py", "", "s.json", "out"))],
        env=subprocess_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert process.stdout and process.stdout.readline() == "up\n"
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGKILL) and "Traceback" not in errors, errors
    _, alive = psutil.wait_procs(children, 10)
    assert not alive

"""Records of two images: NLVR2's statements meet the features of both, and stay out as a pair."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.cli.main import main
from shards.convert.convert import convert, records
from shards.convert.inputs import FeatureInput, Inputs, SentenceInput
from shards.convert.pool import in_processes
from shards.dataset import open_dataset
from shards.errors import DataError
from shards.format.build import BuildSettings
from shards.format.check import check_record
from shards.format.record import Report
from shards.format.verify import verify
from shards.webdataset import as_webdataset
from tests.conftest import contents
from tests.shards.convert.inputs import OPTIONS, make_row, tsv_bytes

SETTINGS = BuildSettings("pairs", "test", vocab_size=200, images_per_shard=2)
HERE = in_processes(1)
NAMES = [f"dev-{i}-0-img{side}" for i in range(5) for side in (0, 1)]


def write(folder: Path, names: list[str] = NAMES, pairs: int = 5) -> Inputs:
    """Features of images in two files, an image of each pair in each, and two statements a pair."""
    folder.mkdir(parents=True, exist_ok=True)
    for side in (0, 1):
        rows = [make_row(n, n=1 + (i + side) % 3) for i, n in enumerate(names[side::2])]
        (folder / f"{side}.tsv").write_bytes(tsv_bytes(rows))
    lines = [
        {"identifier": f"dev-{i}-0-{j}", "sentence": f"one of {j} is red", "label": str(j == 0)}
        for j in (0, 1)
        for i in range(pairs)
    ]
    (folder / "dev.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Inputs(
        tuple(FeatureInput(str(folder / f"{side}.tsv")) for side in (0, 1)),
        (SentenceInput((folder / "dev.json",)),),
    )


def test_a_record_has_both_images_and_their_statements_once(tmp_path: Path) -> None:
    inputs = write(tmp_path / "in")
    found = list(records(inputs, options=OPTIONS))
    assert [r.image for r in found] == [f"dev-{i}-0" for i in range(5)]
    for i, r in enumerate(found):
        first, second = 1 + i % 3, 1 + (i + 1) % 3
        assert r.sides is not None and r.sides.tolist() == [0] * first + [1] * second
        assert [p.image for p in r.pictures] == [f"dev-{i}-0-img0", f"dev-{i}-0-img1"]
        assert r.labels and r.labels.object_id.tolist() == [*range(first), *range(second)]
        assert r.features.shape == (first + second, 6)
        assert [(s.id, s.answers) for s in r.sentences] == [
            (f"dev-{i}-0-0", {"True": 1.0}),
            (f"dev-{i}-0-1", {"False": 1.0}),
        ]


def test_a_data_set_of_pairs(tmp_path: Path) -> None:
    inputs = write(tmp_path / "in")
    made = convert(inputs, tmp_path / "one", SETTINGS, options=OPTIONS, workers=HERE)
    convert(inputs, tmp_path / "two", SETTINGS, options=OPTIONS, workers=in_processes(2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert made.schema.sides and made.schema.max_objects == 5
    assert verify(str(tmp_path / "one")) == []
    data = open_dataset(str(tmp_path / "one"), tmp_path / "cache")
    images = np.arange(5)
    features = np.zeros((5, 5, 6), np.float16)
    columns = data.gather_images(images, data.shard_of_image(images), features)
    due = list(records(inputs, options=OPTIONS))
    for i, r in enumerate(due):
        n = len(r.boxes)
        np.testing.assert_array_equal(columns["sides"][i, :n], r.sides)
        np.testing.assert_array_equal(columns["boxes"][i, :n], r.boxes)
        np.testing.assert_array_equal(features[i, :n], r.features)
    read = sorted(as_webdataset(str(tmp_path / "one")), key=lambda r: r["image"])
    assert [r["sides"].tolist() for r in read] == [r.sides.tolist() for r in due]
    half = str(tmp_path / "half")
    assert main(["shards", "subset", str(tmp_path / "one"), "--out", half, "--limit", "3"]) == 0
    assert verify(half) == []
    assert open_dataset(half, tmp_path / "cache").manifest.schema.sides


def test_pairs_that_lack_an_image(tmp_path: Path) -> None:
    inputs = write(tmp_path / "in", NAMES[:-1])
    with pytest.raises(DataError, match="image 'dev-4-0-img1' of two has no features"):
        list(records(inputs, options=OPTIONS))
    report = Report()
    left = list(records(inputs, options=OPTIONS, skip_bad=True, report=report))
    assert len(left) == 4
    assert report.counts == {
        "images with sentences but without features": 1,
    }


def test_images_that_stay_out_take_their_pair_along(tmp_path: Path) -> None:
    inputs = replace(
        write(tmp_path / "in"), exclude={"of the test set": frozenset({"dev-1-0-img1"})}
    )
    report = Report()
    assert [r.image for r in records(inputs, options=OPTIONS, report=report)] == [
        f"dev-{i}-0" for i in (0, 2, 3, 4)
    ]
    assert report.counts["images left out: of the test set"] == 1
    some = replace(write(tmp_path / "in"), only=frozenset({"dev-2-0"}))
    assert [r.image for r in records(some, options=OPTIONS)] == ["dev-2-0"]


def test_sentences_about_one_image_and_about_two(tmp_path: Path) -> None:
    inputs = write(tmp_path / "in")
    (tmp_path / "captions.jsonl").write_text('{"image": "dev-0-0-img0", "sentence": "a thing"}\n')
    both = replace(
        inputs, sentences=(*inputs.sentences, SentenceInput((tmp_path / "captions.jsonl",)))
    )
    with pytest.raises(DataError, match=r"about two images, those of 'dev-0-0-img0' about one"):
        list(records(both, options=OPTIONS))


def test_records_whose_sides_are_wrong(tmp_path: Path) -> None:
    (good, *_) = records(write(tmp_path / "in"), options=OPTIONS)
    schema = convert(write(tmp_path / "in"), tmp_path / "set", SETTINGS, options=OPTIONS).schema
    check_record(good, schema)
    for change, message in (
        ({"sides": np.asarray([1, 0, 0], np.uint8)}, "not those of the first picture and then"),
        ({"sides": np.asarray([0, 0, 0], np.uint8)}, "not those of the first picture and then"),
        ({"pictures": good.pictures[:1]}, "objects of two pictures, but names 1"),
        ({"sides": None}, "no sides, others have"),
    ):
        with pytest.raises(DataError, match=message):
            check_record(replace(good, **change), schema)


def test_what_is_trained_on_is_not_tested_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both images of a pair count, and a picture's ending does not."""
    convert(write(tmp_path / "in"), tmp_path / "pairs", SETTINGS, options=OPTIONS, workers=HERE)
    rows = [make_row(name) for name in ("a/x.png", "dev-3-0-img1.jpg", "other")]
    (tmp_path / "f.tsv").write_bytes(tsv_bytes(rows))
    lines = [json.dumps({"image": r[0], "sentence": "a thing"}) + "\n" for r in rows]
    (tmp_path / "s.jsonl").write_text("".join(lines))
    single = Inputs((FeatureInput(str(tmp_path / "f.tsv")),),
                    (SentenceInput((tmp_path / "s.jsonl",)),))  # fmt: skip
    convert(single, tmp_path / "set", SETTINGS, options=OPTIONS, workers=HERE)
    one, two = str(tmp_path / "set"), str(tmp_path / "pairs")
    assert main(["shards", "overlap", one, two, "--quiet"]) == 1
    assert capsys.readouterr().out == f"{two}: 1 images are in {one}, too: dev-3-0-img1\n"
    assert main(["shards", "overlap", one, two, two, "--json", "--quiet"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [o["images"] for o in found] == [["dev-3-0-img1"]] * 2
    half = str(tmp_path / "half")
    assert main(["shards", "subset", two, "--out", half, "--limit", "2", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["shards", "overlap", one, half, "--quiet"]) == 0
    assert "no image is in any of the others" in capsys.readouterr().out

"""Boxes that a user has: COCO's, those of one's own pictures in its form, and other features'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards.convert.convert import records
from shards.convert.inputs import FeatureInput, Inputs, SentenceInput
from shards.sources.features import tsv as of_tsv
from shards.sources.regions import Options
from tests.shards.extract.runs import failures, regions, run


def test_human_boxes_and_captions(shared_data: Path, tmp_path: Path) -> None:
    """COCO's own: boxes, classes and captions of photographs become a data set's records."""
    coco = shared_data / "tiny_coco"
    boxes = coco / "annotations/instances_val2017.json"
    status = run(coco / "val2017", "--boxes", boxes, "--feature-dim", 512, "--out", tmp_path / "f")
    document = json.loads(boxes.read_text())
    numbers = {
        c["id"]: i for i, c in enumerate(sorted(document["categories"], key=lambda c: c["id"]))
    }
    due: dict[int, list[Any]] = {}
    for a in document["annotations"]:
        if not a["iscrowd"]:
            due.setdefault(a["image_id"], []).append((a["bbox"], numbers[a["category_id"]]))
    assert status == 1, "photographs without boxes are failures"
    failed = failures(tmp_path / "f")
    assert len(failed) == 50 - len(due) and all("no box of it" in r for r in failed.values())
    sentences = SentenceInput((coco / "annotations/captions_val2017.json",))
    inputs = Inputs((FeatureInput(str(tmp_path / "f")),), (sentences,))
    found = list(records(inputs, options=Options(feature_dim=512), skip_bad=True))
    assert len(found) == len(due) and all(len(r.sentences) == 5 for r in found)
    for record in found:
        wanted = due[int(record.image.removesuffix(".jpg"))]
        size = np.asarray([record.width, record.height] * 2)
        assert record.labels is not None
        assert record.labels.object_id.tolist() == [label for _, label in wanted]
        for box, ((x, y, w, h), _) in zip(record.boxes, wanted, strict=True):
            np.testing.assert_allclose(box * size, [x, y, x + w, y + h], atol=0.1)


def test_the_boxes_of_other_features(
    shared_data: Path, tmp_path: Path, detector: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of bottom-up-attention's rows, on the photographs that they describe."""
    tsv = shared_data / "butd_train2014_obj36_10rows.tsv"
    arguments = (shared_data / "photos", "--boxes", tsv, "--out", tmp_path / "f")
    assert run(*arguments, "--detector", detector) == 0
    found = {r.image.removesuffix(".jpg"): r for r in regions(tmp_path / "f", 64).values()}
    with of_tsv.FORMAT.reader(str(tsv), Options()) as read:
        for entry in of_tsv.FORMAT.entries(str(tsv), Options()):
            given_row, row = read(entry), found[entry.image]
            np.testing.assert_array_equal(row.boxes, given_row.boxes)
            assert row.labels is not None and given_row.labels is not None
            np.testing.assert_array_equal(row.labels.object_id, given_row.labels.object_id)
            np.testing.assert_array_equal(
                row.labels.attribute_conf, given_row.labels.attribute_conf
            )
            assert row.features.shape == (36, 64)
    assert run(*arguments) == 2, "regions of the pixels are no substitutes for a network's"
    assert "the regions there were made otherwise" in capsys.readouterr().err


def coco_file(path: Path, names: list[str], **others: object) -> Path:
    """A box for each name, of pictures of 20 × 10."""
    images = [{"id": 7 * i, "file_name": n, "width": 20, "height": 10} for i, n in enumerate(names)]
    found = [
        {"image_id": image["id"], "bbox": [i, 2, 3, 4], "category_id": 40 - i, "iscrowd": 0}
        for i, image in enumerate(images)
    ]
    document = {
        "images": images,
        "annotations": found,
        "categories": [{"id": 40 - i} for i in range(9)],
    }
    path.write_text(json.dumps(document | others))
    return path


def test_pictures_of_ones_own_by_their_names(tmp_path: Path) -> None:
    """Folders may begin above or below those in the file; another picture of the name is none."""
    places = ["hall.png", "up/one/2.png", "up/3.png", "a/4.png", "deep/down/5.png", "x/6.png"]
    for place in places:
        (tmp_path / "pictures" / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20 if "6" in place else 10)).save(tmp_path / "pictures" / place)
    names = ["hall.png", "one/2.png", "set/up/3.png", "b/4.png", "5.png", "x/6.png"]
    boxes = coco_file(tmp_path / "own.json", names)
    arguments = (tmp_path / "pictures", "--boxes", boxes, "--feature-dim", 512)
    assert run(*arguments, "--out", tmp_path / "f") == 1
    failed = failures(tmp_path / "f")
    assert failed.pop("x/6.png") == "it has 20 × 20 pixels, and own.json has boxes in 20 × 10"
    assert failed == {"a/4.png": "own.json has no box of it"}
    found = regions(tmp_path / "f", 512)
    for i, place in enumerate(places):
        if place in found:
            (box,), labels = found[place].boxes, found[place].labels
            np.testing.assert_allclose(box * [20, 10, 20, 10], [i, 2, i + 3, 6], rtol=1e-5)
            assert labels is not None and labels.object_id.tolist() == [8 - i]
    assert len(found) == 4


def test_files_that_are_not_cocos(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"bbox": [1, 2, 3, 4], "category_id": 40, "image_id": 0}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"categories": [{"name": "cat"}]}, "entry 0 has no id that is an integer"),
        ({"categories": [3]}, "entry 0 of 'categories' is no object"),
        ({"images": [{"id": 1}]}, "image 0 has no file_name"),
        ({"images": 3}, "has no list 'images'"),
        ({"annotations": [bad | {"bbox": [1, 2, 3]}]}, "annotation 0 has no bbox"),
        ({"annotations": [bad | {"bbox": ["1", None, 3, 4]}]}, "annotation 0 has no bbox"),
        ({"annotations": [bad, bad | {"category_id": [4]}]}, "annotation 1 has no bbox"),
        ({"annotations": [bad | {"category_id": 99}]}, "category_id of a category"),
        ({"annotations": [bad | {"image_id": 1e400}]}, "entry 0 has no image_id"),
    ]
    for others, problem in cases:
        path = coco_file(tmp_path / "bad.json", ["0.png"], **others)
        assert run(pictures, "--boxes", path, "--out", tmp_path / "f") == 2, others
        assert problem in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:-20])
    assert run(pictures, "--boxes", path, "--out", tmp_path / "f") == 2
    assert "is not JSON" in capsys.readouterr().err
    assert not (tmp_path / "f").exists()

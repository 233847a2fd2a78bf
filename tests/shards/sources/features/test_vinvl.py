"""VinVL's TSVs: rows as scene_graph_benchmark's and Oscar's tools write them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.errors import DataError
from shards.sources.features.tsv import FORMAT as TSV
from shards.sources.features.vinvl import FORMAT
from tests.shards.sources.features.stores import (
    Picture,
    check,
    damage,
    outside,
    picture,
    read,
    real_pictures,
    sized,
    with_nan,
)


def write(path: Path, rows: Iterable[tuple[str, ...]], index: bool = True) -> Path:
    """What tsv_writer does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    at, places = 0, []
    with open(path, "w", newline="") as f:
        for row in rows:
            line = "\t".join(row) + "\n"
            f.write(line)
            places.append(at)
            at += len(line.encode())
    if index:
        path.with_suffix(".lineidx").write_text("".join(f"{p}\n" for p in places))
    return path


def b64(array: Any) -> str:
    return base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()


def wide(p: Picture) -> str:
    """Features and six columns of the box."""
    f = p.boxes / np.asarray([p.width, p.height] * 2, np.float32)
    return b64(np.hstack([p.features, f, f[:, 2:] - f[:, :2]]))


def named(p: Picture, **more: Any) -> dict[str, Any]:
    """A prediction; classes and attributes are called c1… and a1…."""
    return {
        "image_h": p.height,
        "image_w": p.width,
        "num_boxes": p.n,
        "objects": [
            {
                "rect": p.boxes[i].tolist(),
                "class": f"c{p.object_id[i] + 1}",
                "conf": float(p.object_conf[i]),
                "attributes": ["a400", f"a{p.attribute_id[i] + 1}"],
                "attr_scores": [0.01, float(p.attribute_conf[i])],
            }
            for i in range(p.n)
        ],
        **more,
    }


def pair(folder: Path, pictures: list[Picture], index: bool = True) -> Path:
    """Features and predictions as they are published."""
    write(folder / "features.tsv", [(p.id, str(p.n), wide(p)) for p in pictures], index)
    write(folder / "predictions.tsv", [(p.id, json.dumps(named(p))) for p in pictures], index)
    return folder


def label_map(folder: Path) -> str:
    path = folder / "dicts.json"
    path.write_text(
        json.dumps(
            {
                "label_to_idx": {f"c{i}": i for i in range(1, 1601)},
                "attribute_to_idx": {f"a{i}": i for i in range(1, 401)},
                "predicate_to_idx": {},
            }
        )
    )
    return str(path)


@pytest.mark.parametrize("index", [True, False])
def test_real_rows_as_vinvl_keeps_them(shared_data: Path, tmp_path: Path, index: bool) -> None:
    real = real_pictures(shared_data)
    place = pair(tmp_path / "vinvl", real, index)
    assert FORMAT.detect(str(place)) and FORMAT.detect(str(place / "features.tsv"))
    found = read(FORMAT, place, 2048, labelmap=label_map(tmp_path))
    assert list(found) == [p.id for p in real]
    for p in real:
        check(found[p.id], p)
        assert sized(found[p.id], p)
    # Not our other TSVs, and the other way round.
    tsv = shared_data / "butd_train2014_obj36_10rows.tsv"
    assert not TSV.detect(str(place / "features.tsv")) and not FORMAT.detect(str(tsv))


def test_oscars_tasks(tmp_path: Path) -> None:
    """JSON in the second column, lists of labels, and sizes in a .hw.tsv, in two sets."""
    for name in ("train", "val"):
        pictures = [replace(picture(f"{name}-{i}", n=1 + i), width=200 + i) for i in range(3)]
        texts: dict[str, Callable[[Picture], Any]] = {
            "feature": lambda p: {"num_boxes": p.n, "features": wide(p)},
            "label": lambda p: named(p)["objects"],
            "hw": lambda p: [{"height": p.height, "width": p.width}],
        }
        for end, text in texts.items():
            rows = [(p.id, json.dumps(text(p))) for p in pictures]
            write(tmp_path / f"{name}.{end}.tsv", rows)
    found = read(FORMAT, tmp_path)
    assert list(found) == [f"{name}-{i}" for name in ("train", "val") for i in range(3)]
    due = replace(picture("val-2", n=3), width=202)
    check(found["val-2"], due, objects=False)
    assert sized(found["val-2"], due)
    # Without sizes: of boxes in pixels and in fractions.
    for name in ("train", "val"):
        (tmp_path / f"{name}.hw.tsv").unlink()
    again = read(FORMAT, tmp_path)
    assert sized(again["val-2"], due)
    check(again["val-2"], due, objects=False)
    # Without labels: of the last six columns alone, with a size that is given.
    for name in ("train", "val"):
        (tmp_path / f"{name}.label.tsv").unlink()
    with pytest.raises(ValueError, match=r"how large images are: give --feature-option sizes=FILE"):
        read(FORMAT, tmp_path)
    check(read(FORMAT, tmp_path, size="202x100")["val-2"], due, objects=False)


def test_a_file_of_predictions_with_features(tmp_path: Path) -> None:
    """As scene_graph_benchmark writes it: without sizes of images."""
    p = picture("17", n=4)
    objects = named(p)["objects"]
    for one, feature in zip(objects, p.features, strict=True):
        one["feature"] = b64(feature)
    text = json.dumps({"objects": objects, "relations": None})
    write(tmp_path / "predictions.tsv", [("17", text), ("18", text)])
    (tmp_path / "sizes.json").write_text(json.dumps({"17": [200, 100], "18": [200, 100]}))
    assert FORMAT.detect(str(tmp_path))
    found = read(FORMAT, tmp_path, sizes=str(tmp_path / "sizes.json"), labelmap=label_map(tmp_path))
    check(found["17"], p)
    with pytest.raises(ValueError, match="how large images are"):
        read(FORMAT, tmp_path)


def test_labels(tmp_path: Path) -> None:
    p = picture("a")
    given = named(p)
    del given["objects"][0]["attributes"], given["objects"][1]["attr_scores"]
    write(tmp_path / "features.tsv", [("a", "3", wide(p))])

    def labels(**settings: str) -> Any:
        write(tmp_path / "predictions.tsv", [("a", json.dumps(given))])
        return read(FORMAT, tmp_path, **settings)["a"].labels

    assert labels() is None
    found = labels(labelmap=label_map(tmp_path))
    np.testing.assert_array_equal(found.attribute_conf[:2], [0, 0])
    assert found.attribute_id[2] == p.attribute_id[2] and not found.attribute_id[:2].any()
    assert not labels(labelmap=label_map(tmp_path), attributes="no").attribute_conf.any()
    given["objects"][0]["class"] = "ghost"
    with pytest.raises(ValueError, match="'ghost' is not in the label map"):
        labels(labelmap=label_map(tmp_path))
    (tmp_path / "dicts.json").write_text("{}")
    with pytest.raises(DataError, match=r"dicts.json has no label_to_idx"):
        labels(labelmap=str(tmp_path / "dicts.json"))


def test_files_of_two_sets_are_refused(tmp_path: Path) -> None:
    place = pair(tmp_path, [picture("a"), picture("b")])
    other = pair(tmp_path / "other", [picture("a"), picture("c")])
    with pytest.raises(DataError, match=r"has image 'c' where line 2 of .* has image 'b'"):
        read(FORMAT, place / "features.tsv", predictions=str(other / "predictions.tsv"))
    short = pair(tmp_path / "short", [picture("a")])
    with pytest.raises(DataError, match=r"has no row where line 2 of .* has image 'b'"):
        read(FORMAT, place / "features.tsv", predictions=str(short / "predictions.tsv"))
    index = place / "features.lineidx"
    for wrong in ("0\n5\n", "0\nx\n", "0\n0\n", "0\n", "", "0\n" + "9" * 30 + "\n"):
        index.write_text(wrong)
        with pytest.raises(DataError, match=r"features.lineidx does not belong to .*features.tsv"):
            read(FORMAT, place)
    index.write_text("0\n99999999\n")
    with pytest.raises(DataError, match=r"features.tsv is cut off before byte 99,999,999"):
        read(FORMAT, place)


A, B = picture("a"), picture("b")
WIDE = ("3", wide(B))
BAD: list[tuple[tuple[str, ...], dict[str, Any] | None, str]] = [
    (("4", WIDE[1]), None, "no 4 rows|9 columns"),
    (("0", WIDE[1]), None, "'0' is no positive integer"),
    (("3", WIDE[1][:-9]), None, "damaged base64|no 3 rows"),
    (("3", b64(B.features[:, :5])), None, "5 columns, where 6 or, with boxes, 12"),
    ((*WIDE, "x"), None, "4 columns, where 2 or 3"),
    ((), None, "one column"),
    (("[1]",), None, "no base64, or JSON"),
    (('{"num_boxes": 3',), None, "cut off, or no JSON"),
    (("[" * 50_000,), None, "cut off, or no JSON"),
    (("3", wide(with_nan(B))), {"objects": []}, "box 0 is .*nan"),
    (WIDE, named(outside(B)), "box 0 .* outside"),
    (WIDE, named(picture("b", n=2)), "2 of them, where features has 3"),
    (WIDE, {"objects": [{}] * 3}, "not numbers"),
    (WIDE, {"objects": "x"}, "no list of objects"),
    (("3", b64(B.features)), {"objects": []}, "no boxes: neither predictions"),
    (WIDE, named(B, image_w="wide"), "no positive integer"),
]


@pytest.mark.parametrize(("row", "prediction", "message"), BAD)
def test_bad_rows(
    tmp_path: Path, row: tuple[str, ...], prediction: dict[str, Any] | None, message: str
) -> None:
    write(tmp_path / "features.tsv", [("a", "3", wide(A)), ("b", *row)])
    text = json.dumps(named(B) if prediction is None else prediction)
    write(tmp_path / "predictions.tsv", [("a", json.dumps(named(A))), ("b", text)])
    with pytest.raises(ValueError, match=message) as caught:
        read(FORMAT, tmp_path, size="200x100")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("index", [True, False])
def test_damaged_files(tmp_path: Path, index: bool) -> None:
    place = pair(tmp_path, [picture(f"{i}", n=1 + i % 5) for i in range(8)], index)
    files = [f for f in sorted(place.iterdir()) if f.suffix == ".tsv" or index]
    assert all(damage(FORMAT, place, f, 30) >= 10 for f in files)


def test_places_that_are_not_vinvls(tmp_path: Path) -> None:
    write(tmp_path / "train.label.tsv", [("a", json.dumps(named(picture("a"))["objects"]))])
    assert not FORMAT.detect(str(tmp_path)) and not FORMAT.detect(str(tmp_path / "no.tsv"))
    with pytest.raises(DataError, match=r"has no features.tsv or \*.feature.tsv"):
        FORMAT.files(str(tmp_path))
    with pytest.raises(DataError, match=r"cannot read .*no.tsv: No such file"):
        read(FORMAT, tmp_path / "no.tsv")

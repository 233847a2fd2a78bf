"""Sizes of images from the files that users have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shards.errors import DataError
from shards.sources.image_sizes import given_sizes

COCO = {
    "info": {"description": "COCO 2014"},
    "images": [
        {"id": 318556, "file_name": "COCO_train2014_000000318556.jpg", "width": 640, "height": 480}
    ],
    "annotations": [{"id": 1, "image_id": 318556, "caption": "x"}],
}
VG = [{"image_id": 7, "width": 800, "height": 600, "coco_id": None, "url": "x"}]
GQA = {"7": {"width": 800, "height": 600, "objectsNum": 3, "idx": 0, "file": 0}}
CSV = "id,width,height\nimg.jpg,640,480\n\n7,800,600\n"
HW = 'img\t[{"height": 480, "width": 640}]\n7\t[{"height": 600, "width": 800}]\n'


@pytest.mark.parametrize(
    ("content", "image", "due"),
    [
        (COCO, "COCO_train2014_000000318556", (640, 480)),
        (COCO, "000000318556.jpg", (640, 480)),
        (COCO, "318556", (640, 480)),
        (COCO, "vg/318556", None),
        (VG, "vg/7", (800, 600)),
        (VG, "7", (800, 600)),
        (GQA, "7", (800, 600)),
        ({"a/b": [3, 4]}, "a/b", (3, 4)),
        ({"a": [3, 4]}, "b", None),
        (CSV, "img", (640, 480)),
        (CSV, "vg/7", (800, 600)),
        (CSV.replace("id,width,height\n", ""), "img", (640, 480)),
        (HW, "img", (640, 480)),
        (HW, "7", (800, 600)),
    ],
)
def test_forms(tmp_path: Path, content: Any, image: str, due: tuple[int, int] | None) -> None:
    path = tmp_path / "sizes"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert given_sizes({"sizes": str(path)}).of(image) == due
    assert given_sizes({"sizes": str(path), "size": "9x8"}).of(image) == (due or (9, 8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": [3]}, "entry a: no id with a width and a height"),
        ({"a": [0, 4]}, "entry a: no id"),
        ({"a": [True, 4]}, "entry a: no id"),
        ({"a": [3.5, 4]}, "entry a: no id"),
        ({"a": [1 << 40, 4]}, "entry a: no id"),
        ([{"width": 3, "height": 4}], "entry 0: no id"),
        ([3], "entry 0: no id"),
        ("a,3,4\nb,3\n", "line 2: no id"),
        ("a,3,4\nb,²,4\n", "line 2: no id"),
        ("a\t[[[\n", "line 1: no id"),
        ("{}", "has no size in it"),
        ("", "has no size in it"),
        ("id,width,height\n", "has no size in it"),
        ('{"a": [3, 4]', "is not JSON"),
    ],
)
def test_bad_files(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "sizes"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        given_sizes({"sizes": str(path)})
    assert str(path) in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the file of image sizes .*no: No such file"):
        given_sizes({"sizes": str(tmp_path / "no")})
    (tmp_path / "x").write_bytes(b"a,3,4\n\xff,3,4\n")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        given_sizes({"sizes": str(tmp_path / "x")})

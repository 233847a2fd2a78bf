"""GQA's object features, written with h5py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from shards.errors import DataError
from shards.sources.features.gqa_hdf5 import FORMAT
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

MOST = 100


def write(folder: Path, files: list[list[Picture]], **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    info = {}
    for number, pictures in enumerate(files):
        shape = (len(pictures), MOST)
        features = np.zeros((*shape, pictures[0].features.shape[1]), np.float32)
        boxes = np.zeros((*shape, 4), np.float32)
        for i, p in enumerate(pictures):
            features[i, : p.n], boxes[i, : p.n] = p.features, p.boxes
            info[p.id] = {"width": p.width, "objectsNum": p.n, "idx": i, "height": p.height,
                          "file": number}  # fmt: skip
        with h5py.File(folder / f"gqa_objects_{number}.h5", "w") as f:
            f.create_dataset("features", data=features, **options)
            f.create_dataset("bboxes", data=boxes, **options)
    # The published file is in no order.
    text = json.dumps(dict(sorted(info.items(), reverse=True)))
    (folder / "gqa_objects_info.json").write_text(text)
    return folder


def test_real_rows_as_gqa_keeps_them(shared_data: Path, tmp_path: Path) -> None:
    real = real_pictures(shared_data)
    place = write(tmp_path / "objects", [real[:4], real[4:]])
    assert FORMAT.detect(str(place)) and FORMAT.detect(str(place / "gqa_objects_info.json"))
    found = read(FORMAT, place, 2048)
    assert list(found) == [p.id for p in real]  # by file and row
    for p in real:
        check(found[p.id], p, objects=False)
        assert sized(found[p.id], p)


def test_chunked_and_backwards(tmp_path: Path) -> None:
    files = [[picture(f"n{i}{j}", n=1 + j) for j in range(3)] for i in range(3)]
    place = write(tmp_path, files, chunks=True, compression="gzip")
    found = read(FORMAT, place, backwards=True)
    assert list(found) == [p.id for file in reversed(files) for p in reversed(file)]
    for file in files:
        for p in file:
            check(found[p.id], p, objects=False)


Change = Callable[[Path], None]


def info(**change: Any) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "gqa_objects_info.json"
        document = json.loads(path.read_text())
        document["a"] |= change
        path.write_text(json.dumps(document))

    return apply


def array(name: str, data: Any) -> Change:
    def apply(folder: Path) -> None:
        with h5py.File(folder / "gqa_objects_0.h5", "a") as f:
            del f[name]
            if data is not None:
                f[name] = data

    return apply


def elsewhere(name: str) -> Change:
    """Arrays that are in another file: it may be any file of the machine."""

    def apply(folder: Path) -> None:
        array("features", None)(folder)
        (folder / "secret.bin").write_bytes(bytes(100 * 6 * 4))
        with h5py.File(folder / "other.h5", "w") as f:
            f["features"] = np.zeros((1, MOST, 6), np.float32)
        with h5py.File(folder / "gqa_objects_0.h5", "a") as f:
            shape = (1, MOST, 6)
            if name == "link":
                f["features"] = h5py.ExternalLink(str(folder / "other.h5"), "features")
            elif name == "virtual":
                layout = h5py.VirtualLayout(shape, np.float32)
                layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "features", shape)
                f.create_virtual_dataset("features", layout)
            else:
                raw = [(str(folder / "secret.bin"), 0, h5py.h5f.UNLIMITED)]
                f.create_dataset("features", shape, np.float32, external=raw)

    return apply


def cut(folder: Path) -> None:
    path = folder / "gqa_objects_0.h5"
    path.write_bytes(path.read_bytes()[:3000])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (info(objectsNum=101), r"101 objects of row 0 are not in an array of shape \(1, 100"),
        (info(idx=1), "3 objects of row 1 are not in"),
        (info(objectsNum=0), "no objects, width or height"),
        (info(width="640"), "image a: it has no width, height, objectsNum, idx, file as numbers"),
        (info(idx=-1), "as numbers"),
        (info(file=9), r"cannot read .*gqa_objects_9.h5: No such file"),
        (array("features", None), "no such array"),
        (array("features", np.zeros((1, 100, 5), "f4")), r"where \(images, .*, 6\) .*see --featur"),
        (array("bboxes", np.zeros((1, 100), "f4")), "where .images, objects, 4. is due"),
        (array("features", np.zeros((1, 100, 6), "i4")), "of int32 where"),
        (array("features", "text"), "it is no array|shape"),
        (elsewhere("link"), "no such array"),
        (elsewhere("virtual"), "no array of this file"),
        (elsewhere("external"), "no array of this file"),
        (cut, "cannot"),
    ],
)
def test_bad_files(tmp_path: Path, change: Change, message: str) -> None:
    write(tmp_path, [[picture("a")]])
    change(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        read(FORMAT, tmp_path)
    assert len(str(caught.value)) < 400


def test_bad_boxes(tmp_path: Path) -> None:
    for bad, message in ((with_nan(picture("a")), "nan"), (outside(picture("a")), "outside of")):
        with pytest.raises(ValueError, match=f"box 0 is .*{message}"):
            read(FORMAT, write(tmp_path, [[bad]]))


def test_damaged_files(tmp_path: Path) -> None:
    place = write(tmp_path, [[picture("a"), picture("b")]], chunks=(1, 10, 2), compression="gzip")
    assert damage(FORMAT, place, place / "gqa_objects_0.h5", 60) >= 10
    assert damage(FORMAT, place, place / "gqa_objects_info.json") >= 10


def test_no_such_places(tmp_path: Path) -> None:
    assert not FORMAT.detect(str(tmp_path))
    with pytest.raises(DataError, match=r"has no gqa_objects_info.json"):
        FORMAT.files(str(tmp_path))


def test_a_library_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, [[picture("a")]])
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match=r"needs the package h5py .*'lxscale\[formats\]'"):
        read(FORMAT, tmp_path)

"""Folders of .npz and .npy, saved with numpy as extractors do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.errors import DataError
from shards.sources import npy as npy_files
from shards.sources.features.arrays import FORMAT
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


def butd(folder: Path, p: Picture, **more: Any) -> None:
    """As bottom-up-attention.pytorch saves it; info is a pickle in there."""
    parts = {
        "x": p.features,
        "bbox": p.boxes,
        "num_bbox": p.n,
        "image_h": p.height,
        "image_w": p.width,
        "info": {"objects_id": p.object_id, "path": Path("x")},
    } | more
    given = {k: v for k, v in parts.items() if v is not None}
    np.savez_compressed(folder / p.id, **given)


def mmf(folder: Path, p: Picture) -> None:
    """As MMF's extract_features_vmb.py saves it."""
    info = {
        "bbox": p.boxes,
        "num_boxes": p.n,
        "objects": p.object_id,
        "cls_prob": p.probabilities()[:, 1:],
        "image_width": p.width,
        "image_height": p.height,
    }
    np.save(folder / f"{p.id}.npy", p.features)
    np.save(folder / f"{p.id}_info.npy", info, allow_pickle=True)


def vilbert(folder: Path, p: Picture) -> None:
    """As vilbert-multi-task's extract_features.py saves it: the background is a class."""
    info = {
        "bbox": p.boxes,
        "num_boxes": p.n,
        "objects": p.object_id[:-1],
        "image_width": p.width,
        "image_height": p.height,
        "cls_prob": p.probabilities(),
        "image_id": p.id,
        "features": p.features,
    }
    np.save(folder / f"{p.id}.npy", info, allow_pickle=True)


Write = Callable[[Path, Picture], None]


@pytest.mark.parametrize(("write", "labels"), [(butd, False), (mmf, True), (vilbert, True)])
def test_real_rows_as_others_keep_them(
    shared_data: Path, tmp_path: Path, write: Write, labels: bool
) -> None:
    real = real_pictures(shared_data)
    for p in real:
        write(tmp_path, p)
    assert FORMAT.detect(str(tmp_path))
    found = read(FORMAT, tmp_path, 2048)
    assert list(found) == sorted(p.id for p in real)
    for p in real:
        check(found[p.id], p, objects=labels, attributes=False)
        assert sized(found[p.id], p)
    assert all(r.labels is None for r in read(FORMAT, tmp_path, 2048, labels="no").values())


def test_ten_to_a_hundred_boxes_in_folders(tmp_path: Path) -> None:
    for folder in ("train", "val/part 1"):
        (tmp_path / folder).mkdir(parents=True)
        for n in (10, 36, 100):
            butd(tmp_path / folder, picture(f"{n}", n=n))
    (tmp_path / "train" / "notes.txt").write_text("x")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "train")
    os.mkfifo(tmp_path / "train" / "pipe.npz")
    found = read(FORMAT, tmp_path)
    assert list(found) == [f"{f}/{n}" for f in ("train", "val/part 1") for n in (10, 100, 36)]
    check(found["val/part 1/36"], picture("36", n=36), objects=False)


def test_boxes_and_sizes_from_elsewhere(tmp_path: Path) -> None:
    features, boxes = tmp_path / "features", tmp_path / "boxes"
    features.mkdir()
    boxes.mkdir()
    for name in ("a", "b"):
        np.save(features / f"{name}.npy", picture(name).features)
        np.save(boxes / f"{name}.npy", picture(name).fractions)
    with pytest.raises(ValueError, match="how large images are"):
        read(FORMAT, features)
    sizes = {"a": [200, 100], "b": {"width": 200, "height": 100}}
    (tmp_path / "s.json").write_text(json.dumps(sizes))
    found = read(FORMAT, features, boxes=str(boxes), boxes_in="fractions",
                 sizes=str(tmp_path / "s.json"))  # fmt: skip
    for name in ("a", "b"):
        check(found[name], picture(name), objects=False)
    with pytest.raises(ValueError, match="fractions, not pixels"):
        read(FORMAT, features, boxes=str(boxes), size="200x100")
    (boxes / "b.npy").unlink()
    with pytest.raises(ValueError, match=r"b.npy cannot be read: No such file"):
        read(FORMAT, features, boxes=str(boxes), boxes_in="fractions", size="200x100")
    with pytest.raises(DataError, match=r"boxes=.*/no: there is no such folder"):
        read(FORMAT, features, boxes=str(tmp_path / "no"))
    with pytest.raises(DataError, match="boxes-in=mm: give pixels or fractions"):
        read(FORMAT, features, boxes_in="mm")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def npy(data: Any) -> Write:
    def write(folder: Path, p: Picture) -> None:
        np.save(folder / "a.npy", data, allow_pickle=True)

    return write


def npz(**more: Any) -> Write:
    return lambda folder, p: butd(folder, p, **more)


def raw(name: str, data: bytes) -> Write:
    return lambda folder, p: (folder / name).write_bytes(data) and None


def evil_info(folder: Path, p: Picture) -> None:
    mmf(folder, p)
    np.save(folder / "a_info.npy", np.asarray(Evil(), object), allow_pickle=True)


HUGE = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1 << 40,), }"
HEAD = "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 4), }"
DECLARED = b"\x93NUMPY\x01\x00" + len(HEAD).to_bytes(2, "little") + HEAD.encode() + b"1234"

BAD: list[tuple[Write, str]] = [
    (npz(num_bbox=4), "4 objects, where x has 3"),
    (npz(bbox=np.ones((2, 4))), "3 objects, where bbox has 2"),
    (npz(x=np.ones((3, 5), "f4")), "see --feature-dim"),
    (npz(x=np.asarray([{}] * 3, object)), "no features or x"),
    (npz(x=np.asarray(["a"] * 3)), "not numbers"),
    (npz(image_h=None), "how large images are"),
    (npz(image_h=0), "0 is no positive integer"),
    (npz(bbox=None), "no boxes or bbox"),
    (npz(bbox=np.full((3, 4), np.nan)), "box 0 is .*nan"),
    (npz(bbox=np.ones((0, 4)), x=np.ones((0, 6))), "no objects"),
    (lambda f, p: butd(f, with_nan(p)), "box 0"),
    (lambda f, p: butd(f, outside(p)), "outside of the 200 × 100"),
    (npy(np.asarray(Evil(), object)), "a.npy: the pickle names 'posix.system'"),
    (evil_info, "a_info.npy: the pickle names 'posix.system'"),
    (npy(np.asarray([{}, {}], object)), "array of objects"),
    (npy(np.asarray([1, 2], object)), "array of objects|no object"),
    (raw("a.npy", HUGE), "damaged, or no .npy"),
    (raw("a.npy", DECLARED), r"shape \(1099511627776, 4\) has 4 bytes instead of 17,592,186,044"),
    (raw("a.npy", b""), "damaged, or no .npy"),
    (raw("a.npz", b"PK\x03\x04"), "damaged, or no .npz"),
]


@pytest.mark.parametrize(("write", "message"), BAD)
def test_bad_files(
    tmp_path: Path, write: Write, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, picture("a"))
    with pytest.raises(ValueError, match=message) as caught:
        read(FORMAT, tmp_path)
    assert len(str(caught.value)) < 400 and not (tmp_path / "ran").exists()


def test_a_file_that_unpacks_to_far_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npy_files, "_LARGEST", 1 << 20)
    butd(tmp_path, picture("a"), x=np.zeros((1 << 16, 6), np.float32))
    assert (tmp_path / "a.npz").stat().st_size < 10_000
    with pytest.raises(ValueError, match="unpacks to more than 1,048,576 bytes"):
        read(FORMAT, tmp_path)


def test_damaged_files(tmp_path: Path) -> None:
    for i, write in enumerate((butd, mmf, vilbert)):
        folder = tmp_path / str(i)
        folder.mkdir()
        write(folder, picture("a"))
        for file in sorted(folder.iterdir()):
            assert damage(FORMAT, folder, file, 30, size="200x100") >= 5

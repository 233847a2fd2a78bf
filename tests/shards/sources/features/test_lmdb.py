"""LMDBs of VOLTA, ViLBERT, MMF and UNITER, written with the libraries that those use."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lmdb
import msgpack
import msgpack_numpy
import numpy as np
import pytest

from shards.errors import DataError
from shards.sources import lmdb_file
from shards.sources.features.uniter_lmdb import FORMAT as UNITER
from shards.sources.features.volta_lmdb import FORMAT as VOLTA
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


def put(folder: Path, entries: Mapping[bytes, bytes], **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (
        lmdb.open(str(folder), map_size=1 << 28, **options) as env,
        env.begin(write=True) as transaction,
    ):
        for key, value in entries.items():
            transaction.put(key, value)
    return folder


# --- VOLTA --------------------------------------------------------------------------------------


def volta(p: Picture) -> dict[str, str]:
    """A row as csv.DictReader gives it."""

    def text(array: Any, dtype: str) -> str:
        return base64.b64encode(np.ascontiguousarray(array, dtype)).decode()

    return {
        "img_id": p.id,
        "img_h": str(p.height),
        "img_w": str(p.width),
        "objects_id": text(p.object_id, "<i8"),
        "objects_conf": text(p.object_conf, "<f4"),
        "attrs_id": text(p.attribute_id, "<i8"),
        "attrs_conf": text(p.attribute_conf, "<f4"),
        "num_boxes": str(p.n),
        "boxes": text(p.boxes, "<f4"),
        "features": text(p.features, "<f4"),
        "cls_prob": text(np.zeros((p.n, 1601)), "<f4"),
    }


def vilbert(p: Picture) -> dict[str, Any]:
    """As script/convert_to_lmdb.py of vilbert-multi-task has it."""
    return {
        "image_id": p.id,
        "image_h": p.height,
        "image_w": p.width,
        "num_boxes": p.n,
        "boxes": p.boxes,
        "features": p.features,
    }


def mmf(p: Picture) -> dict[str, Any]:
    """As MMF's lmdb_conversion.py; rows beyond num_boxes are of no object."""
    pad = ((0, 2), (0, 0))
    return {
        "feature_path": p.id,
        "features": np.pad(p.features, pad),
        "image_height": p.height,
        "image_width": p.width,
        "num_boxes": np.int64(p.n),
        "objects": p.object_id,
        "cls_prob": np.pad(p.probabilities()[:, 1:], pad),
        "bbox": np.pad(p.boxes, pad),
    }


def write_volta(
    folder: Path, items: Mapping[str, Any], protocol: int | None = None, **options: Any
) -> Path:
    entries = {key.encode(): pickle.dumps(item, protocol) for key, item in items.items()}
    keys = [key.encode() for key in items]
    return put(folder, {**entries, b"keys": pickle.dumps(keys, protocol)}, **options)


def test_real_rows_as_volta_and_vilbert_keep_them(shared_data: Path, tmp_path: Path) -> None:
    real = real_pictures(shared_data)
    short = {str(int(p.id.split("_")[-1])): p for p in real}  # VOLTA's keys
    a = write_volta(tmp_path / "a.lmdb", {k: volta(p) for k, p in short.items()}, writemap=True)
    found = read(VOLTA, a, 2048)
    assert list(found) == list(short)
    for key, p in short.items():
        check(found[key], p)
        assert sized(found[key], p)
    b = write_volta(tmp_path / "b", {p.id: vilbert(p) for p in real})
    for p in real:
        check(read(VOLTA, b, 2048)[p.id], p, objects=False)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    due = {p.id: p for p in (picture("a"), picture("b", n=1), picture("ä/c", n=40))}
    place = write_volta(tmp_path / "db", {k: mmf(p) for k, p in due.items()}, protocol)
    assert VOLTA.detect(str(place)) and not UNITER.detect(str(place))
    for key, found in read(VOLTA, place).items():
        check(found, due[key], attributes=False)
    assert all(r.labels is None for r in read(VOLTA, place, labels="no").values())


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def changed(**parts: Any) -> Callable[[Picture], dict[str, Any]]:
    return lambda p: vilbert(p) | parts


BAD: list[tuple[Callable[[Picture], Any], str]] = [
    (lambda p: Evil(), "names 'posix.system', which is no plain data: nothing of it was run"),
    (lambda p: Path, "the pickle names 'pathlib"),
    (changed(features=np.asarray([{}], object)), "array of objects"),
    (changed(num_boxes=4), "4 objects, where features has 3"),
    (lambda p: volta(p) | {"num_boxes": "2"}, "2 objects, where features has 3"),
    (changed(image_w=None), "it has no image_w and image_h"),
    (changed(image_w="20x"), "'20x' is no positive integer"),
    (changed(boxes=None), "it has no boxes or bbox"),
    (
        changed(features=np.ones((3, 5))),
        r"features: shape \(3, 5\) where \(objects, 6\) .* --feature-dim",
    ),
    (changed(features=np.ones((2, 6))), "2 objects, where boxes has 3"),
    (changed(boxes=np.ones((0, 4)), features=np.ones((0, 6))), "has no objects"),
    (changed(features="a*b"), "damaged base64"),
    (changed(features=base64.b64encode(b"1234567")), "buffer size|no whole rows"),
    (changed(image_id="b"), "under this key is image 'b'"),
    (lambda p: vilbert(with_nan(p)), "box 0 is .*nan"),
    (lambda p: vilbert(outside(p)), "box 0 is .* outside of the 200 × 100 image"),
    (lambda p: volta(p) | {"objects_id": volta(picture("a", 2))["objects_id"]}, "2 values, but 3"),
    (lambda p: [p.id], "no dict of an image"),
]


@pytest.mark.parametrize(("item", "message"), BAD)
def test_bad_images_of_volta(
    tmp_path: Path, item: Callable[[Picture], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = write_volta(tmp_path / "db", {"a": item(picture("a"))})
    with pytest.raises(ValueError) as caught:
        read(VOLTA, place)
    said = f"{getattr(caught.value, 'part', '')}: {caught.value}"
    assert re.search(message, said) and len(said) < 300 and not (tmp_path / "ran").exists()


def test_bad_keys_of_volta(tmp_path: Path) -> None:
    good = {b"a": pickle.dumps(vilbert(picture("a")))}
    for i, (keys, message) in enumerate(
        [
            (pickle.dumps([b"a", b"lost"]), "in the list of keys, but not there"),
            (pickle.dumps(Evil()), "entry 'keys': the pickle names 'posix.system'"),
            (pickle.dumps({"a": 1}), "entry 'keys': it is no list"),
            (pickle.dumps([b"a"])[:-3], "entry 'keys': the pickle is damaged"),
            (pickle.dumps([b"\xff"]), "is not UTF-8 text"),
            (pickle.dumps(["\ud800"]), "no valid Unicode"),
        ]
    ):
        with pytest.raises(ValueError, match=message):
            read(VOLTA, put(tmp_path / str(i), {**good, b"keys": keys}))
    with pytest.raises(DataError, match="has no entry 'keys'"):
        read(VOLTA, put(tmp_path / "none", good))


# --- UNITER -------------------------------------------------------------------------------------


def uniter(p: Picture) -> dict[str, Any]:
    """The arrays that scripts/convert_imgdir.py of UNITER keeps, in float16."""
    f = p.fractions
    arrays = {
        "features": p.features,
        "norm_bb": np.hstack([f, f[:, 2:] - f[:, :2]]),
        "conf": p.object_conf,
        "soft_labels": p.probabilities(),
    }
    return {name: array.astype(np.float16) for name, array in arrays.items()}


def packed(dump: Mapping[str, Any]) -> bytes:
    done: bytes = msgpack.dumps(dict(dump), use_bin_type=True, default=msgpack_numpy.encode)
    return done


def zipped(dump: Mapping[str, Any]) -> bytes:
    with io.BytesIO() as f:
        np.savez_compressed(f, **dump, allow_pickle=True)
        return f.getvalue()


def write_uniter(
    folder: Path,
    due: Mapping[str, Picture],
    pack: Callable[[Mapping[str, Any]], bytes] = packed,
    name: str = "feat_th0.2_max100_min10",
) -> Path:
    entries = {key.encode(): pack(uniter(p)) for key, p in due.items()}
    put(folder / name, {**entries, b"__keys__": json.dumps(list(due)).encode()})
    counts = {key: p.n for key, p in due.items()}
    (folder / "nbb_th0.2_max100_min10.json").write_text(json.dumps(counts))
    return folder / name


def test_real_rows_as_uniter_keeps_them(shared_data: Path, tmp_path: Path) -> None:
    due = {f"{p.id.replace('COCO', 'coco')}.npz": p for p in real_pictures(shared_data)}
    sizes = tmp_path / "captions_train2014.json"  # COCO's annotations have them
    images = [{"file_name": f"{p.id}.jpg", "width": p.width, "height": p.height, "id": 1}
              for p in due.values()]  # fmt: skip
    sizes.write_text(json.dumps({"info": {}, "images": images, "annotations": []}))
    for folder, pack in (("a", packed), ("b", zipped)):
        name = "feat_th0.2_max100_min10" + ("_compressed" if pack is zipped else "")
        place = write_uniter(tmp_path / folder, due, pack, name)
        found = read(UNITER, place, 2048, sizes=str(sizes))
        assert len(found) == 10 and UNITER.detect(str(place)) and not VOLTA.detect(str(place))
        for p in due.values():
            # float16 has three digits: features up to 35 and boxes are as near.
            check(found[p.id], p, attributes=False, half=True)
            assert sized(found[p.id], p)


def test_names_and_counts_of_uniter(tmp_path: Path) -> None:
    due = {f"{name}.npz": picture(name) for name in ("vg_00012", "nlvr2_dev-850-0-img0", "x")}
    place = write_uniter(tmp_path, due)
    found = read(UNITER, place, size="640x480")
    assert list(found) == ["vg/12", "nlvr2_dev-850-0-img0", "x"]
    assert {(r.width, r.height) for r in found.values()} == {(640, 480)}
    # Boxes are fractions: another size changes none.
    np.testing.assert_array_equal(found["x"].boxes, read(UNITER, place, size="9x9")["x"].boxes)
    counts = place.parent / "nbb_th0.2_max100_min10.json"
    counts.write_text(json.dumps({"x.npz": 2}))
    assert [len(r.boxes) for r in read(UNITER, place, size="1x1").values()] == [3, 3, 2]
    counts.write_text(json.dumps({"x.npz": 4}))
    with pytest.raises(ValueError, match="4 objects, where features has 3"):
        read(UNITER, place, size="1x1")
    counts.write_text(json.dumps({"x.npz": "two"}))
    with pytest.raises(DataError, match=r"nbb_.*: x.npz has 'two' boxes"):
        read(UNITER, place, size="1x1")


def test_uniter_has_no_sizes_and_says_so(tmp_path: Path) -> None:
    place = write_uniter(tmp_path, {"a.npz": picture("a"), "b.npz": picture("b")})
    with pytest.raises(DataError, match=r"data.mdb: .* --feature-option sizes=FILE .*size=WID"):
        read(UNITER, place)
    (tmp_path / "sizes.csv").write_text("id,width,height\na,3,4\n")
    with pytest.raises(ValueError, match=r"key b.npz: .*sizes.csv has no size of it"):
        read(UNITER, place, sizes=str(tmp_path / "sizes.csv"))
    for size in ("0x4", "640", "axb", "99999999999x1"):
        with pytest.raises(DataError, match=f"size={size[:10]}"):
            read(UNITER, place, size=size)


def test_bad_images_of_uniter(tmp_path: Path) -> None:
    good = uniter(picture("a"))
    objects = np.asarray([{"x": 1}], dtype=object)
    huge = {b"nd": True, b"type": "<f4", b"kind": b"", b"shape": (1 << 40,), b"data": b"1234"}
    deep: Any = []
    for _ in range(3000):
        deep = [deep]
    for i, (value, message) in enumerate(
        [
            (packed(good | {"features": objects}), "features is no array of numbers"),
            (zipped(good | {"features": objects}), "no features or x"),
            (packed(good | {"norm_bb": {b"complex": True, b"data": "1"}}), "norm_bb is no array"),
            (packed(good | {"features": huge}), "features of shape .* has 4 bytes"),
            (packed({"x": 1}), "it has no boxes"),
            (packed(good)[:-9], "damaged, or no msgpack"),
            (zipped(good)[:-9], "damaged, or no .npz"),
            (packed(good | {"norm_bb": good["norm_bb"] * 9}), "box 0 is .* outside of 0..1"),
            (packed(good | {"soft_labels": np.ones((3, 7))}), "shape .3, 7. where .3, 1600."),
            (msgpack.dumps([1]), "no map of arrays"),
            (b"\x91" * 5000, "damaged, or no msgpack"),
            (b"", "damaged, or no msgpack"),
        ]
    ):
        place = put(tmp_path / str(i), {b"a": value, b"__keys__": b'["a"]'})
        with pytest.raises(ValueError, match=message):
            read(UNITER, place, size="200x100")


# --- the database -------------------------------------------------------------------------------


def test_a_database_reads_as_lmdb_itself_reads_it(tmp_path: Path) -> None:
    """Many pages, long and empty values, overwritten and deleted keys."""
    made = np.random.default_rng(3)
    due: dict[bytes, bytes] = {}
    with lmdb.open(str(tmp_path), map_size=1 << 28) as env:
        for _ in range(3):
            with env.begin(write=True) as transaction:
                for key in made.integers(0, 3000, 900):
                    value = made.bytes(int(made.choice([0, 20, 1900, 2100, 9000])))
                    due[b"%d" % key] = value
                    transaction.put(b"%d" % key, value)
                for key in made.choice(sorted(due), 50):
                    if due.pop(bytes(key), None) is not None:
                        transaction.delete(bytes(key))
    with lmdb_file.opened(str(tmp_path / "data.mdb")) as found:
        assert list(found.keys()) == sorted(due)
        assert all(found.get(key) == value for key, value in due.items())
        assert found.get(b"9999") is None and found.get(b"") is None
    lmdb.open(str(tmp_path / "empty")).close()
    with lmdb_file.opened(str(tmp_path / "empty" / "data.mdb")) as found:
        assert list(found.keys()) == [] and found.get(b"a") is None


def test_damaged_databases(tmp_path: Path) -> None:
    """liblmdb is killed by most of these."""
    items = {f"{i}": vilbert(picture(f"{i}", n=1 + i % 40)) for i in range(30)}
    place = write_volta(tmp_path / "volta", items)
    assert damage(VOLTA, place, place / "data.mdb") >= 10
    data = (place / "data.mdb").read_bytes()
    (place / "data.mdb").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"data.mdb is cut off: .* bytes of .*; copy it again"):
        read(VOLTA, place)
    assert not VOLTA.detect(str(place))
    uniters = {f"{i}": picture(f"{i}", n=1 + i % 40) for i in range(10)}
    place = write_uniter(tmp_path / "uniter", uniters)
    damage(UNITER, place, place / "data.mdb", size="200x100")


def test_places_that_are_no_database(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"no database")
    for form in (VOLTA, UNITER):
        assert not form.detect(str(tmp_path)) and not form.detect(str(tmp_path / "data.mdb"))
        with pytest.raises(DataError, match="is no LMDB database: give the folder"):
            form.files(str(tmp_path))
    with lmdb.open(str(tmp_path / "nested"), max_dbs=2) as env:
        env.open_db(b"inner")
    with pytest.raises(DataError, match="has databases in it"):
        read(VOLTA, tmp_path / "nested")

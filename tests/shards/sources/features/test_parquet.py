"""Parquet files of pyarrow, and data sets that Hugging Face's `datasets` saves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.errors import DataError
from shards.sources.features.parquet import FORMAT
from shards.sources.regions import Options
from tests.shards.sources.features.stores import (
    DIM,
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


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


def row(p: Picture, **more: Any) -> dict[str, Any]:
    return {
        "image_id": p.id,
        "width": p.width,
        "height": p.height,
        "boxes": p.boxes.tolist(),
        "features": p.features.tolist(),
        "objects_id": p.object_id.tolist(),
        "objects_conf": p.object_conf.tolist(),
        "attrs_id": p.attribute_id.tolist(),
        "attrs_conf": p.attribute_conf.tolist(),
        **more,
    }


def parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def test_real_rows_as_datasets_keeps_them(shared_data: Path, tmp_path: Path) -> None:
    real = real_pictures(shared_data)
    shape = datasets.Array2D((None, 2048), "float32")
    features = datasets.Features(
        {
            "image_id": datasets.Value("string"),
            "width": datasets.Value("int32"),
            "height": datasets.Value("int32"),
            "boxes": datasets.List(datasets.List(datasets.Value("float32"), 4)),
            "features": shape,
            **{
                name: datasets.List(datasets.Value(kind))
                for name, kind in (("objects_id", "int64"), ("objects_conf", "float32"),
                                   ("attrs_id", "int64"), ("attrs_conf", "float32"))
            },
        }
    )  # fmt: skip
    made = datasets.Dataset.from_list([row(p) for p in real], features=features)
    splits = datasets.DatasetDict(
        {"train": made.select(range(6)), "val": made.select(range(6, 10))}
    )
    splits.save_to_disk(str(tmp_path / "saved"), num_shards={"train": 2, "val": 1})
    made.to_parquet(str(tmp_path / "all.parquet"), batch_size=4)
    for place in (tmp_path / "saved", tmp_path / "all.parquet"):
        assert FORMAT.detect(str(place))
        found = read(FORMAT, place, 2048)
        assert list(found) == [p.id for p in real]
        for p in real:
            check(found[p.id], p)
            assert sized(found[p.id], p)
    assert FORMAT.detect(str(tmp_path / "saved" / "val"))
    assert list(read(FORMAT, tmp_path / "saved" / "val", 2048)) == [p.id for p in real[6:]]
    options = Options(feature_dim=2048)
    files = FORMAT.files(str(tmp_path / "saved"))
    found_splits = [[e.split for e in FORMAT.entries(f, options)] for f in files]
    assert found_splits == [["train"] * 3, ["train"] * 3, ["val"] * 4]


def test_row_groups_and_ways_back(tmp_path: Path) -> None:
    pictures = [picture(f"{i}", n=1 + i % 7) for i in range(90)]
    for name, options in (("a", {"row_group_size": 20}), ("b", {})):
        parquet(tmp_path / f"{name}.parquet", [row(p) for p in pictures], **options)
        found = read(FORMAT, tmp_path / f"{name}.parquet", backwards=True)
        assert list(found) == [f"{i}" for i in reversed(range(90))]
        for p in pictures:
            check(found[p.id], p)


Cells = Callable[[Picture], tuple[Any, Any]]


@pytest.mark.parametrize(
    ("cells", "kinds", "half"),
    [
        (lambda p: (p.boxes.tobytes(), p.features.tobytes()), (pa.binary(), pa.binary()), False),
        (
            lambda p: (p.boxes.tolist(), p.features.astype("<f2").tobytes()),
            (pa.list_(pa.list_(pa.float64())), pa.large_binary()),
            True,
        ),
        (
            lambda p: (p.boxes.reshape(-1).tolist(), p.features.reshape(-1).tolist()),
            (pa.list_(pa.float32()), pa.large_list(pa.float32())),
            False,
        ),
        (
            lambda p: (p.boxes.tolist(), p.features.astype("<f2").tolist()),
            (pa.list_(pa.list_(pa.float32(), 4)), pa.list_(pa.list_(pa.float16(), DIM))),
            True,
        ),
    ],
)
def test_ways_to_keep_arrays(
    tmp_path: Path, cells: Cells, kinds: tuple[Any, Any], half: bool
) -> None:
    pictures = [picture(f"{i}", n=1 + i) for i in range(20)]
    columns = [cells(p) for p in pictures]
    table = pa.table(
        {
            "img_id": pa.array([int(p.id) for p in pictures]),
            "image_w": [200] * 20,
            "image_h": [100.0] * 20,
            "boxes": pa.array([c[0] for c in columns], kinds[0]),
            "features": pa.array([c[1] for c in columns], kinds[1]),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    found = read(FORMAT, tmp_path)
    for p in pictures:
        check(found[p.id], p, objects=False, half=half)


def test_columns_by_name_and_tensors(tmp_path: Path) -> None:
    p = picture("a", n=2)
    shape = pa.fixed_shape_tensor(pa.float32(), (2, DIM))
    table = pa.table(
        {
            "name": ["a"],
            "det": pa.array([p.fractions.tolist()]),
            "emb": pa.ExtensionArray.from_storage(
                shape, pa.array([p.features.reshape(-1).tolist()], shape.storage_type)
            ),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    missing = (
        "no column of image by a usual name: .*name, det, emb; .*--feature-option image=COLUMN"
    )
    with pytest.raises(DataError, match=missing):
        read(FORMAT, tmp_path)
    named = {"image": "name", "boxes": "det", "features": "emb"}
    found = read(FORMAT, tmp_path, **named, boxes_in="fractions", size="200x100")
    check(found["a"], p, objects=False)
    with pytest.raises(DataError, match="has no column 'nope': it has name, det, emb"):
        read(FORMAT, tmp_path, **named | {"boxes": "nope"})
    with pytest.raises(ValueError, match="how large images are"):
        read(FORMAT, tmp_path, **named)


def test_sentences_and_splits(tmp_path: Path) -> None:
    rows = [
        row(picture("a"), split="train", sentences=[
            {"text": "what is it?", "source": "vqa", "id": 7, "answers": {"cat": 1.0, "dog": None}},
            {"text": " ", "source": "vqa", "id": None, "answers": None},
            {"text": "a cat", "source": None, "id": None, "answers": None},
        ]),
        row(picture("b"), split=None, sentences=None),
    ]  # fmt: skip
    parquet(tmp_path / "x.parquet", rows)
    options = Options(feature_dim=DIM, settings={"source": "mine"})
    a, b = FORMAT.entries(str(tmp_path / "x.parquet"), options)
    assert [(s.text, s.source, s.id) for s in a.sentences] == [
        ("what is it?", "vqa", 7), ("a cat", "mine", None)]  # fmt: skip
    assert (a.sentences[0].answers, a.split, a.empty_sentences) == ({"cat": 1.0}, "train", 1)
    assert (b.sentences, b.split) == ((), None)
    captions = [row(picture("a"), caption="one"), row(picture("b"), caption="two")]
    parquet(tmp_path / "x.parquet", captions)
    entries = FORMAT.entries(str(tmp_path / "x.parquet"), options)
    assert [e.sentences[0].text for e in entries] == ["one", "two"]
    parquet(
        tmp_path / "x.parquet", [row(picture("a"), sentences=[{"text": "x", "answers": {"y": -1}}])]
    )
    (bad,) = FORMAT.entries(str(tmp_path / "x.parquet"), options)
    assert "score of answer 'y' is -1, not 0..1" in bad.problem


BAD: list[tuple[dict[str, Any], str]] = [
    (row(picture("a"), boxes=[[1.0, 2, 3, 4]]), "3 objects, where boxes has 1"),
    (row(picture("a"), features=[[1.0] * 5] * 3), "see --feature-dim"),
    (row(picture("a"), features=[[1.0] * 6, [1.0] * 5, [1.0]]), "lists are of different lengths"),
    (row(picture("a"), features=[[1.0] * 6, None, [1.0] * 6]), "a list in it is missing"),
    (row(picture("a"), features=[[1.0] * 5 + [None]] * 3), "a number in it is missing"),
    (row(picture("a"), features=None), "no features or x"),
    (row(picture("a"), features="words"), "damaged base64"),
    (row(picture("a"), features=b"12345"), "5 bytes are no rows of 6 numbers"),
    (row(picture("a"), width=None), "how large images are"),
    (row(picture("a"), width=-1), "-1 is no positive integer"),
    (row(picture("a"), image_id=None), "its id is a NoneType"),
    (row(picture("a"), boxes=[], features=[]), "no objects"),
    (row(picture("a"), objects_id=[1]), "1 values, but 3 boxes"),
    (row(picture("a"), objects_id=[1600] * 3), "ids run from 1600"),
    (row(with_nan(picture("a"))), "box 0 is .*nan"),
    (row(outside(picture("a"))), "outside of the 200 × 100"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_bad_rows(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(FORMAT, parquet(tmp_path / "x.parquet", [bad]))
    assert len(str(caught.value)) < 300


def saved(folder: Path, pictures: list[Picture]) -> Path:
    datasets.Dataset.from_list([row(p) for p in pictures]).save_to_disk(str(folder))
    return folder


def test_damaged_files(tmp_path: Path) -> None:
    pictures = [picture(f"{i}", n=1 + i % 5) for i in range(20)]
    file = parquet(tmp_path / "x.parquet", [row(p) for p in pictures], row_group_size=5)
    assert damage(FORMAT, file, file, 60) >= 10
    place = saved(tmp_path / "saved", pictures)
    (arrow,) = place.glob("*.arrow")
    assert damage(FORMAT, place, arrow, 60) >= 10
    arrow.write_bytes(arrow.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"data-00000-of-00001.arrow is cut off"):
        read(FORMAT, place)


def test_damaged_folders(tmp_path: Path) -> None:
    place = saved(tmp_path / "saved", [picture("a")])
    state = place / "state.json"
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "is no JSON object"),
        ('{"_data_files": []}', "names no data files"),
        ('{"_data_files": [{"filename": "../../secret.arrow"}]}', "names no data files"),
        ('{"_data_files": [{"filename": "no.arrow"}]}', "no.arrow"),
    ):
        state.write_text(text)
        with pytest.raises(DataError, match=message):
            read(FORMAT, place)
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["..", "saved"]}))
    with pytest.raises(DataError, match="has no names of splits"):
        read(FORMAT, tmp_path)
    (tmp_path / "empty.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot read .*empty.parquet: .*; copy it again"):
        read(FORMAT, tmp_path / "empty.parquet")
    assert not FORMAT.detect(str(tmp_path / "no"))

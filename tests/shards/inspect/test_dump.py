"""`lxscale shards dump` finds one record and shows all of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards.errors import DataError
from shards.format.record import ImageRecord, Sentence
from shards.inspect.find import show
from tests.conftest import files_of
from tests.shards.format.test_verify import reseal
from tests.shards.inspect.sets import build_set, command, made_records

RECORDS = made_records(13)
RECORDS[7] = replace(RECORDS[7], image="deep/er name.jpg")
RECORDS[8] = replace(
    RECORDS[8],
    image="0:1",
    sentences=(
        Sentence(
            "red circle left of a 絵 line, green and blue", "vqa", {"Yes.": 0.5, "rare": 1}, 7
        ),
        Sentence("red \x1b[31m\u202e\x9b", "coco_cap"),
    ),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_set(RECORDS, tmp_path_factory.mktemp("made"))


def dumped(capsys: pytest.CaptureFixture[str], data: Path, key: str) -> dict:
    assert command("dump", data, key, "--json") == 0
    document: dict = json.loads(capsys.readouterr().out)
    return document


def assert_is(found: dict, record: ImageRecord) -> None:
    assert record.labels is not None
    size = np.asarray([record.width, record.height] * 2)
    assert (found["image"], found["width"], found["split"]) == (
        record.image,
        record.width,
        record.split,
    )
    for given, s in zip(found["sentences"], record.sentences, strict=True):
        assert (given["text"], given["source"], given["id"]) == (s.text, s.source, s.id)
    for i, given in enumerate(found["objects"]):
        assert np.float32(given["box"]).tolist() == record.boxes[i].tolist()
        np.testing.assert_allclose(given["pixels"], record.boxes[i] * size, rtol=1e-6)
        assert given["object_id"] == record.labels.object_id[i]
        assert np.float32(given["attribute_conf"]) == record.labels.attribute_conf[i]
        assert given["feature"]["most"] == record.features[i].max()
        assert given["feature"]["zeros"] == np.mean(record.features[i] == 0)
    assert len(found["objects"]) == len(record.boxes)


@pytest.mark.parametrize(
    ("key", "number"),
    [
        ("img_000000", 0),
        ("img_000012", 12),
        ("deep/er name.jpg", 7),  # an image id
        ("deep=2Fer=20name=2Ejpg", 7),  # its key
        ("2:1", 11),  # a place
        ("0=3A1", 8),  # the key of an id that reads as a place
        ("0:1", 1),
    ],
)
def test_by_id_key_and_place(
    data: Path, capsys: pytest.CaptureFixture[str], key: str, number: int
) -> None:
    found = dumped(capsys, data, key)
    assert_is(found, RECORDS[number])
    assert (found["shard"], found["index"]) == divmod(number, 5)
    assert found["tar"] == f"{files_of(data)}/shard-00000{number // 5}.tar"


def test_sentences_come_with_what_training_sees(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question, caption = dumped(capsys, data, "1:3")["sentences"]
    assert question["tokens"] == ["red", "circle", "left", "[UNK]", "[UNK]", "[UNK]"]
    assert question["cut"] is True and caption["cut"] is False
    assert question["answers"] == {"Yes.": 0.5, "rare": 1} and question["in_table"] == ["Yes."]
    assert caption["answers"] is None


def test_for_people(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "names").write_text("".join(f"thing{i}\n" for i in range(12)))
    assert command("dump", data, "1:3", "--objects", tmp_path / "names") == 0
    out = capsys.readouterr().out
    assert not {"\x1b", "\u202e", "\x9b"} & set(out)  # nothing that steers a terminal
    assert "key       0=3A1" in out and r"red \x1b[31m\u202e\x9b" in out
    assert "→ rare (1, not in the answer table)" in out and "[UNK] … cut" in out
    assert "[vqa 7] red circle" in out and "thing" in out and " #" in out


@pytest.mark.parametrize("key", ["img_00012", "IMG_000012", "000012", "img_000012.jpg"])
def test_an_unknown_key_names_near_ones(data: Path, key: str) -> None:
    with pytest.raises(DataError, match=r"no record .*: the nearest keys are .*img_000012"):
        show(str(data), key)


@pytest.mark.parametrize(
    ("place", "message"),
    [("3:0", "has no shard 3: its 3 count"), ("2:3", "no record 3: its 3 count from 0")],
)
def test_a_place_that_is_none(data: Path, place: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        show(str(data), place)


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (b'"num_objects":', b'"num_objectz":', "record 0: 'num_objects'"),
        (b'"height":480', b'"height":"48"'[:12], "record 0: .*build the data set again"),
        (b'{"image"', b'["image"', "record 0: .*build the data set again"),
        (b'"image":"img_000000', b'"image":"\\ud8000000', "record 0: .*surrogates not allowed"),
        (b'"image":"img', b'"image":"\xed\xa0\x80', "record 0: 'utf-8' codec can't decode"),
        (b'"source":"vqa"', b'"zource":"vqa"', "record 0: sentence .* has an unknown key"),
    ],
)
def test_records_that_are_none_whatever_their_hash_says(
    tmp_path: Path, good: bytes, bad: bytes, message: str
) -> None:
    data = build_set(made_records(2), tmp_path / "data")
    tar = files_of(data) / "shard-000000.tar"
    content = tar.read_bytes()
    assert good in content and len(good) == len(bad)
    tar.write_bytes(content.replace(good, bad, 1))
    reseal(data)
    with pytest.raises(DataError, match=f"shard-000000.tar: {message}"):
        show(str(data), "0:0")


def test_a_header_that_is_none(tmp_path: Path) -> None:
    data = build_set(made_records(2), tmp_path / "data")
    tar = files_of(data) / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"img_000000.json", b"img_000009.json"))
    reseal(data)
    with pytest.raises(DataError, match=r"shard-000000.tar: record 0 has no header \(bad check"):
        show(str(data), "img_000001")

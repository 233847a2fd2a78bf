"""The table of a record's members, and the bytes that follow from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from shards.errors import DataError
from shards.format.build import BuildSettings, build
from shards.format.check import check_record
from shards.format.members import MEMBERS, RECORD, members_of
from shards.format.record import Labels
from shards.format.tokenizer import SPECIAL
from tests.conftest import MakeRecords

WORDS = ["a", "red", "green", "blue", "small", "circle", "line", "on", "the", "left", "what"]
VOCAB = [*SPECIAL, *WORDS, "color", "is", "it", "?", *"0123456789", *(f"##{i}" for i in range(10))]


@pytest.mark.parametrize(
    ("labels", "fingerprint"),
    [
        (False, "73293cd2a45b0f5515c053e60e928a96aec070adcbc8a8f4998f9972324bed1b"),
        (True, "9cedd78ed90cc07c147c0bf29ad146c73a7917235100dd2ca2a905d923df4c31"),
    ],
)
def test_the_bytes_of_a_data_set_stay_what_they_were(
    tmp_path: Path, make_records: MakeRecords, labels: bool, fingerprint: str
) -> None:
    """The fingerprint covers every byte of tars, tables, vocabulary and answers."""
    settings = BuildSettings("small", "random", vocab=VOCAB, images_per_shard=4)
    assert build(make_records(10, labels=labels), tmp_path, settings).fingerprint == fingerprint


@pytest.mark.parametrize("labels", [False, True])
def test_a_payload_is_read_back(tmp_path: Path, make_records: MakeRecords, labels: bool) -> None:
    records = make_records(3, labels=labels)
    schema = build(records, tmp_path, BuildSettings("x", "y", vocab=VOCAB)).schema
    members = [m for m in members_of(schema) if m is not RECORD]
    assert ("labels" in [m.name for m in members]) == labels
    for record in records:
        for member in members:
            payload, n = member.payload(record), len(record.boxes)
            assert len(payload) == n * member.object_bytes(schema)
            back = dataclasses.replace(record, **{member.name: member.value(payload, n, schema)})
            for one, other in zip(member.arrays(record), member.arrays(back), strict=True):
                assert one.dtype == other.dtype
                np.testing.assert_array_equal(one, other)
            with pytest.raises(ValueError, match=f"bytes of {member.name} for {n + 1} objects"):
                member.value(payload, n + 1, schema)


def test_columns_of_a_member_have_elements_of_one_size() -> None:
    for member in MEMBERS:
        assert len({np.dtype(column.type).itemsize for column in member.columns}) <= 1


def test_a_record_of_another_shape_is_named(tmp_path: Path, make_records: MakeRecords) -> None:
    records = make_records(2, labels=True)
    schema = build(records, tmp_path, BuildSettings("x", "y", vocab=VOCAB)).schema
    (record, _), n = records, len(records[0].boxes)
    assert record.labels is not None
    check_record(record, schema)
    longer = Labels(*(np.append(column, column[:1]) for column in vars(record.labels).values()))
    for changes, message in (
        ({"labels": None}, "no labels, others have"),
        ({"labels": longer}, rf"object_id of shape \({n + 1},\) and type int32 where \({n},\)"),
        ({"features": record.features.astype(np.float32)}, "features of .* type float32 where"),
        ({"boxes": record.boxes[:, :3]}, rf"boxes of shape \({n}, 3\)"),
    ):
        with pytest.raises(DataError, match=f"{record.image}.* has {message}"):
            check_record(dataclasses.replace(record, **changes), schema)
    with pytest.raises(DataError, match="labels where others have none"):
        check_record(record, dataclasses.replace(schema, labels=False))

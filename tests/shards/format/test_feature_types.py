"""Features as fp16, fp32 and uint8: what is stored, what comes back, who reads it."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards.convert.convert import convert, records
from shards.convert.inputs import FeatureInput, Inputs
from shards.convert.pool import in_processes
from shards.errors import DataError
from shards.format.build import BuildSettings, build
from shards.format.features import HEAD, from_uint8, to_uint8
from shards.format.manifest import load_manifest
from shards.format.record import ImageRecord, Report
from shards.format.verify import verify
from shards.sources.regions import Options
from shards.tools.merge import merge
from shards.webdataset import as_webdataset
from tests.conftest import MakeRecords, contents, files_of
from tests.shards.convert.inputs import OPTIONS, write_inputs

SETTINGS = BuildSettings("types", "test", vocab_size=200, images_per_shard=4)
HERE = in_processes(1)


def as_f32(made: list[ImageRecord]) -> list[ImageRecord]:
    """Records whose features fp16 cannot hold exactly."""
    rng = np.random.default_rng(0)
    shapes = [r.features.shape for r in made]
    numbers = [
        (rng.normal(size=s) * 10.0 ** rng.integers(-3, 6)).astype(np.float32) for s in shapes
    ]
    return [replace(r, features=n) for r, n in zip(made, numbers, strict=True)]


def test_rows_of_uint8() -> None:
    rng = np.random.default_rng(0)
    rows = np.concatenate(
        [
            rng.normal(size=(50, 40)) * 10.0 ** rng.integers(-30, 30, (50, 1)),
            np.zeros((1, 40)),
            np.full((1, 40), 7.25),
            np.full((1, 40), -1e-30),
            np.where(np.arange(40) % 2, 1e38, -1e38)[None],
        ]
    ).astype(np.float32)
    stored = to_uint8(rows)
    assert stored.shape == (54, HEAD + 40) and stored.dtype == np.uint8
    back = from_uint8(stored)
    assert np.isfinite(back).all()
    scale = stored[:, :4].copy().view("<f4")
    rounding = np.abs(rows).max(axis=1, keepdims=True) * 2e-7
    assert (np.abs(back.astype(np.float64) - rows) <= scale.astype(np.float64) / 2 + rounding).all()
    np.testing.assert_array_equal(back[50:53], rows[50:53])
    assert not from_uint8(np.zeros((3, HEAD + 40), np.uint8)).any(), "the mark of a masked object"
    # The formula, value by value.
    least, step = rows[0].min(), (rows[0].astype(np.float64).max() - rows[0].min()) / 255
    np.testing.assert_array_equal(stored[0, HEAD:], np.rint((rows[0] - least) / np.float32(step)))


def test_fp16_is_as_it_was(tmp_path: Path, make_records: MakeRecords) -> None:
    made = build(make_records(9, labels=True), tmp_path / "a", SETTINGS)
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    assert "feature_type" not in manifest["schema"] and made.schema.feature_type == "fp16"
    with pytest.raises(DataError, match="float16 is due"):
        build(as_f32(make_records(9)), tmp_path / "b", SETTINGS)


@pytest.mark.parametrize("kind", ["fp32", "uint8"])
def test_what_is_stored_comes_back(tmp_path: Path, make_records: MakeRecords, kind: str) -> None:
    given = as_f32(make_records(9, labels=True))
    settings = replace(SETTINGS, feature_type=kind)
    made = build(given, tmp_path / "a", settings)
    assert made == load_manifest(str(tmp_path / "a")) and made.schema.feature_type == kind
    assert verify(str(tmp_path / "a")) == []
    found = {r["image"]: r["features"] for r in as_webdataset(str(tmp_path / "a"))}
    for record in given:
        due = record.features
        if kind == "uint8":
            due = from_uint8(to_uint8(record.features))
        np.testing.assert_array_equal(found[record.image], due)
    # Our own tars as somebody's: the same numbers come in again.
    place = str(files_of(tmp_path / "a"))
    inputs, options = Inputs((FeatureInput(place),)), Options(feature_dim=8)
    again = convert(inputs, tmp_path / "b", settings, options=options, workers=HERE)
    assert [s.images for s in again.shards] == [4, 4, 1]
    for record in as_webdataset(str(tmp_path / "b")):
        np.testing.assert_allclose(record["features"], found[record["image"]], rtol=1e-5)
    tar = next(files_of(tmp_path / "a").glob("*.tar"))
    data = bytearray(tar.read_bytes())
    data[data.index(b".features.") + 600] ^= 1
    tar.write_bytes(data)
    assert any(tar.name in problem for problem in verify(str(tmp_path / "a")))


def test_a_build_says_what_uint8_costs(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in")
    report = Report()
    settings = replace(SETTINGS, feature_type="uint8")
    one = convert(inputs, tmp_path / "a", settings, options=OPTIONS, workers=HERE, report=report)
    two = convert(inputs, tmp_path / "b", settings, options=OPTIONS, workers=in_processes(2))
    assert one.fingerprint == two.fingerprint and contents(tmp_path / "a") == contents(
        tmp_path / "b"
    )
    (note,) = report.notes
    assert note.startswith("features as uint8 are off by") and note.endswith("box's values")
    share = float(note.split("at most, ")[1].split("%")[0])
    assert 0 <= share <= 0.2, "half a step of 255"
    for record in records(inputs, options=OPTIONS):
        assert record.features.dtype == np.float16, "as `records` gives them"


def test_a_copy_keeps_the_bytes(tmp_path: Path, make_records: MakeRecords) -> None:
    given = as_f32(make_records(9))
    settings = replace(SETTINGS, feature_type="uint8")
    build(given[:5], tmp_path / "a", settings)
    build(given[5:], tmp_path / "b", replace(settings, vocab=tmp_path / "a"))
    merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "c"), "c")
    found = {r["image"]: r["features"] for r in as_webdataset(str(tmp_path / "c"))}
    for record in given:
        np.testing.assert_array_equal(found[record.image], from_uint8(to_uint8(record.features)))


def test_types_that_are_not_there(tmp_path: Path, make_records: MakeRecords) -> None:
    build(make_records(4), tmp_path / "a", replace(SETTINGS, feature_type="fp32"))
    path = tmp_path / "a/manifest.json"
    path.write_text(path.read_text().replace('"fp32"', '"fp8"'))
    with pytest.raises(DataError, match="damaged"):
        load_manifest(str(tmp_path / "a"))
    inputs = write_inputs(tmp_path / "in", 2)
    text = (tmp_path / "in/features.tsv").read_bytes()
    for kind in ("fp16", "fp32", "uint8"):
        row = text.split(b"\r\n")[0].split(b"\t")
        bad = np.frombuffer(base64.b64decode(row[9]), "<f4").copy()
        bad[0] = np.nan
        row[9] = base64.b64encode(bad.tobytes())
        lines = [b"\t".join(row), *text.split(b"\r\n")[1:]]
        (tmp_path / "in/features.tsv").write_bytes(b"\r\n".join(lines))
        settings = replace(SETTINGS, feature_type=kind)
        with pytest.raises(DataError, match="line 1, features: object 0 has nan"):
            convert(inputs, tmp_path / "out", settings, options=OPTIONS, workers=HERE)

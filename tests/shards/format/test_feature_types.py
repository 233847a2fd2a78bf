"""Features as fp16, fp32 and uint8: what is stored, what comes back, who reads it."""

from __future__ import annotations

import base64
import hashlib
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
from shards.format.check import check_record
from shards.format.features import HEAD, from_uint8, to_uint8
from shards.format.manifest import load_manifest
from shards.format.record import ImageRecord, Report
from shards.format.verify import verify
from shards.sources import checks
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


def test_what_is_appended_is_stored_as_the_rest(tmp_path: Path) -> None:
    out, settings = tmp_path / "out", replace(SETTINGS, feature_type="uint8")
    convert(write_inputs(tmp_path / "a", 5), out, settings, options=OPTIONS, workers=HERE)
    more = write_inputs(tmp_path / "b", 3, first=5)
    other = replace(SETTINGS, extractor="another")
    with pytest.raises(DataError, match="has features of 'test', not of 'another'"):
        convert(more, out, other, options=OPTIONS, append="new", workers=HERE)
    made = convert(more, out, SETTINGS, options=OPTIONS, append="new", workers=HERE)
    assert made.images == 8 and made.schema.feature_type == "uint8" and verify(str(out)) == []


def test_a_copy_keeps_the_bytes(tmp_path: Path, make_records: MakeRecords) -> None:
    given = as_f32(make_records(9))
    settings, report = replace(SETTINGS, feature_type="uint8"), Report()
    build(given[:5], tmp_path / "a", settings, report=report)
    assert report.notes and report.notes[0].startswith("features as uint8 are off by")
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


MOST = np.finfo(np.float32).max


# A range that fp32 cannot hold, and one that it can, of values at its end.
@pytest.mark.parametrize("low", [-MOST, np.float32(3e37)])
def test_values_beyond_uint8(tmp_path: Path, make_records: MakeRecords, low: np.float32) -> None:
    """Refused, as they would be infinite when decoded; fp32 keeps them."""
    first = make_records(1)[0]
    n, width = first.features.shape
    values = np.tile(np.where(np.arange(width) % 2, MOST, low).astype(np.float32), (n, 1))
    record = replace(first, features=values)
    with pytest.raises(DataError, match=r"features beyond ±1.7e38, which uint8 cannot hold"):
        build([record], tmp_path / "a", replace(SETTINGS, feature_type="uint8"))
    assert not (tmp_path / "a/manifest.json").exists()
    with pytest.raises(ValueError, match=r"object 0 has .*: uint8 cannot hold values beyond"):
        checks.stored(values, "uint8")
    build([record], tmp_path / "b", replace(SETTINGS, feature_type="fp32"))
    (found,) = as_webdataset(str(tmp_path / "b"))
    np.testing.assert_array_equal(found["features"], values)


def test_the_largest_values_of_uint8() -> None:
    most = MOST / 2
    rows = np.array([[-most, most, 0], [most, most / 3, 1], [-most, -most, -most]], np.float32)
    assert checks.stored(rows, "uint8") is rows
    back = from_uint8(to_uint8(rows))
    assert np.isfinite(back).all()
    np.testing.assert_allclose(back, rows, rtol=0, atol=float(most) / 254)


def test_damaged_rows_of_uint8_are_found(tmp_path: Path, make_records: MakeRecords) -> None:
    """Bytes that a sha256 vouches for, but that decode to nothing: not a number, or beyond fp32."""
    first = make_records(1)[0]
    schema = build([first], tmp_path, replace(SETTINGS, feature_type="uint8")).schema
    good = to_uint8(first.features)
    check_record(replace(first, features=good), schema)
    for scale, least in ((np.nan, 0), (0, np.inf), (1e37, 0), (MOST / 300, MOST)):
        bad = good.copy()
        bad[-1, :HEAD] = np.array([scale, least], "<f4").view(np.uint8)
        bad[-1, HEAD:] = 255
        with pytest.raises(DataError, match="features that are not finite"):
            check_record(replace(first, features=bad), schema)


@pytest.mark.parametrize("kind", ["fp8", "FP32", None, ["fp32"]])
def test_an_unknown_type_is_refused(tmp_path: Path, make_records: MakeRecords, kind: str) -> None:
    """Though the fingerprint is that of the manifest, as another version might write it."""
    build(make_records(2), tmp_path, SETTINGS)
    path = tmp_path / "manifest.json"
    document = json.loads(path.read_bytes())
    del document["fingerprint"], document["folder"], document["checksum"]
    document["schema"]["feature_type"] = kind
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    document["fingerprint"] = hashlib.sha256(canonical.encode()).hexdigest()
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"feature_type is .*'fp16', 'fp32' or 'uint8'; build"):
        load_manifest(str(tmp_path))

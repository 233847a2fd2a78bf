"""WebDataset tars of others as a source: every way to write a record, and every way to break it."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np
import pytest
import webdataset

from cluster.cli.main import main
from shards.convert.convert import convert, records
from shards.convert.inputs import FeatureInput, Inputs
from shards.convert.pool import in_processes
from shards.errors import DataError
from shards.format.build import BuildSettings, build
from shards.format.manifest import load_manifest
from shards.format.record import ImageRecord, Report
from shards.format.verify import verify
from shards.sources import tars
from shards.sources.regions import Options
from shards.store import objects
from tests.conftest import MakeRecords

DIM = 6
OPTIONS = Options(feature_dim=DIM)


def npy(array: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, np.asarray(array), **options)
    return out.getvalue()


def npz(**arrays: Any) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


FEATURES = np.arange(3 * DIM, dtype=np.float32).reshape(3, DIM) / 8
BOXES = np.asarray([[0, 0, 1, 1], [0.5, 0.25, 0.75, 0.5], [0, 0, 0.5, 1]], dtype=np.float32)
META: dict[str, Any] = {"width": 200, "height": 100, "sentences": ["a red bus"]}
LABELS = {
    "object_id": [1, 2, 1599],
    "object_conf": [0.5, 0.25, 1.0],
    "attribute_id": [0, 399, 7],
    "attribute_conf": [0.125, 0.5, 0.75],
}


def sample(**changes: Any) -> dict[str, bytes]:
    """Members of a good sample, some of them replaced; None leaves one out."""
    members: dict[str, Any] = {
        "features.npy": npy(FEATURES),
        "boxes.npy": npy(BOXES),
        "json": json.dumps(META).encode(),
    }
    members |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in members.items() if value is not None}


def meta(**changes: Any) -> bytes:
    return json.dumps(META | changes).encode()


def write(path: Path, samples: list[dict[str, bytes]], names: str = "abcdef") -> Path:
    """A tar as webdataset writes it."""
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for key, members in zip(names, samples, strict=False):
            writer.write({"__key__": key, **members})
    return path


def read(
    *urls: object, report: Report | None = None, skip_bad: bool = False, **layout: Any
) -> list:
    given = settings(**layout)
    inputs = Inputs(tuple(FeatureInput(str(u), "webdataset", settings=given) for u in urls))
    return list(records(inputs, options=OPTIONS, skip_bad=skip_bad, report=report))


def settings(
    places: dict[str, str] | None = None, pixels: bool = False, labels: bool = True
) -> dict[str, str]:
    """Options of the format."""
    found = {part.replace("_", "-"): place for part, place in (places or {}).items()}
    found |= {"boxes-in": "pixels"} if pixels else {}
    return found | ({} if labels else {"labels": "no"})


def assert_good(record: ImageRecord, image: str = "a") -> None:
    assert (record.image, record.width, record.height) == (image, 200, 100)
    np.testing.assert_array_equal(record.boxes, BOXES)
    np.testing.assert_array_equal(record.features, FEATURES)
    assert record.boxes.dtype == np.float32
    assert [s.text for s in record.sentences] == ["a red bus"]
    assert record.sentences[0].source == "webdataset"


WAYS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"features__npy": npy(FEATURES.astype(np.float16))}, {}),
    ({"features__npy": npy(FEATURES.astype(np.float64))}, {}),
    ({"features__npy": None, "features__f16": FEATURES.astype("<f2").tobytes()}, {}),
    ({"features__npy": None, "features__f32": FEATURES.tobytes()}, {}),
    ({"features__npy": None, "npz": npz(features=FEATURES, other=[1])}, {}),
    ({"features__npy": None, "roi__npz": npz(x=FEATURES)}, {"features": "roi.npz"}),
    ({"features__npy": None, "f32": FEATURES.tobytes()}, {"features": "f32"}),
    ({"boxes__npy": None, "npz": npz(bbox=BOXES, x=[1])}, {"boxes": "npz:bbox"}),
    ({"boxes__npy": None, "boxes__f32": BOXES.tobytes()}, {}),
    ({"boxes__npy": None, "json": meta(boxes=BOXES.tolist())}, {}),
    ({"json": meta(caption="a red bus")}, {"sentences": "json:caption"}),
    ({"json": meta(sentences=None), "txt": b"a red bus\n\n"}, {}),
    ({"json": meta(sentences=[{"text": "a red bus"}])}, {}),
    ({"json": meta(image="a", height=100.0)}, {}),
    ({"json": b'"a red bus"', "size__json": meta()}, {
        "sentences": "json", "width": "size.json:width", "height": "size.json:height"
    }),
    ({"features__npy": None, "ROI__NPY": npy(FEATURES)}, {"features": "ROI.NPY"}),
    ({"features__npy": None, "ROI__npz": npz(X=FEATURES, y=[1])}, {"features": "Roi.NPZ:X"}),
    ({"jpg": b"not looked at", "cls": b"3"}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "places"), WAYS)
def test_ways_to_write_a_record(
    tmp_path: Path, changes: dict[str, Any], places: dict[str, str]
) -> None:
    (record,) = read(write(tmp_path / "a.tar", [sample(**changes)]), places=places)
    assert_good(record)
    assert record.labels is None and record.split is None


@pytest.mark.parametrize(
    "members",
    [
        {f"{name}__npy": npy(values) for name, values in LABELS.items()},
        {"json": meta(**LABELS)},
        {"npz": npz(**LABELS)},
    ],
)
def test_labels(tmp_path: Path, members: dict[str, Any]) -> None:
    tar = write(tmp_path / "a.tar", [sample(**members)])
    (record,) = read(tar)
    assert record.labels is not None
    for name, values in LABELS.items():
        np.testing.assert_array_equal(getattr(record.labels, name), values)
    (record,) = read(tar, labels=False)
    assert record.labels is None


def test_boxes_in_pixels(tmp_path: Path) -> None:
    pixels = BOXES * [200, 100, 200, 100]
    tar = write(tmp_path / "a.tar", [sample(boxes__npy=npy(pixels.astype(np.int64)))])
    assert_good(read(tar, pixels=True)[0])
    with pytest.raises(DataError, match=r"a.tar, a, boxes.npy: box 0 .* outside of 0..1.*boxes-in"):
        read(tar)
    tar = write(tmp_path / "b.tar", [sample()])
    with pytest.raises(DataError, match=r"b.tar, a, boxes.npy: all boxes lie in 0..1.*boxes-in="):
        read(tar, pixels=True)
    tiny = sample(json=meta(width=2, height=2))  # here a box may be a pixel
    assert read(write(tmp_path / "c.tar", [tiny]), pixels=True)[0].boxes.max() == 0.5


BAD: list[tuple[dict[str, Any], str]] = [
    ({"features__npy": None}, "a.tar, b: no features: it has no features.f16 or"),
    ({"boxes__npy": None}, "b: no boxes"),
    ({"json": meta(width=None)}, "b: no width: it has no json:width"),
    ({"json": meta(height=0)}, "b, json: the height is 0"),
    ({"json": meta(width="x")}, "b, json: the width is 'x'"),
    ({"json": b"{"}, "b, json: it cannot be read"),
    ({"json": b"[" * 100_000}, "b, json: it cannot be read"),
    ({"json": meta(sentences=7)}, "b, json: the sentences are 7"),
    ({"json": meta(sentences=[7])}, "b, json: sentence 0 is not an object"),
    ({"json": meta(sentences=[{"text": "x", "answers": {"y": 2}}])}, "sentence 0: the score"),
    ({"json": meta(image=[1])}, "b, json: the image is"),
    ({"features__npy": npy(FEATURES)[:-1]}, "b, features.npy: it cannot be read"),
    ({"features__npy": b"junk"}, "b, features.npy: it cannot be read"),
    ({"features__npy": npz(x=[1])}, "b, features.npy: it cannot be read"),
    ({"features__npy": npy([{}], allow_pickle=True)}, "b, features.npy: .*[Oo]bject arrays"),
    ({"features__npy": npy(["x"] * DIM)}, "b, features.npy: features are of type"),
    ({"features__npy": npy(FEATURES[:, 1:])}, r"b, features.npy: .*\(3, 5\).*--feature-dim"),
    ({"features__npy": npy(FEATURES[:2])}, "b, features.npy: 2 objects .* 3 boxes"),
    ({"features__npy": npy(FEATURES + np.inf)}, "b, features: object 0 has inf"),
    ({"features__npy": None, "features__f16": b"x" * 13}, "b, features.f16: it cannot be read"),
    ({"features__npy": None, "npz": npz(features=FEATURES)[:-40]}, "b, npz: it cannot be read"),
    ({"boxes__npy": npy(BOXES[:, :3])}, "b, boxes.npy: boxes have shape"),
    ({"boxes__npy": npy(BOXES[:0])}, "b, boxes.npy: the image has no objects.*--skip-bad"),
    ({"boxes__npy": None, "boxes__f32": b""}, "b, boxes.f32: the image has no objects"),
    ({"json": meta(image="a")}, "b: image 'a' is there already .*a.tar, a.*--skip-bad"),
    ({"boxes__npy": npy(BOXES[:, ::-1])}, "b, boxes.npy: box 0 .* not x1 y1 x2 y2"),
    ({"boxes__npy": npy(BOXES + np.nan)}, "b, boxes.npy: box 0"),
    ({"json": meta(object_id=[1, 2, 3])}, "b: no object_conf"),
    ({"json": meta(**LABELS | {"object_id": [1, 2]})}, "b, json: 2 of object_id, but 3 boxes"),
    ({"json": meta(**LABELS | {"object_id": [1, 2, 1600]})}, "b, json: ids run from 1 to 1600"),
    ({"json": meta(**LABELS | {"object_id": [1, 2, 2.5]})}, "b, json: the ids are not all"),
    ({"json": meta(**LABELS | {"attribute_conf": [0, 0, 9]})}, "b, json: a confidence"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_samples_are_named_by_tar_key_and_member(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    tar = write(tmp_path / "a.tar", [sample(), sample(**changes), sample()])
    with pytest.raises(DataError, match=message) as caught:
        read(tar)
    assert f"{tar}, b" in str(caught.value)
    report = Report()
    assert [r.image for r in read(tar, skip_bad=True, report=report)] == ["a", "c"]
    assert report.counts in ({"bad records": 1}, {"images that are there twice": 1})


def test_samples_without_a_sentence_are_left_out(tmp_path: Path) -> None:
    empty, none = (
        sample(json=meta(sentences=["", {"text": " "}])),
        sample(json=meta(sentences=None)),
    )
    report = Report()
    tar = write(tmp_path / "a.tar", [sample(json=meta(sentences=[])), empty, sample(), none])
    assert [r.image for r in read(tar, report=report)] == ["c"]
    assert report.counts == {"images without sentences": 3, "empty sentences": 2}


def test_an_archive_that_unpacks_to_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.sources.members._LARGEST", 1000)
    bomb = npz(features=np.zeros((3, 1000), dtype=np.float32))
    tar = write(tmp_path / "a.tar", [sample(features__npy=None, npz=bomb)])
    assert len(bomb) < 1000
    with pytest.raises(DataError, match=r"a, npz: .* unpacks to more than 1,000 bytes"):
        read(tar)
    monkeypatch.setattr("shards.sources.tars._LARGEST", 100)
    with pytest.raises(DataError, match=r"a: .* has .* bytes, or is no plain file"):
        read(tar)


def test_places_and_urls_that_make_no_sense(tmp_path: Path) -> None:
    for place in ("features.pt", "f16:x", "txt:x", "labels.bin", "labels.bin:x"):
        with pytest.raises(DataError, match="is no place"):
            read(tmp_path / "a.tar", places={"features": place})
    ran = tmp_path / "ran"
    for url in (f"pipe:touch {ran}", f"{{pipe:touch {ran},x.tar}}", "http://x/a.tar", "gs://x"):
        with pytest.raises(DataError, match="no place that tars are read from"):
            read(url)
    assert not ran.exists()
    with pytest.raises(DataError, match=r"cannot read .*none.tar"):
        read(tmp_path / "none.tar")


def test_patterns_of_too_many_tars(tmp_path: Path) -> None:
    for pattern, count in (
        ("{0..999999999}.tar", "1,000,000,000"),
        ("{0..9999999999..3}.tar", "3,333,333,334"),
        ("{{0..999}{0..999}{0..999},x}/{1,2}.tar", "2,000,000,002"),
        ("{a..z}{a..z}{a..z}{a..z}{a..z}.tar", "11,881,376"),
    ):
        with pytest.raises(DataError, match=f"stands for {count} tars"):
            tars.expand([pattern])
    for pattern in (
        "a.tar",
        "{000..009}.tar",
        "{9..0..3}{a,b{c..e},}.tar",
        "{x{0..3}}",
        r"\{0..999999999\}",
        "{a/{0..1999},b/{0..1999}}/{}.tar",
    ):
        assert len(tars.expand([pattern])) == tars._count(pattern) == _expanded(pattern)


def _expanded(pattern: str) -> int:
    return len(list(braceexpand.braceexpand(pattern)))


def test_what_can_be_no_tar_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in ("/dev/zero", tmp_path / "pipe"):
        with pytest.raises(DataError, match=f"^{place} is no plain file"):
            read(place)
    with pytest.raises(DataError, match=r"has no \.tar"):
        read(tmp_path)
    whole = small_tar(tmp_path / "a.tar")
    for module, program in ((gzip, "gunzip"), (bz2, "bunzip2"), (lzma, "unxz")):
        (tmp_path / "a.tar.z").write_bytes(module.compress(whole))
        with pytest.raises(DataError, match=rf"a.tar.z is compressed.*{program}"):
            read(tmp_path / "a.tar.z", skip_bad=True)


# --- tars ---------------------------------------------------------------------------------------


def small_tar(path: Path) -> bytes:
    return write(path, [sample(), sample()]).read_bytes()


def test_no_truncation_is_a_clean_end(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    whole = small_tar(tar)
    with tarfile.open(tar) as f:
        members = f.getmembers()
        end = max(m.offset_data + -(-m.size // 512) * 512 for m in members)
    # A sample is known to be whole when the next one's first header is.
    first = members[3].offset_data
    for cut in {*range(0, end + 512, 512), *range(100, end + 512, 250), end + 1, end + 511}:
        if cut >= end + 512:
            continue
        tar.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"a.tar: "):
            read(tar)
        report = Report()
        if cut < first:
            with pytest.raises(DataError, match="there is no image to build from"):
                read(tar, skip_bad=True, report=report)
        else:
            assert len(read(tar, skip_bad=True, report=report)) == 1 or cut >= end
        assert report.counts == {"bad records": 1}
    tar.write_bytes(whole[: end + 512])  # the end's second block says nothing new
    assert len(read(tar)) == 2


def test_damage_is_not_a_clean_end(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    whole = small_tar(tar)
    with tarfile.open(tar) as f:
        starts = [m.offset for m in f.getmembers()]
    for at in starts:
        for damaged in (
            whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
            whole[:at] + bytes(512) + whole[at + 512 :],
        ):
            tar.write_bytes(damaged)
            with pytest.raises(DataError, match="damaged"):
                read(tar)
    tar.write_bytes(whole + whole)  # what is after an end would be lost
    with pytest.raises(DataError, match="damaged"):
        read(tar)
    for other in (b"", b"text", b"\x1f\x8b" + bytes(2000)):
        tar.write_bytes(other)
        with pytest.raises(DataError, match="no plain tar"):
            read(tar)


def test_names_as_webdataset_groups_them(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"

    def put(f: tarfile.TarFile, name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.type = len(content), kind
        f.addfile(info, io.BytesIO(content))

    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as f:
        put(f, "__meta__/a.json", b"{}")
        put(f, "./set.x", b"", tarfile.DIRTYPE)
        for key in ("./set.x/a", "set.x/" + "b" * 120):
            for suffix, content in sample().items():
                put(f, f"{key}.{suffix.upper()}", content)
        put(f, "no-suffix", b"x")
    assert [r.image for r in read(path)] == ["set.x/a", "set.x/" + "b" * 120]
    expected = [s["__key__"] for s in webdataset.WebDataset(str(path), shardshuffle=False)]
    assert expected == ["./set.x/a", "set.x/" + "b" * 120]
    with tarfile.open(path, "w") as f:
        for suffix, content in sample().items():
            put(f, f"a.{suffix}", content)
        put(f, "a.json", b"{}")
    with pytest.raises(DataError, match="a: json is there twice"):
        read(path)
    with tarfile.open(path, "w") as f:
        put(f, "a.json", b"", tarfile.SYMTYPE)
    with pytest.raises(DataError, match="a: json has 0 bytes, or is no plain file"):
        read(path)


def test_many_tars_cost_no_descriptors(tmp_path: Path) -> None:
    for i in range(200):
        write(tmp_path / f"{i:03}.tar", [sample(json=meta(image=str(i)))])
    opened: list[int] = []
    inputs = Inputs((FeatureInput(f"{tmp_path}/{{000..199}}.tar"),))
    for i, record in enumerate(records(inputs, options=OPTIONS)):
        assert_good(record, str(i))
        opened.append(len(os.listdir("/proc/self/fd")))
    # Two at most, as the images of a pair may each be in one of their own.
    assert len(opened) == 200 and max(opened) == opened[1]


# --- our own ------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [False, True])
def test_our_own_tars_come_back_equal(
    tmp_path: Path, make_records: MakeRecords, labels: bool
) -> None:
    settings = BuildSettings("own", "test", images_per_shard=5)
    first = build(make_records(12, labels=labels), tmp_path / "first", settings)
    inputs = Inputs((FeatureInput(first.place(str(tmp_path / "first"))),))
    here, options = in_processes(1), Options(feature_dim=8)
    second = convert(inputs, tmp_path / "second", settings, options=options, workers=here)
    assert second == first and verify(tmp_path / "second") == []


def test_from_and_to_s3_by_the_command(
    tmp_path: Path, s3: str, make_records: MakeRecords, capsys: pytest.CaptureFixture[str]
) -> None:
    built = build(make_records(9), f"{s3}/own", BuildSettings("own", "test", images_per_shard=5))
    own = built.place(f"{s3}/own")
    room = tmp_path / "room"
    arguments = [
        *("shards", "build", "--features", f"{own}/shard-{{000000..000001}}.tar"),
        *("--feature-dim", "8", "--out", f"{s3}/again", "--name", "own", "--extractor", "test"),
        *("--images-per-shard", "5", "--staging", str(room)),
    ]
    assert main(arguments) == 0
    assert load_manifest(f"{s3}/again") == load_manifest(f"{s3}/own")
    assert not room.exists()
    cut = objects.read_bytes(f"{own}/shard-000001.tar")[:-10240]
    objects.write_bytes(f"{own}/shard-000001.tar", cut)
    capsys.readouterr()
    assert main([*arguments, "--overwrite"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {own}/shard-000001.tar: it is cut off")


def test_the_commands_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MILVLG's bottom-up-attention layout: one .npz an image, boxes in pixels; captions as text."""
    arrays = npz(x=FEATURES, bbox=BOXES * [200, 100, 200, 100], image_w=200, image_h=100)
    tar = write(tmp_path / "a.tar", [{"roi.npz": arrays, "txt": b"a red bus\ntwo buses"}] * 2)
    build_it: Callable[..., int] = lambda *more: main(  # noqa: E731
        [
            *("shards", "build", "--features", str(tar), "--out", str(tmp_path / "out")),
            *("--feature-dim", str(DIM), "--vocab-size", "200", "--quiet", "--workers", "1"),
            *("--feature-option", "boxes=roi.npz:bbox", "boxes-in=pixels", "source=coco_cap"),
            *("--feature-option", "width=roi.npz:image_w", "height=roi.npz:image_h", *more),
        ]
    )
    assert build_it() == 2
    assert f"error: {tar}, a: no features" in capsys.readouterr().err
    assert build_it("feature=roi.npz:x") == 2
    assert "--feature-option feature: the format webdataset of" in capsys.readouterr().err
    assert build_it("features=roi.npz:x") == 0
    manifest = load_manifest(str(tmp_path / "out"))
    assert (manifest.images, manifest.counts.sentences) == (2, {"coco_cap": 4})


def test_what_was_left_out_is_said_when_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = write(tmp_path / "a.tar", [sample(json=b"{"), sample(json=meta(sentences=[]))])
    arguments = [
        *("shards", "build", "--features", str(tar), "--out", str(tmp_path / "out")),
        *("--feature-dim", str(DIM), "--skip-bad", "--quiet"),
    ]
    assert main(arguments) == 2
    bad, empty, error = capsys.readouterr().err.splitlines()
    assert bad.startswith(f"left out: bad records: 1 (first: {tar}, a, json: it cannot be read")
    assert empty == "left out: images without sentences: 1 (first: b)"
    assert error.startswith("error: there is no image to build from")

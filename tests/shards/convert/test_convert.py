"""Users' files → a data set: the same bytes whoever makes the parts, whatever is killed."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from shards.convert.convert import convert, forecast, records
from shards.convert.inputs import FeatureInput, Inputs, SentenceInput
from shards.convert.pool import in_processes
from shards.errors import DataError
from shards.format.build import BuildSettings, build
from shards.format.clean import clean, leftovers
from shards.format.manifest import MANIFEST, load_manifest
from shards.format.record import Report
from shards.format.verify import verify
from shards.store import objects
from tests.conftest import contents, files_of, subprocess_environment
from tests.shards.convert.inputs import (
    OPTIONS,
    aggregated,
    make_row,
    tsv_bytes,
    write_inputs,
)

SETTINGS = BuildSettings("small", "test", vocab_size=200, images_per_shard=3)
HERE = in_processes(1)


def test_any_number_of_processes_makes_the_same_bytes(tmp_path: Path, s3: str) -> None:
    inputs = write_inputs(tmp_path / "in")
    one = convert(inputs, tmp_path / "one", SETTINGS, options=OPTIONS, workers=HERE)
    convert(inputs, tmp_path / "three", SETTINGS, options=OPTIONS, workers=in_processes(3))
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert [s.images for s in one.shards] == [3] * 6 + [2]
    assert verify(str(tmp_path / "one")) == []
    far = f"{s3}/{tmp_path.name}"
    convert(inputs, far, SETTINGS, options=OPTIONS, workers=HERE)
    there = {
        o.name.rpartition("/")[2]: hashlib.sha256(objects.read_bytes(f"{far}/{o.name}")).hexdigest()
        for o in objects.list_tree(far)
    }
    there.pop(MANIFEST)
    near = contents(tmp_path / "one")
    assert near.pop("fingerprint") == load_manifest(far).fingerprint and there == near


def test_it_is_what_a_build_of_the_same_records_is(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in")
    made = convert(inputs, tmp_path / "one", SETTINGS, options=OPTIONS, workers=HERE)
    same = build(records(inputs, options=OPTIONS), tmp_path / "two", SETTINGS)
    assert made.fingerprint == same.fingerprint
    assert made.sources == ("coco_cap", "vqa") and made.question_sources == ("vqa",)


# --- killed, damaged, cleaned, two at once ------------------------------------------------------

_SCRIPT = """
import sys
from cluster.cli.main import main
if __name__ == "__main__":
    sys.exit(main())
"""


def command(folder: Path, *more: str) -> list[str]:
    (folder / "run.py").write_text(_SCRIPT)
    return [
        *(sys.executable, str(folder / "run.py"), "shards", "build", "--quiet"),
        *("--features", str(folder / "in/features.tsv"), "--feature-dim", "6"),
        *("--sentences", str(folder / "in/sentences.json"), "--images-per-shard", "1"),
        *("--workers", "2", "--vocab-size", "200", "--name", "set", *more),
    ]


def test_a_killed_build_goes_on_with_what_is_whole(tmp_path: Path) -> None:
    write_inputs(tmp_path / "in", 250)
    line = command(tmp_path, "--out", str(tmp_path / "out"))
    process = subprocess.Popen(line, env=subprocess_environment(), start_new_session=True)
    while len(list(tmp_path.glob("out/build-*/*.part.json"))) < 4:
        assert process.poll() is None, "it has ended before it could be killed"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / MANIFEST).exists()
    receipts = sorted(tmp_path.glob("out/build-*/*.part.json"))
    whole = [p.with_name(p.name.replace(".part.json", ".tar")) for p in receipts]
    before = {p: p.stat().st_ino for p in whole}
    damaged, torn = whole[0], receipts[1]
    data = bytearray(damaged.read_bytes())
    data[700] ^= 1
    damaged.write_bytes(data)
    torn.write_bytes(torn.read_bytes()[:-20])

    subprocess.run(line, env=subprocess_environment(), check=True, capture_output=True)
    kept = [p for p in whole[2:] if p.stat().st_ino == before[p]]
    assert kept == whole[2:], "what was whole is made again"
    shutil.rmtree(tmp_path / "again", ignore_errors=True)
    subprocess.run(
        command(tmp_path, "--out", str(tmp_path / "again")),
        env=subprocess_environment(),
        check=True,
        capture_output=True,
    )
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    assert verify(str(tmp_path / "out")) == []


def test_a_build_that_is_killed_anywhere_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    """At each flush and each renaming of a build, before it is done. Past the manifest's the set is
    there; what else is left then, and of a manifest's own writing, can be cleaned away."""
    inputs, settings = write_inputs(tmp_path / "in"), replace(SETTINGS, images_per_shard=10)

    def made(name: str) -> dict[str, str]:
        convert(inputs, tmp_path / name, settings, options=OPTIONS, workers=HERE)
        return contents(tmp_path / name)

    expected = made("alone")
    for place in itertools.count():
        out = tmp_path / f"at {place}"
        if not killed_at(place, partial(made, out.name)):
            break
        if not (out / MANIFEST).exists():
            assert made(out.name) == expected, place
        if (found := leftovers(str(out))).objects:
            clean(str(out), found)
        assert contents(out) == expected, place
        files = {p.name for p in out.iterdir()} - {files_of(out).name}
        assert files - {f".{MANIFEST}.lock"} == {MANIFEST}, place
    assert place > 10


def killed_at(place: int, act: Callable[[], object]) -> bool:
    """Whether a process that is to be killed at its flush or renaming of that number was."""
    if (child := os.fork()) == 0:
        left = itertools.count(place, -1)

        def or_die(do: Callable[..., None]) -> Callable[..., None]:
            def doing(*given: object, **named: object) -> None:
                if next(left) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                do(*given, **named)

            return doing

        os.fsync, os.replace = or_die(os.fsync), or_die(os.replace)
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


def test_a_cleaned_place_gets_a_folder_of_another_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What a cleaning has on its list must not be what a later build writes."""
    inputs, out = write_inputs(tmp_path / "in"), tmp_path / "out"
    rows = [make_row(f"img-{i:04d}", n=1) for i in range(19)] + [make_row("img-0019", boxes="!")]
    write_inputs(tmp_path / "in", rows=rows)
    with pytest.raises(DataError, match="line 20, column boxes: damaged base64"):
        convert(inputs, out, SETTINGS, options=OPTIONS, workers=HERE)
    assert "6 of 7 shards are whole" in caplog.text
    [left] = out.glob("build-*")
    assert len(list(left.glob("*.tar"))) == 6, "whole shards stay for the same command to go on"
    found = leftovers(str(out))
    assert {o.name.partition("/")[0] for o in found.objects} == {left.name}
    clean(str(out), found)
    skipping = replace(SETTINGS, skip_bad=True)
    report = Report()
    made = convert(inputs, out, skipping, options=OPTIONS, workers=HERE, report=report)
    assert made.folder != left.name and made.images == 19
    assert list(report.counts.items()) == [("bad records", 1)]
    assert verify(str(out)) == []


def test_a_replaced_data_set_has_another_folder(tmp_path: Path) -> None:
    inputs, out = write_inputs(tmp_path / "in"), tmp_path / "out"
    first = convert(inputs, out, SETTINGS, options=OPTIONS, workers=HERE)
    with pytest.raises(DataError, match="there is a data set"):
        convert(inputs, out, SETTINGS, options=OPTIONS, workers=HERE)
    over = replace(SETTINGS, overwrite=True)
    second = convert(inputs, out, over, options=OPTIONS, workers=HERE)
    assert second.fingerprint == first.fingerprint and second.folder != first.folder
    assert (out / first.folder).is_dir(), "readers go on with it"


def test_two_at_once_make_one_data_set(tmp_path: Path) -> None:
    write_inputs(tmp_path / "in", 60)
    line = command(tmp_path, "--out", str(tmp_path / "out"))
    two = [
        subprocess.Popen(line, env=subprocess_environment(), stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [p.communicate()[1] for p in two]
    status = sorted(p.returncode for p in two)
    assert status in ([0, 0], [0, 2]), said
    # The second finds a data set, or commits the very bytes that are there.
    assert status == [0, 0] or any("there is a data set" in s for s in said)
    assert verify(str(tmp_path / "out")) == []
    assert not list(tmp_path.glob("out/build-*/*.part.json"))


# --- what is left out ---------------------------------------------------------------------------


def test_what_a_build_finds_before_it_reads_any_array(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    cases = [
        ([make_row("img-0000"), make_row("img-0000")], "line 2: image 'img-0000' is there already"),
        ([make_row("img-0000")], "1 images have sentences, but no features .first: img-0001"),
        ([make_row("img-0000"), make_row("img-0001")[:7]], "line 2, column num_boxes: it is miss"),
        ([make_row("img-0000"), make_row("img-0001", num_boxes="x")], "'x' is no positive integer"),
    ]
    for rows, message in cases:
        inputs = write_inputs(folder, 2, rows=rows)
        with pytest.raises(DataError, match=message):
            convert(inputs, tmp_path / "out", SETTINGS, options=OPTIONS, workers=HERE)
        assert not list(tmp_path.glob("out/*")), "nothing is left of a build that has made nothing"
    inputs = write_inputs(folder, 3, rows=[make_row(n) for n in ("a", "img-0001", "img-0001")])
    report = Report()
    settings = replace(SETTINGS, skip_bad=True)
    made = convert(inputs, tmp_path / "out", settings, options=OPTIONS, workers=HERE, report=report)
    assert made.images == 1
    assert report.counts == {
        "images that are there twice": 1,
        "images with sentences but without features": 2,
        "images without sentences": 1,
    }


def test_names_of_one_image_in_several_files_meet(tmp_path: Path) -> None:
    (tmp_path / "f.tsv").write_bytes(tsv_bytes([make_row("318556"), make_row("000000000009")]))
    (tmp_path / "s.json").write_text(
        aggregated(["COCO_train2014_000000318556", "COCO_val2014_000000000009"])
    )
    features = FeatureInput(str(tmp_path / "f.tsv"), numbers="coco")
    inputs = Inputs((features,), (SentenceInput((tmp_path / "s.json",)),))
    found = list(records(inputs, options=OPTIONS))
    assert [r.image for r in found] == ["318556", "000000000009"]
    assert [r.sentences[0].text[-6:] for r in found] == ["318556", "000009"]
    with pytest.raises(DataError, match="first: coco/318556"):
        list(records(replace(inputs, features=(replace(features, numbers=None),)), options=OPTIONS))


def test_sentences_that_make_no_sense(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in", 2)
    (given,) = inputs.sentences
    twice = replace(inputs, sentences=(replace(given, files=given.files * 2),))
    with pytest.raises(DataError, match="a file is named twice"):
        list(records(twice, options=OPTIONS))
    text = given.files[0].read_text().replace("a thing on", "\\ud800 on")
    given.files[0].write_text(text)
    with pytest.raises(DataError, match="image 'img-0000' has text that is not valid Unicode"):
        list(records(inputs, options=OPTIONS))


def test_images_of_visual_genome_that_are_cocos(tmp_path: Path) -> None:
    """Both collections have features of such an image, and sentences: they are one record."""
    (tmp_path / "coco.tsv").write_bytes(tsv_bytes([make_row("COCO_val2014_000000000009")]))
    (tmp_path / "vg.tsv").write_bytes(tsv_bytes([make_row("71"), make_row("72")]))
    regions = [{"id": i, "regions": [{"phrase": f"region of {i}"}]} for i in (71, 72)]
    (tmp_path / "regions.json").write_text(json.dumps(regions))
    (tmp_path / "s.json").write_text(aggregated(["COCO_val2014_000000000009"]))
    images = [{"image_id": 71, "coco_id": 9}, {"image_id": 72, "coco_id": None}]
    (tmp_path / "image_data.json").write_text(json.dumps(images))
    inputs = Inputs(
        (
            FeatureInput(str(tmp_path / "coco.tsv")),
            FeatureInput(str(tmp_path / "vg.tsv"), numbers="vg"),
        ),
        (SentenceInput((tmp_path / "s.json",)), SentenceInput((tmp_path / "regions.json",))),
        vg_images=tmp_path / "image_data.json",
    )
    report = Report()
    one, other = records(inputs, options=OPTIONS, report=report)
    assert (one.image, other.image) == ("COCO_val2014_000000000009", "72")
    assert [s.text for s in one.sentences][-1] == "region of 71" and len(one.sentences) == 4
    assert report.counts == {"images of Visual Genome and of COCO": 1}
    out = replace(inputs, exclude={"test": frozenset({"vg/71"})})
    assert [r.image for r in records(out, options=OPTIONS)] == ["72"]


def test_images_that_stay_out(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in", 6)
    excluded = replace(inputs, exclude={"test": frozenset({"img-0001", "elsewhere"})})
    report = Report()
    found = [r.image for r in records(excluded, options=OPTIONS, report=report)]
    assert found == [f"img-000{i}" for i in (0, 2, 3, 4, 5)]
    assert report.counts == {"images left out: test": 1}
    only = replace(inputs, only=frozenset({"img-0004"}))
    assert [r.image for r in records(only, options=OPTIONS)] == ["img-0004"]


# --- append -------------------------------------------------------------------------------------


def test_append(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = convert(write_inputs(tmp_path / "a", 7), out, SETTINGS, options=OPTIONS, workers=HERE)
    old = contents(out)
    more = write_inputs(tmp_path / "b", 6, first=5)
    with pytest.raises(DataError, match="has image 'img-0005' already"):
        convert(more, out, SETTINGS, options=OPTIONS, append="new", workers=HERE)
    report = Report()
    made = convert(
        more, out, SETTINGS, options=OPTIONS, append="missing", workers=HERE, report=report
    )
    assert made == load_manifest(str(out))
    assert report.counts == {"images that the data set has already": 2}
    again = convert(more, out, SETTINGS, options=OPTIONS, append="missing", workers=HERE)
    assert again == made, "there is nothing to add"
    assert made.images == 11 and [s.images for s in made.shards] == [3, 3, 1, 3, 1]
    assert verify(str(out)) == []
    assert old.pop("fingerprint") == first.fingerprint != made.fingerprint
    assert contents(out).items() >= old.items(), "nothing that was there has changed"
    other = write_inputs(tmp_path / "c", 1, first=50)
    texts = [{"img_id": "img-0050", "sentf": {"new": ["a thing"]}}]
    (tmp_path / "c/sentences.json").write_text(json.dumps(texts))
    with pytest.raises(DataError, match="the data set has no sentences of 'new'"):
        convert(other, out, SETTINGS, options=OPTIONS, append="new", workers=HERE)
    with pytest.raises(DataError, match="there is no data set"):
        convert(more, tmp_path / "no", SETTINGS, options=OPTIONS, append="new", workers=HERE)


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in")
    found = forecast(inputs, SETTINGS, options=OPTIONS, report=Report())
    made = convert(inputs, tmp_path / "out", SETTINGS, options=OPTIONS, workers=HERE)
    assert (found.images, found.pairs, found.shards) == (20, 60, 7)
    assert found.pairs_per_source == made.counts.sentences
    size = sum(p.stat().st_size for p in files_of(tmp_path / "out").glob("*.tar"))
    assert 0.7 * size < found.bytes < 1.3 * size
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out"}

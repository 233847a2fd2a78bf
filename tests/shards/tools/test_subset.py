"""Subsets and splits are what builds of their records are."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from shards.errors import DataError
from shards.format.build import build
from shards.format.clean import leftovers
from shards.format.manifest import MANIFEST, Manifest, load_manifest
from shards.format.record import ImageRecord, Report
from shards.format.verify import verify
from shards.progress import Progress
from shards.store import objects
from shards.tools.filters import Filter
from shards.tools.rewriting import Rewriting, SetWriter
from shards.tools.subset import Choice, Dealing, split, subset, subset_amount
from tests.conftest import contents, files_of
from tests.shards.tools.sets import SETTINGS, run, with_splits, with_words_of

HOW = Rewriting("part", images_per_shard=4)


@pytest.fixture(scope="module")
def records() -> list[ImageRecord]:
    return with_splits(14)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, records: list[ImageRecord]) -> Path:
    place = tmp_path_factory.mktemp("data") / "whole"
    build(records, place, SETTINGS)
    return place


def of_sources(record: ImageRecord, *sources: str) -> ImageRecord:
    return replace(record, sentences=tuple(s for s in record.sentences if s.source in sources))


IDS = frozenset(f"pictures/image {i}.png" for i in (1, 2, 9, 13))


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        (Choice(), lambda r: r),
        (Choice(Filter(images=IDS)), lambda r: r if r.image in IDS else None),
        (Choice(Filter(exclude=IDS)), lambda r: None if r.image in IDS else r),
        (Choice(Filter(sources=frozenset({"vqa"}))), lambda r: of_sources(r, "vqa")),
        (Choice(Filter(sources=frozenset({"coco_cap"}))), lambda r: of_sources(r, "coco_cap")),
        (Choice(Filter(split="val")), lambda r: r if r.split == "val" else None),
    ],
    ids=["all", "images", "exclude", "vqa", "captions", "split"],
)
def test_a_subset_is_a_build_of_its_records(
    data: Path, records: list[ImageRecord], tmp_path: Path, choice: Choice, kept: object
) -> None:
    made = subset(str(data), str(tmp_path / "part"), choice, HOW)
    left = [k for r in records if (k := kept(r)) and k.sentences]
    build(left, tmp_path / "built", with_words_of(data, name="part"))
    assert contents(tmp_path / "part") == contents(tmp_path / "built")
    assert made == load_manifest(str(tmp_path / "part")) and verify(tmp_path / "part") == []
    amount = subset_amount(str(data), choice)
    assert (amount.images, amount.pairs) == (made.images, made.pairs)


def test_a_sample_is_drawn_by_its_seed(data: Path, tmp_path: Path) -> None:
    def images(name: str, choice: Choice) -> list[str]:
        place = tmp_path / name
        subset(str(data), str(place), choice, HOW)
        assert verify(place) == []
        return _images(place)

    first = images("a", Choice(sample=5, seed=1))
    assert len(set(first)) == 5 and first == images("b", Choice(sample=5, seed=1))
    assert first != images("c", Choice(sample=5, seed=2))
    train = Filter(split="train")
    every = images("d", Choice(train, sample=10))
    assert every == images("e", Choice(train))
    assert images("f", Choice(train, limit=3)) == every[:3]
    with pytest.raises(DataError, match="has 10 images to draw from, and 11 are asked for"):
        subset(str(data), str(tmp_path / "g"), Choice(train, sample=11), HOW)
    assert not (tmp_path / "g").exists()
    amount = subset_amount(str(data), Choice(train, sample=4))
    assert amount.images == 4 and amount.pairs >= 4


def _images(place: Path) -> list[str]:
    """The ids of all records, by Python's tarfile."""
    out = []
    for path in sorted(files_of(place).glob("*.tar")):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                if name.endswith(".json"):
                    out.append(json.loads(tar.extractfile(name).read())["image"])
    return out


def test_what_is_not_there_is_named(data: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(DataError, match=r"no sentences of 'gqa': it has coco_cap, vqa"):
        subset(str(data), out, Choice(Filter(sources=frozenset({"gqa"}))), HOW)
    with pytest.raises(DataError, match=r"of split 'test': it has train, val"):
        subset(str(data), out, Choice(Filter(split="test")), HOW)
    with pytest.raises(DataError, match=r"no image is left"):
        subset(str(data), out, Choice(Filter(images=frozenset({"x"}))), HOW)
    report = Report()
    ids = frozenset({"x", "y", "pictures/image 3.png"})
    subset(str(data), out, Choice(Filter(images=ids)), HOW, report=report)
    assert report.counts == {"images: ids that no image of the data set has": 2}
    with pytest.raises(DataError, match=r"there is a data set at .*--overwrite"):
        subset(str(data), out, Choice(), HOW)
    # In its own place: what it reads stays until it is cleaned.
    subset(out, out, Choice(limit=1), HOW, overwrite=True)
    assert verify(out) == [] and load_manifest(out).images == 1


def test_damage_ends_it_and_leaves_nothing(
    data: Path, records: list[ImageRecord], tmp_path: Path
) -> None:
    build(records, tmp_path / "whole", SETTINGS)
    tar = sorted(files_of(tmp_path / "whole").glob("*.tar"))[2]
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 4
    tar.write_bytes(content)
    with pytest.raises(DataError, match=rf"{tar.name} is damaged \(sha256 .*restore it"):
        subset(str(tmp_path / "whole"), str(tmp_path / "out"), Choice(), HOW)
    assert not (tmp_path / "out").exists()
    tar.write_bytes(content[:-1024])
    with pytest.raises(DataError, match=rf"{tar.name} is damaged \(\d+ bytes instead of"):
        split(
            str(tmp_path / "whole"),
            [str(tmp_path / "a"), str(tmp_path / "b")],
            Dealing((1, 1)),
            [HOW, HOW],
        )
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_a_split_deals_every_record_once(
    data: Path, records: list[ImageRecord], tmp_path: Path
) -> None:
    outs = [str(tmp_path / name) for name in "abc"]
    made = split(str(data), outs, Dealing((2, 1, 1), seed=3), [HOW] * 3)
    whole = load_manifest(str(data))
    assert sum(m.images for m in made) == whole.images
    assert sum(m.pairs for m in made) == whole.pairs
    assert {m.vocab.sha256 for m in made} == {whole.vocab.sha256}
    found = [_images(Path(out)) for out in outs]
    assert sorted(image for images in found for image in images) == sorted(r.image for r in records)
    for out, images in zip(outs, found, strict=True):
        assert verify(out) == []
        of_part = [r for r in records if r.image in images]
        build(of_part, f"{out}-built", with_words_of(data, name="part"))
        assert contents(Path(out)) == contents(Path(f"{out}-built"))
    # An image's part follows from its id: of fewer images each goes to the same.
    subset(str(data), str(tmp_path / "few"), Choice(limit=9), HOW)
    again = [str(tmp_path / f"{name}2") for name in "abc"]
    split(str(tmp_path / "few"), again, Dealing((2, 1, 1), seed=3), [HOW] * 3)
    for before, after in zip(found, again, strict=True):
        assert set(_images(Path(after))) <= set(before)


def test_a_part_that_another_build_comes_before(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    finish = SetWriter.finish

    def late(self: SetWriter, progress: Progress) -> Manifest:
        if self.build.out == two:
            build(with_splits(3), two, SETTINGS)
        return finish(self, progress)

    monkeypatch.setattr(SetWriter, "finish", late)
    with pytest.raises(DataError, match=rf"finished at {two} meanwhile.*; {one} is whole"):
        split(str(data), [one, two], Dealing((1, 1)), [HOW, HOW])
    assert verify(one) == [] == verify(two) and load_manifest(two).images == 3
    assert not leftovers(one).objects and not leftovers(two).objects


def test_the_commands(
    data: Path, tmp_path: Path, s3: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_bytes(b"pictures/image 3.png\r\n\npictures/image 5.png\nnone such")
    out, rest = f"{s3}/{tmp_path.name}/few", str(tmp_path / "rest")
    line = (data, "--out", out, "--out", rest, "--images", ids, "--json", "--quiet")
    assert run("split", *line, "--dry-run") == 0
    assert [p["images"] for p in json.loads(capsys.readouterr().out)["parts"]] == [2, 12]
    assert not objects.exists(f"{out}/{MANIFEST}") and not Path(rest).exists()
    assert run("split", *line) == 0
    told = json.loads(capsys.readouterr().out)
    assert [p["images"] for p in told["parts"]] == [2, 12] and sum(told["left_out"].values()) == 1
    assert verify(out) == [] and verify(rest) == []
    assert run("subset", out, "--out", f"{out}-vqa", "--sources", "vqa", "--quiet") == 0
    assert "2 images, 2 pairs" in capsys.readouterr().out
    assert load_manifest(f"{out}-vqa").sources == ("vqa",) and verify(f"{out}-vqa") == []
    assert run("subset", out, "--out", rest, "--limit", 1, "--dry-run", "--quiet") == 0
    assert "1 images" in capsys.readouterr().out and load_manifest(rest).images == 12
    for wrong in (["--by", "1"], ["--by", "1", "nan"], ["--by", "1", "0"]):
        with pytest.raises(DataError, match=r"places for 1 parts|give numbers above 0"):
            run("split", data, "--out", tmp_path / "x", "--out", tmp_path / "y", *wrong)
    with pytest.raises(DataError, match="the same --out"):
        run("split", data, "--out", tmp_path / "x", "--out", tmp_path / "x", "--by", "1", "1")

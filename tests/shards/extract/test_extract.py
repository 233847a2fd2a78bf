"""Pictures to features: partitions, kills, failures, and pictures of all kinds."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.errors import DataError
from shards.extract import folder as of_folder
from shards.extract.boxes import Boxes
from shards.extract.extract import Extraction, extract
from tests.conftest import subprocess_environment
from tests.shards.extract.runs import failures, regions, run

GRID = ("--grid", 1, "--feature-dim", 512)


def test_partitions_together_are_all(tmp_path: Path, pictures: Path) -> None:
    for i in range(1, 4):
        assert run(pictures, *GRID, "--partition", f"{i}/3", "--out", tmp_path / "f") == 0
    assert len(list((tmp_path / "f").glob("*.tar"))) == 3
    assert len(regions(tmp_path / "f", 512)) == 9


def test_what_is_next_follows_from_what_is_there(
    tmp_path: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With more pictures, another number of partitions, and without a tar: each picture once."""
    monkeypatch.setattr(of_folder, "IN_TAR", 3)
    arguments = (pictures, *GRID, "--out", tmp_path / "f")
    assert run(*arguments, "--partition", "1/2") == 0
    Image.new("RGB", (9, 9)).save(pictures / "0000.png")  # it comes before all others
    assert run(*arguments, "--dry-run", "--json") == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["pictures"] + said["there"] == 10 and 0 < said["there"] < 9
    assert run(*arguments, "--json") == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["pictures"], said["failed"]) == (10, 0) and said["tars"]
    assert len(regions(tmp_path / "f", 512)) == 10
    tar = sorted((tmp_path / "f").glob("*.tar"))[0]
    before = tar.read_bytes()
    tar.unlink()
    assert run(*arguments) == 0 and tar.read_bytes() == before
    assert len(regions(tmp_path / "f", 512)) == 10
    tar.write_bytes(before[: len(before) // 3])
    assert run(*arguments) == 2
    assert f"{tar.name}: it is" in capsys.readouterr().err


def test_two_runs_of_one_partition(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The later finds the other's tar, and does not replace it; another width is refused."""
    tar = tmp_path / "f/regions-0001-of-0001-000000.tar"

    def describe(
        opened: Sequence[tuple[str, Image.Image]],
    ) -> list[tuple[Boxes, np.ndarray] | str]:
        tar.write_bytes(b"the other's")
        return ["no" for _ in opened]

    with pytest.raises(DataError, match=r"another run has written regions-.*tar meanwhile"):
        extract(Extraction(pictures, tmp_path / "f", {"features": "mine"}), describe)
    assert tar.read_bytes() == b"the other's"
    assert not list((tmp_path / "f").glob(".*.tmp"))
    tar.unlink()
    (tmp_path / "f/extract.json").unlink()
    assert run(pictures, *GRID, "--out", tmp_path / "f") == 0
    assert run(pictures, *GRID[:-1], 600, "--out", tmp_path / "f") == 2
    assert "the regions there were made otherwise" in capsys.readouterr().err


_SCRIPT = """
import sys
import shards.extract.folder
from cluster.cli.main import main
shards.extract.folder.IN_TAR = 3
if __name__ == "__main__":
    sys.exit(main())
"""


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(60):
        Image.new("RGB", (300, 300), (i, 0, 0)).save(folder / f"{i:02}.png")
    (tmp_path / "run.py").write_text(_SCRIPT)
    line = [sys.executable, str(tmp_path / "run.py"), "shards", "extract", str(folder)]
    line += ["--grid", "36", "--feature-dim", "512", "--quiet", "--out"]
    out = tmp_path / "f"
    process = subprocess.Popen([*line, str(out)], env=subprocess_environment())
    while len(list(out.glob("*.tar"))) < 2:
        assert process.poll() is None, "it has ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = {p: p.stat().st_ino for p in out.glob("*.tar")}
    half = out / ".regions-0001-of-0001-000002.tar.0123abcd.tmp"  # as a kill may leave one
    half.write_bytes(b"half")
    os.utime(half, (0, 0))
    monkeypatch.setattr(of_folder, "IN_TAR", 3)
    for place in (out, tmp_path / "again"):
        assert run(*line[4:-2], "--out", place) == 0
    assert not half.exists(), "what a killed run left goes after a while"
    assert {p: p.stat().st_ino for p in whole} == whole, "what was whole is made again"
    tars = sorted(p.name for p in out.glob("*.tar"))
    assert len(tars) == 20 and all(
        (out / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in tars
    )


def test_failures_are_listed_and_tried_again(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (pictures / "3.png").read_bytes()
    (pictures / "3.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "4.png").write_bytes(b"no picture")
    arguments = (pictures, *GRID, "--out", tmp_path / "f")
    assert run(*arguments) == 1 == run(*arguments), "they are failures still"
    assert list(failures(tmp_path / "f")) == ["3.png", "4.png"]
    assert run(*arguments, "--retry-failed", "--partition", "1/4") == 2
    assert "--partition I/1" in capsys.readouterr().err
    assert run(*arguments, "--retry-failed") == 1, "nothing is mended"
    (pictures / "3.png").write_bytes(whole)
    assert run(*arguments, "--retry-failed") == 1
    assert list(failures(tmp_path / "f")) == ["4.png"]
    Image.new("L", (5, 5)).save(pictures / "4.png")
    assert run(*arguments, "--retry-failed") == 0 and not failures(tmp_path / "f")
    assert run(*arguments, "--retry-failed") == 0 == run(*arguments)
    assert len(regions(tmp_path / "f", 512)) == 9, "each once"


def test_a_list_of_failures_opens_no_other_files(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only pictures of the folder; and a list that is damaged is said to be."""
    Image.new("RGB", (5, 5)).save(tmp_path / "secret.png")
    (pictures / "4.png").write_bytes(b"no picture")
    arguments = (pictures, *GRID, "--out", tmp_path / "f")
    assert run(*arguments) == 1
    (listed,) = (tmp_path / "f").glob("*.failures.jsonl")
    with listed.open("a") as f:
        for name in ("../secret.png", str(tmp_path / "secret.png")):
            f.write(json.dumps({"image": name, "reason": "x"}) + "\n")
    assert run(*arguments, "--retry-failed") == 1
    assert len(regions(tmp_path / "f", 512)) == 8
    for text in ("[3]\n", '{"image": 3}\n', '{"image', "\x00"):
        listed.write_text(text)
        assert run(*arguments, "--retry-failed") == 2
        assert "is damaged" in capsys.readouterr().err


def test_pictures_of_which_none_is_good(tmp_path: Path) -> None:
    """A tar is there all the same: that is how the list counts."""
    (tmp_path / "p").mkdir()
    (tmp_path / "p/1.png").write_bytes(b"")
    arguments = (tmp_path / "p", *GRID, "--out", tmp_path / "f")
    assert run(*arguments) == 1 and regions(tmp_path / "f", 512) == {}
    Image.new("RGB", (5, 5)).save(tmp_path / "p/1.png")
    assert run(*arguments) == 1, "only when asked to"
    assert run(*arguments, "--retry-failed") == 0
    assert list(regions(tmp_path / "f", 512)) == ["1.png"]


def test_pictures_of_any_kind(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for mode, end in (
        ("CMYK", "jpg"),
        ("P", "png"),
        ("I;16", "png"),
        ("RGBA", "png"),
        ("1", "bmp"),
    ):
        Image.new(mode, (7, 5)).save(folder / f"{mode.replace(';', '')}.{end}")
    turned = Image.new("RGB", (8, 4))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be shown turned; COCO's boxes are of the pixels as they are stored
    turned.save(folder / "turned.jpg", exif=exif)
    os.symlink(folder / "P.png", folder / "link.png")
    Image.new("I;16", (7, 5), 30_000).save(folder / "deep.png")
    Image.new("L", (7, 5), 30_000 >> 8).save(folder / "shallow.png")
    assert run(folder, *GRID, "--out", tmp_path / "f") == 0
    found = regions(tmp_path / "f", 512)
    assert len(found) == 9 and (found["turned.jpg"].width, found["turned.jpg"].height) == (8, 4)
    np.testing.assert_array_equal(found["deep.png"].features, found["shallow.png"].features)


def png(width: int, height: int) -> bytes:
    """A picture that says to be so large, and ends there."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, b"IDAT" + zlib.compress(b""), b"IEND")
    )


def test_pictures_that_are_none(tmp_path: Path) -> None:
    """Each is a failure with its reason, and the others are done."""
    folder = tmp_path / "pictures"
    (folder / "folder.png").mkdir(parents=True)
    rng = np.random.default_rng(0)
    good = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    good.save(folder / "a..b ünï ☃.jpg")
    whole = (folder / "a..b ünï ☃.jpg").read_bytes()
    bad: dict[str, tuple[bytes, str]] = {
        "bomb.png": (png(60_000, 60_000), "decompression bomb"),
        "cut.jpg": (whole[: len(whole) // 2], "cannot read the picture"),
        "empty.png": (b"", "cannot identify"),
        "zero.png": (png(0, 5), "cannot"),
    }
    for name, (content, _) in bad.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.png")
    os.symlink("/nowhere", folder / "link.png")
    Path(os.fsdecode(os.fsencode(folder) + b"/bad\xff.png")).write_bytes(whole)
    assert run(folder, *GRID, "--out", tmp_path / "f") == 1
    assert list(regions(tmp_path / "f", 512)) == ["a..b ünï ☃.jpg"]
    failed = failures(tmp_path / "f")
    due = {name: reason for name, (_, reason) in bad.items()}
    due |= {"pipe.png": "no file", "link.png": "no file", "bad\udcff.png": "is no UTF-8"}
    assert sorted(failed) == sorted(due)
    for name, reason in due.items():
        assert reason in failed[name]
    assert run(folder, *GRID, "--out", tmp_path / "f", "--retry-failed") == 1
    assert failures(tmp_path / "f") == failed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "say where regions are"),
        (("--detector", "x", "--backbone", "y"), "give --detector or --backbone"),
        (("--detector", "x", "--min-boxes", "50"), "--min-boxes 50 is more"),
        (("--detector", "/nowhere"), "cannot load the detector /nowhere"),
        (("--boxes", "/nowhere"), "cannot read /nowhere"),
        (("--grid", "7"), "there is no grid of 7 boxes"),
        (("--grid", "1", "--partition", "3/2"), "is not I/N"),
    ],
)
def test_what_makes_no_sense(
    tmp_path: Path,
    pictures: Path,
    arguments: tuple,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        status = run(pictures, "--out", tmp_path / "f", *arguments)
    except SystemExit as end:
        status = int(str(end.code))
    assert status == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.glob("f/*.tar"))

"""Records of two images, where they are looked at: `dump`, the summary, and the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.errors import DataError
from shards.inspect.find import show
from tests.browser import Dom, open_browser
from tests.conftest import files_of
from tests.shards.format.test_verify import reseal
from tests.shards.inspect.sets import build_set, command, paired_records
from tests.shards.inspect.test_page import contents, found

RECORDS = paired_records(7)
FIRST = [int((r.sides == 0).sum()) for r in RECORDS if r.sides is not None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_set(RECORDS, tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    folder = tmp_path_factory.mktemp("page")
    for name in ("dev-2-0-img1", "dev-4-0-img0", "dev-4-0-img1", "dev-5-0"):
        Image.new("RGB", (80, 60), (200, 9, 0)).save(folder / f"{name}.jpg")
    path = folder / "page.html"
    assert command("inspect", data, "--html", path, "--images", folder) == 0
    return path


def test_a_record_says_which_object_is_of_which_picture(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("dump", data, "dev-3-0", "--json") == 0
    told, record = json.loads(capsys.readouterr().out), RECORDS[3]
    assert told["pictures"] == [vars(p) for p in record.pictures]
    assert record.sides is not None
    assert [o["picture"] for o in told["objects"]] == record.sides.tolist()
    for i, given in enumerate(told["objects"]):
        picture = record.pictures[record.sides[i]]
        size = np.asarray([picture.width, picture.height] * 2)
        np.testing.assert_allclose(given["pixels"], record.boxes[i] * size, rtol=1e-6)
    assert command("dump", data, "dev-3-0") == 0
    out = capsys.readouterr().out
    assert f"picture 0 dev-3-0-img0, {record.width} × 480 pixels\n" in out
    assert "picture 1 dev-3-0-img1, 1,003 × 30 pixels\n" in out and "size  " not in out
    head, *rows = out[out.index("   picture") :].splitlines()
    assert head.split()[:3] == ["picture", "x1", "y1"]
    assert [r.split()[:2] for r in rows] == [[str(i), str(s)] for i, s in enumerate(record.sides)]


def test_a_summary_of_records_of_two(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("inspect", data) == 0
    out = capsys.readouterr().out
    assert "All 7 records, two pictures a record, and" in out and "objects of a record: " in out
    widths = [p.width for r in RECORDS for p in r.pictures]
    assert f"{min(widths)} to {max(widths):,} pixels wide, 30 to 480 high" in out


def test_a_page_holds_both_pictures(page: Path) -> None:
    document, (block,) = contents(page)
    assert document["parts"] == 2 and document["pictures"] == 3 and document["summary"]["sides"]
    assert block["width"].tolist() == [p.width for r in RECORDS for p in r.pictures]
    counts = [n for r, first in zip(RECORDS, FIRST, strict=True)
              for n in (first, len(r.boxes) - first)]  # fmt: skip
    assert block["objects"].tolist() == counts
    assert np.flatnonzero(block["picture"]).tolist() == [5, 8, 9]


def test_both_pictures_side_by_side(page: Path, tmp_path: Path) -> None:
    dom: Dom = open_browser(tmp_path)
    out = dom(page, "q=dev-2-0-img1&r=2")
    assert found(out) == "1 of 7 records" and "two pictures a record" in out
    detail = out[out.index('id="detail"') : out.index('<div id="summary"')]
    stages = re.split(r'<div class="stage"', detail)[1:]
    count = len(RECORDS[2].boxes)
    assert [len(re.findall(r'class="box', s)) for s in stages] == [FIRST[2], count - FIRST[2]]
    assert ['<img src="blob:' in s for s in stages] == [False, True]
    assert re.findall(r"aspect-ratio: (\d+) / (\d+)", detail) == [
        (str(RECORDS[2].width), "480"), ("1002", "30")]  # fmt: skip
    tables = re.findall(r'<table class="objects">.*?</table>', detail)
    assert [t.count("<tr>") - 1 for t in tables] == [FIRST[2], count - FIRST[2]]
    titles = re.findall(r"<h3>(.*?)</h3>", detail)
    assert [re.sub("<[^>]*>", "", t) for t in titles] == ["dev-2-0-img0", "dev-2-0-img1"] * 2
    # The card, too: the boxes of the first, and the picture of the second.
    card = out[out.index('data-record="2"') : out.index('id="detail"')]
    assert card.count("<canvas") == 1 and card.count("<img") == 1


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (b'"pictures":', b'"picturez":', "its objects are of two pictures, but it names 0"),
        (b'"image":"dev-0-0-img1"', b'"imagf":"dev-0-0-img1"', "record 0: 'image'"),
        (b'"width":1000', b'"width":-100', "a picture's width is -100"),
        (b'"height":30}', b'"heigth":30}', "record 0: 'height'"),
        ("sides", bytes([1, 1]), "not those of the first picture and then the second's"),
        ("sides", bytes([0, 0]), "not those of the first picture and then the second's"),
    ],
)
def test_records_that_are_none_whatever_their_hash_says(
    tmp_path: Path, good: bytes | str, bad: bytes, message: str
) -> None:
    data = build_set(RECORDS[:2], tmp_path / "data")
    tar = files_of(data) / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    if isinstance(good, bytes):
        assert good in content and len(good) == len(bad)
        content = content.replace(good, bad, 1)
    else:  # the first side, and the last
        at = content.index(b"dev-0-0.sides.u8") + 512
        content[at], content[at + len(RECORDS[0].boxes) - 1] = bad
    tar.write_bytes(content)
    reseal(data)
    with pytest.raises(DataError, match=f"shard-000000.tar: .*{message}"):
        show(str(data), "0:0")

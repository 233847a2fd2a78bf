"""The page of `lxscale shards inspect --html`: read back here, and opened in a real browser."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import resource
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards.errors import DataError
from shards.format.build import BuildSettings, build
from shards.format.record import ImageRecord, Labels, Sentence
from shards.inspect import page as page_module
from shards.inspect.page import PageSettings
from shards.inspect.pictures import find_picture
from shards.inspect.summary import Settings, inspect
from tests.browser import Dom, open_browser
from tests.shards.inspect.sets import VOCAB, build_set, command, made_records

OWN = "document.title='owned'"
EVIL = f'</script><script>{OWN}</script><img src=x onerror="{OWN}">'

RECORDS = made_records(100)
RECORDS[41] = replace(
    RECORDS[41],
    image=f"evil {EVIL}",
    split=EVIL,
    sentences=(
        Sentence(f"a needle {EVIL}", "coco_cap"),
        Sentence("which \x1e\x1f\x1d one?", "vqa", {f"haystack {EVIL}": 0.25, "yes": 1.0}),
    ),
)
RECORDS[60] = replace(RECORDS[60], sentences=(Sentence("İSTANBUL's 🐈 at NIGHT", "coco_cap"),))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_set(RECORDS, tmp_path_factory.mktemp("made"), name=f"{{style}} {EVIL}")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of some of the records, with one that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in (3, 5, 50):
        Image.new("RGB", (800, 600), (200, i, 0)).save(folder / f"img_{i:06d}.jpg")
    Image.new("P", (20, 10)).save(folder / "img_000007.png")
    (folder / "img_000009.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, data: Path, pictures: Path) -> Path:
    folder = tmp_path_factory.mktemp("page")
    names = folder / "names"
    names.write_text("".join(f"thing{i}\n" for i in range(11)) + f"{EVIL}\n")
    path = folder / "page.html"
    arguments = ["--html", path, "--objects", names, "--images", pictures, "--pictures", "3"]
    assert command("inspect", data, *arguments) == 0
    return path


# --- what is in the file ------------------------------------------------------------------------


def contents(page: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The summary and the blocks of a page, read by other means than the page's."""
    text = page.read_text()
    found = re.findall(r'<script type="text/plain" class="(\w+)">([A-Za-z0-9+/=]*)</script>', text)
    unpacked = [(kind, zlib.decompress(base64.b64decode(data))) for kind, data in found]
    summary = [json.loads(data) for kind, data in unpacked if kind == "summary"]
    blocks = []
    for kind, data in unpacked:
        if kind == "block":
            size = int.from_bytes(data[:4], "little")
            header, body = json.loads(data[4 : 4 + size]), data[4 + size :]
            block: dict[str, Any] = {}
            for name, (type_, at, length) in header.items():
                raw = body[at : at + length]
                text_or_array = raw.decode() if type_ == "text" else np.frombuffer(raw, f"<{type_}")
                block[name] = text_or_array
            blocks.append(block)
    assert len(summary) == 1
    return summary[0], blocks


def test_it_holds_the_records(page: Path) -> None:
    document, (block,) = contents(page)
    assert (document["records"], document["blocks"], document["pictures"]) == (100, 1, 3)
    assert block["index"].tolist() == [i % 5 for i in range(100)]
    assert block["width"].tolist() == [r.width for r in RECORDS]
    boxes = block["boxes"].reshape(4, -1).T / 4095
    np.testing.assert_allclose(boxes, np.concatenate([r.boxes for r in RECORDS]), atol=0.5 / 4095)
    labels = [r.labels for r in RECORDS if r.labels]
    assert block["object_id"].tolist() == [i for x in labels for i in x.object_id.tolist()]
    sure = np.concatenate([x.attribute_conf for x in labels])
    np.testing.assert_allclose(block["attribute_conf"] / 255, sure, atol=0.5 / 255)
    pieces = iter(block["text"].split("\x1f"))
    for record in RECORDS:
        assert (next(pieces), next(pieces)) == (record.image, record.split or "")
        for s in record.sentences:
            text, *answers = next(pieces).split("\x1e")
            assert text == s.text.translate(dict.fromkeys(range(0x1D, 0x20), "\ufffd"))
            found = {a: float(score) for a, score in (x.split("\x1d") for x in answers)}
            assert found == (s.answers or {})
    assert next(pieces, None) is None


def test_pictures_are_small_and_few(page: Path) -> None:
    _, (block,) = contents(page)
    sizes = block["picture"]
    assert np.flatnonzero(sizes).tolist() == [3, 5, 7]  # not 9, which is none; not the fourth
    jpegs = np.split(block["pictures"], np.cumsum(sizes[sizes > 0])[:-1])
    opened = [Image.open(io.BytesIO(jpeg.tobytes())) for jpeg in jpegs]
    assert [(i.format, i.size) for i in opened] == [("JPEG", (384, 288))] * 2 + [("JPEG", (20, 10))]


def test_text_of_the_data_is_no_markup(page: Path) -> None:
    text = page.read_text()
    assert "owned'" not in text.replace(html.escape(EVIL), "")
    assert f"<title>{{style}} {html.escape(EVIL)}</title>" in text
    assert text.count("<script>") == 1  # the one that the policy names


def test_it_needs_no_network(page: Path) -> None:
    text = page.read_text().replace(html.escape(EVIL), "")
    assert "default-src 'none'; img-src blob:; script-src 'sha256-" in text
    assert not re.search(r"https?:|\bsrc=|href=|@import|url\(", text)


def test_blocks_end_early_where_records_are_large(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_module, "_BLOCK_BYTES", 1000)
    inspect(str(data), Settings(page=PageSettings(tmp_path / "page.html")))
    document, blocks = contents(tmp_path / "page.html")
    assert len(blocks) == document["blocks"] > 5
    assert sum(len(b["shard"]) for b in blocks) == 100


def test_an_id_leads_to_no_picture_outside(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    (inside / "below").mkdir(parents=True)
    for name in ("out.jpg", "in/a.b.png", "in/below/c.jpg"):
        (tmp_path / name).write_bytes(b"")
    assert find_picture(inside, "a.b") == inside / "a.b.png"
    assert find_picture(inside, "a.b.png") == inside / "a.b.png"
    assert find_picture(inside, "below/c") == inside / "below/c.jpg"
    for image in ("../out", str(tmp_path / "out"), "below/../../out", "", ".", "below", "x" * 5000):
        assert find_picture(inside, image) is None
    assert find_picture(inside, "a\0") is None and find_picture(inside, "\udc80") is None


# --- how it is written --------------------------------------------------------------------------


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    data = build_set(made_records(12), tmp_path / "data")
    path = tmp_path / "page.html"
    path.write_text("before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # as a full disk
    try:
        with pytest.raises(DataError, match=r"cannot write .*page.html: File too large"):
            inspect(str(data), Settings(page=PageSettings(path)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    tar = next(data.glob("build-*/shard-000002.tar"))
    tar.write_bytes(tar.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"shard-000002.tar is damaged"):
        inspect(str(data), Settings(page=PageSettings(path)))
    assert path.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "page.html"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--html", "{0}"], "is a folder: name a file for the page"),
        (["--html", "{0}/p", "--images", "{0}/no"], "no folder of pictures .*/no: name one"),
        (["--html", "/proc/no/p.html"], "cannot write /proc/no"),
        (["--html", "/dev/null"], "/dev/null is no plain file: name a file"),
    ],
)
def test_places_that_are_none(
    data: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        command("inspect", data, *(a.format(tmp_path) for a in arguments))


def test_a_link_stays_one(tmp_path: Path, data: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "page.html")
    command("inspect", data, "--html", tmp_path / "link", "--records", "1")
    assert (tmp_path / "link").is_symlink() and len(contents(tmp_path / "page.html")[1]) == 1


def test_it_says_what_it_wrote(
    page: Path, data: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = page.with_name("again.html")
    command("inspect", data, "--html", again, "--images", pictures, "--json")
    said = capsys.readouterr()
    assert f"{again}: 100 records, 0." in said.err and "4 pictures in it, from" in said.err
    assert "1 files there are no pictures" in said.err and json.loads(said.out)["images"] == 100
    assert again.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"Umask:\s*(\d+)", status)[0], 8)


# --- in a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dom(tmp_path_factory: pytest.TempPathFactory) -> Dom:
    return open_browser(tmp_path_factory.mktemp("profile"))


def cards(dom: str) -> list[int]:
    return [int(n) for n in re.findall(r'data-record="(\d+)"', dom)]


def found(dom: str) -> str:
    return re.findall(r'<output id="found"[^>]*>([^<]*)<', dom)[0]


def test_a_search_shows_the_record(page: Path, dom: Dom) -> None:
    out = dom(page, "q=NEEDLE haystack&r=41")
    assert found(out) == "1 of 100 records" and cards(out) == [41]
    # All that the data says is there as text; nothing of it has run or become an element.
    assert f"<title>{{style}} {html.escape(EVIL, quote=False)}</title>" in out
    assert out.count("owned") > 5 and not re.search(r"<img[^>]*onerror|<script>document", out)
    detail = out[out.index('id="detail"') :]
    assert "<mark>needle</mark>" in detail and "<mark>haystack</mark>" in detail
    assert " 0.25" in detail and "shard-000008.tar · 8:1" in detail
    assert len(re.findall(r'class="box', detail)) == len(RECORDS[41].boxes)
    labels = RECORDS[41].labels
    assert labels is not None
    for i, sure in zip(labels.object_id.tolist(), labels.object_conf.tolist(), strict=True):
        name = f"thing{i}" if i < 11 else html.escape(EVIL, quote=False)
        assert f">{name} {round(round(sure * 255) / 255, 2):.2f}" in detail


@pytest.mark.parametrize(
    ("fragment", "expected"),
    [
        ("q=istanbul's%20%F0%9F%90%88", [60]),
        ("q=thing3", [i for i, r in enumerate(RECORDS) if r.labels and 3 in r.labels.object_id]),
        ("q=%237", [i for i, r in enumerate(RECORDS) if r.labels and 7 in r.labels.attribute_id]),
        ("q=needle&source=vqa", []),  # which no question says
        ("q=haystack&source=vqa", [41]),
        (
            "source=coco_cap",
            [i for i, r in enumerate(RECORDS) if any(s.source == "coco_cap" for s in r.sentences)],
        ),
    ],
)
def test_searches(page: Path, dom: Dom, fragment: str, expected: list[int]) -> None:
    out = dom(page, fragment)
    assert found(out) == f"{len(expected)} of 100 records"
    assert cards(out) == expected[:60]


def test_pages_pictures_and_distributions(page: Path, dom: Dom) -> None:
    out = dom(page, "page=2")
    assert cards(out) == list(range(60, 100)) and "2 / 2" in out and "<canvas" in out
    first = dom(page)
    assert first.count('<img src="blob:') == 3 and cards(first) == list(range(60))
    out = dom(page, "view=summary")
    summary = out[out.index('<div id="summary"') :]
    total = sum(len(r.boxes) for r in RECORDS)
    assert "All 100 images" in summary and "objects of an image" in summary
    assert f"{sum(1 for r in RECORDS if len(r.boxes) == 1)} · " in summary and total > 100
    assert 'id="summary" hidden' not in out and "All 100 records" in summary


def many(n: int) -> Iterator[ImageRecord]:
    rng = np.random.default_rng(0)
    for i in range(n):
        k = int(rng.integers(10, 37))
        boxes = np.sort(rng.random((k, 2, 2), dtype=np.float32), axis=1).reshape(k, 4)
        zero, one = np.zeros(k, np.int32), rng.random(k, dtype=np.float32)
        words = rng.choice(VOCAB[5:], size=(5, 8))
        sentences = [Sentence(" ".join(w), f"set{j % 2}") for j, w in enumerate(words)]
        sentences.append(Sentence(f"which number is it? {i}", "vqa", {f"n{i}": 1.0}))
        features = np.zeros((k, 1), np.float16)
        labels = Labels(zero, one, zero, one)
        yield ImageRecord(f"{i:09d}", 640, 480, boxes, features, tuple(sentences), labels)


@contextmanager
def seconds_at_most(limit: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < limit


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_a_hundred_thousand_records(tmp_path: Path, dom: Dom) -> None:
    settings = BuildSettings("many", "none", vocab=VOCAB, answers=[], images_per_shard=20_000)
    build(many(100_000), tmp_path / "data", replace(settings, skip_bad=True))
    path = tmp_path / "page.html"
    inspect(str(tmp_path / "data"), Settings(records=0, page=PageSettings(path)))
    assert path.stat().st_size < 80e6
    # Opening is all of these: the browser's start, reading, unpacking, the search.
    with seconds_at_most(30):
        out = dom(path, "q=77777&r=77777", seconds=300)
    assert found(out) == "1 of 100,000 records" and cards(out) == [77777]
    assert "which number is it? <mark>77777</mark>" in out
    with seconds_at_most(30):
        out = dom(path, "q=circle left&source=set1&page=1000", seconds=300)
    assert int(found(out).split()[0].replace(",", "")) > 60_000 and len(cards(out)) == 60

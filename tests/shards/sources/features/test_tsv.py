"""Bottom-up-attention TSVs with LXMERT's aggregated sentences, good and bad."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.convert.convert import convert, records
from shards.convert.inputs import FeatureInput, Inputs, SentenceInput
from shards.convert.pool import in_processes
from shards.errors import DataError
from shards.format.answers import load_answers
from shards.format.build import BuildSettings
from shards.format.record import ImageRecord, Report
from shards.format.table import open_table
from shards.format.verify import verify
from shards.sources.features import feature_format
from tests.conftest import files_of
from tests.shards.convert.inputs import DIM, OPTIONS, b64, make_row, tsv_bytes


def inputs(tsv: Path, sentences: Path) -> Inputs:
    return Inputs((FeatureInput(str(tsv), "tsv"),), (SentenceInput((sentences,), "lxmert"),))


class Source:
    """A TSV and a sentence file in a folder."""

    def __init__(self, folder: Path) -> None:
        self.tsv, self.json = folder / "f.tsv", folder / "s.json"

    def write(self, rows: list[list[str]], images: list[str] | None = None) -> None:
        self.tsv.write_bytes(tsv_bytes(rows))
        images = [r[0] for r in rows] if images is None else images
        entries = [{"img_id": i, "sentf": {"mscoco": [f"image {i}"]}} for i in images]
        self.json.write_text(json.dumps(entries))

    def read(self, **options: Any) -> list[ImageRecord]:
        return list(records(inputs(self.tsv, self.json), options=OPTIONS, **options))


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


@pytest.mark.parametrize("columns", [10, 6])
def test_good_rows(source: Source, columns: int) -> None:
    source.write([make_row("a", columns), make_row("b", columns, n=1)])
    first, second = source.read()
    assert (first.image, first.width, first.height, len(second.boxes)) == ("a", 200, 100, 1)
    np.testing.assert_allclose(
        first.boxes, [[0, 0, 1, 1], [0.05, 0.2, 0.15, 0.4], [0, 0, 1, 0.5]], rtol=1e-6
    )
    np.testing.assert_array_equal(first.features.reshape(-1), np.arange(3 * DIM) / 8)
    assert [s.text for s in first.sentences] == ["image a"]
    assert first.sentences[0].source == "coco_cap"
    assert (first.labels is None) == (columns == 6)
    if first.labels:
        np.testing.assert_array_equal(first.labels.object_id, [0, 1, 2])
        np.testing.assert_array_equal(first.labels.attribute_conf, [0.25] * 3)


def test_a_last_row_without_line_end_is_good_when_whole(source: Source) -> None:
    source.write([make_row("a"), make_row("b")])
    source.tsv.write_bytes(source.tsv.read_bytes().removesuffix(b"\r\n"))
    assert [r.image for r in source.read()] == ["a", "b"]


TWICE = "images that are there twice"
NAN = b64([np.nan] + [1.0] * (3 * DIM - 1), "<f4")
HUGE = b64([1e6] + [1.0] * (3 * DIM - 1), "<f4")
BAD_ROWS: list[tuple[dict[str, str], str]] = [
    ({"features": make_row("x")[-1][:-7]}, "column features: damaged base64"),
    ({"boxes": "ab*d"}, "column boxes: damaged base64"),
    ({"features": b64(np.ones(3 * (DIM + 1)), "<f4")}, "column features: 84 bytes, where 3 boxes"),
    ({"features": b64(np.ones(2 * DIM), "<f4")}, "column features: 48 bytes"),
    ({"num_boxes": "4"}, "column features: 72 bytes, where 4 boxes"),
    ({"num_boxes": "0"}, "column num_boxes: '0' is no positive integer"),
    ({"img_w": "x"}, "column img_w: 'x' is no positive integer"),
    ({"features": NAN}, "features: object 0 has nan"),
    ({"features": HUGE}, "features: object 0 has 1000000.0"),
    ({"boxes": b64([[0, 0, 202, 50]] * 3, "<f4")}, "column boxes: box 0 is .* outside of"),
    ({"boxes": b64([[0, np.nan, 1, 1]] * 3, "<f4")}, "column boxes: box 0"),
    ({"boxes": b64([[0, 0, 0.5, 1]] * 3, "<f4")}, "column boxes: all boxes lie in 0..1"),
    ({"boxes": b64([[20, 0, 10, 1]] * 3, "<f4")}, "column boxes: .* not x1 y1 x2 y2"),
    ({"objects_id": b64([1600] * 3, "<i8")}, "column objects_id: ids run from 1600"),
    ({"attrs_conf": b64([np.nan] * 3, "<f4")}, "column attrs_conf: a confidence"),
    ({"img_id": "a"}, r"image 'a' is there already \(.*f.tsv, line 1\)"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ROWS)
def test_bad_rows_are_named_by_file_line_and_column(
    source: Source, change: dict[str, str], message: str
) -> None:
    source.write([make_row("a"), make_row("b", **change), make_row("c")], ["a", "b", "c"])
    with pytest.raises(DataError, match=f"f.tsv, line 2[,:] {message}"):
        source.read()
    report = Report()
    assert [r.image for r in source.read(skip_bad=True, report=report)] == ["a", "c"]
    assert report.counts.get("bad records", 0) + report.counts.get(TWICE, 0) == 1


def test_missing_columns(source: Source) -> None:
    source.write([make_row("a"), make_row("b")[:-1]])
    with pytest.raises(DataError, match=r"f.tsv, line 2, column features: it is missing"):
        source.read()
    source.write([make_row("a")[:-1]])
    with pytest.raises(DataError, match=r"f.tsv, line 1: 9 columns, where"):
        source.read()
    source.write([make_row("a"), [*make_row("b"), "x"]])
    with pytest.raises(DataError, match=r"f.tsv, line 2, .*11 columns instead of 10"):
        source.read()


@pytest.mark.parametrize("cut", [3, 20, 110, 200])
def test_a_truncated_last_row(source: Source, cut: int) -> None:
    source.write([make_row("a"), make_row("b")])
    source.tsv.write_bytes(source.tsv.read_bytes()[:-cut])
    with pytest.raises(DataError, match=r"f.tsv, line 2, column .*last row is truncated"):
        source.read()
    report = Report()
    assert [r.image for r in source.read(skip_bad=True, report=report)] == ["a"]


def test_images_on_one_side_only(source: Source) -> None:
    source.write([make_row("a"), make_row("b")], ["b", "lost1", "lost2"])
    with pytest.raises(DataError, match=r"2 images have sentences, .*\(first: lost1, lost2\)"):
        source.read()
    report = Report()
    assert [r.image for r in source.read(skip_bad=True, report=report)] == ["b"]
    assert report.counts == {
        "images without sentences": 1,
        "images with sentences but without features": 2,
    }


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "not a list"),
        ([{"img_id": 3, "sentf": {}}], "entry 0"),
        ([{"img_id": "a", "sentf": {"vqa": ["x"]}, "labelf": {"vqa": []}}], "image a: vqa has"),
        ([{"img_id": "a", "sentf": {}, "labelf": {"vqa": []}}], "does not belong"),
        ([{"img_id": "a", "sentf": {"vqa": ["x"]}, "labelf": {"vqa": [{"y": -1}]}}], "not 0..1"),
        ([{"img_id": "a", "sentf": {"vqa": [None]}}], "not a list of strings"),
    ],
)
def test_bad_sentence_files(source: Source, entries: object, message: str) -> None:
    source.write([make_row("a")])
    source.json.write_text(json.dumps(entries))
    with pytest.raises(DataError, match=message) as caught:
        source.read()
    assert "s.json" in str(caught.value)


def test_absent_files(source: Source, tmp_path: Path) -> None:
    source.write([make_row("a")])
    for features, sentences in ((tmp_path / "no", source.json), (source.tsv, tmp_path / "no")):
        with pytest.raises(DataError, match=r"cannot read .*no: No such file"):
            list(records(inputs(features, sentences)))


def test_real_rows(shared_data: Path, tmp_path: Path) -> None:
    """Ten rows of COCO train2014, the joint answer table and BERT's vocabulary."""
    tsv = shared_data / "butd_train2014_obj36_10rows.tsv"
    ids = [line.split(b"\t", 1)[0].decode() for line in tsv.read_bytes().splitlines()]
    assert len(ids) == 10 and feature_format(str(tsv), None).name == "tsv"
    entry: Callable[[str], dict[str, Any]] = lambda i: {  # noqa: E731
        "img_id": i,
        "sentf": {
            "mscoco": ["A very clean kitchen.", "A kitchen with appliances " + "and more " * 20],
            "visual7w": ["What color is it?"],
            "gqa": ["Is it Grey?"],
        },
        "labelf": {"visual7w": [{"Grey": 1}], "gqa": [{"yes": 1.0, "Yes.": 0.5, "qqq": 0.3}]},
    }
    sentences = tmp_path / "mscoco_train.json"
    sentences.write_text(json.dumps([entry(i) for i in ids]))
    report = Report()
    settings = BuildSettings(
        "coco10",
        "bottom-up-attention",
        vocab=shared_data / "bert-base-uncased-vocab.txt",
        answers=load_answers(shared_data / "lxmert_all_ans.json"),
        skip_bad=True,
    )
    given, here = inputs(tsv, sentences), in_processes(1)
    manifest = convert(given, tmp_path / "data", settings, workers=here, report=report)
    assert manifest.schema.vocab_size == 30522 and manifest.answers.count == 9500
    assert (manifest.images, manifest.pairs) == (10, 40)
    assert manifest.counts.sentences == {"coco_cap": 20, "gqa": 10, "vgqa": 10}
    assert manifest.question_sources == ("gqa", "vgqa") and manifest.schema.labels
    assert report.counts == {"answers that are not in the answer table": 10}
    assert verify(tmp_path / "data") == []
    table = open_table(files_of(tmp_path / "data") / "shard-000000.table.safetensors")
    assert int(np.diff(table.token_start).max()) == 18
    answers = json.loads((files_of(tmp_path / "data") / "answers.json").read_text())
    assert [answers[i] for i in table.answer_id[:2].tolist()] == ["gray", "yes"]
    # LXMERT.md: features are >= 0, with 24–39 % exact zeros and maxima of 25–35.
    for record in records(given):
        assert record.features.shape == (36, 2048) and record.features.min() == 0
        assert 0.2 < (record.features == 0).mean() < 0.45 and record.features.max() < 40


def test_a_suffix_may_be_in_upper_case(source: Source) -> None:
    source.write([make_row("a")])
    source.tsv = source.tsv.rename(source.tsv.with_suffix(".TSV"))
    assert [r.image for r in source.read()] == ["a"]


@pytest.mark.parametrize("end", [b"\r\n", b"\n"])
@pytest.mark.parametrize("width", [2048, 1024])
def test_long_rows_are_listed_as_they_stand(tmp_path: Path, end: bytes, width: int) -> None:
    """Whether features have the width that is expected or not, rows are found where plain splitting
    finds them: damaged ones, and a last one without its end, among them."""
    rng = np.random.default_rng(0)

    def row(i: int, n: int) -> bytes:
        features = b64(rng.random((n, 2048), dtype=np.float32), "<f4")
        boxes = b64(np.tile([0, 0, 9, 9], (n, 1)), "<f4")
        return "\t".join(make_row(f"image{i}", n=n, boxes=boxes, features=features)).encode()

    rows = [row(i, 1 + 5 * (i % 8)) for i in range(12)]
    rows[3] = rows[3][:-5000]  # features cut, the line goes on
    rows[5] = rows[5].replace(b"A", b"\t", 1)  # a column too many
    rows[7] = rows[7][: len(rows[7]) // 2] + b"\t" + rows[7][len(rows[7]) // 2 :]
    rows[9] = b"image9\t100"
    rows[10] = rows[10][:-4000] + b"\n" + rows[10][-4000:]  # a line's end within
    data = end.join(rows)
    (tmp_path / "f.tsv").write_bytes(data)
    form = feature_format(str(tmp_path / "f.tsv"), "tsv")
    found = list(form.entries(str(tmp_path / "f.tsv"), replace(OPTIONS, feature_dim=width)))
    at, due = 0, []
    for line in data.split(b"\n"):
        cells = line.split(b"\t")
        good = len(cells) == 10
        due.append((str(at), cells[0].decode() if good else "", int(cells[7]) if good else 0))
        at += len(line) + 1
    assert [(e.position, e.image, e.objects) for e in found] == due
    assert [bool(e.problem) for e in found] == [not image for _, image, _ in due]
    with form.reader(str(tmp_path / "f.tsv"), replace(OPTIONS, feature_dim=2048)) as read:
        for i in (0, 1, 2, 4, 6, 8):
            assert len(read(found[i]).features) == 1 + 5 * (i % 8)
        with pytest.raises(ValueError, match="bytes, where 16 boxes"):
            read(found[3])

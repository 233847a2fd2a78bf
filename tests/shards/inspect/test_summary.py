"""`lxscale shards inspect` counts what is there, and says what it has drawn."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards.errors import DataError
from shards.format.manifest import load_manifest
from shards.format.record import ImageRecord
from shards.inspect.histogram import Histogram, Tally, WholeTally
from shards.inspect.sample import draw
from shards.inspect.summary import Settings, Summary, inspect
from tests.conftest import files_of, upload_set
from tests.shards.inspect.sets import MAX_TOKENS, build_set, command, made_records

RECORDS = made_records(47)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_set(RECORDS, tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def summary(data: Path) -> Summary:
    return inspect(str(data), Settings(records=0))[0]


def counts_of(h: Histogram) -> dict[int, int]:
    """Value -> how often, of a histogram whose bins hold one value each."""
    assert h.whole and h.edges == tuple(range(int(h.least), int(h.most) + 2))
    return {int(edge): n for edge, n in zip(h.edges, h.counts, strict=False) if n}


def test_tables_are_counted_exactly(summary: Summary) -> None:
    """Against a recount of the records by other means."""
    counted, limit = summary.counted, MAX_TOKENS - 2
    assert (summary.images, summary.shards) == (47, 10)
    assert summary.pairs == sum(len(r.sentences) for r in RECORDS)
    assert counts_of(counted.objects) == Counter(len(r.boxes) for r in RECORDS)
    assert counts_of(counted.sentences) == Counter(len(r.sentences) for r in RECORDS)
    for s in counted.sources:
        mine = [[x for x in r.sentences if x.source == s.source] for r in RECORDS]
        flat = [x for of_image in mine for x in of_image]
        lengths = [len(x.text.split()) for x in flat]
        assert s.sentences == len(flat) > 0
        assert s.images == sum(1 for of_image in mine if of_image)
        assert counts_of(s.per_image) == Counter(len(m) for m in mine if m)
        assert counts_of(s.tokens) == Counter(min(n, limit) for n in lengths)
        assert s.at_limit == sum(n >= limit for n in lengths)
        assert s.tokens.median == np.quantile(
            [min(n, limit) for n in lengths], 0.5, method="inverted_cdf"
        )


def test_answers_are_the_best_ones(summary: Summary) -> None:
    given = [s.answers for r in RECORDS for s in r.sentences if s.answers]
    best = Counter(
        max(known, key=lambda a: known[a])
        for answers in given
        if (known := {a: x for a, x in answers.items() if a != "rare"})
    )
    captions, questions = summary.counted.sources
    assert captions.answers is None and captions.answered == 0 and not captions.questions
    assert questions.answers is not None and questions.answered == sum(best.values())
    assert dict(questions.answers.top) == best and set(best) == {"yes", "no", "never"}
    assert questions.answers.distinct == 3 and questions.answers.coverage[10] == 1.0
    assert questions.answers.coverage[1] == max(best.values()) / sum(best.values())
    assert (summary.counted.answers_used, summary.answers) == (3, 4)
    assert summary.sampled.answered_in_source == len(given)
    assert summary.sampled.answered_in_table == sum(best.values()) < len(given)


def test_records_are_looked_at(summary: Summary) -> None:
    s = summary.sampled
    boxes = np.concatenate([r.boxes for r in RECORDS]).astype(np.float64)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    features = np.concatenate([r.features.reshape(-1) for r in RECORDS]).astype(np.float64)
    assert (s.records, s.seed, s.boxes) == (47, None, len(boxes))
    assert dict(s.splits) == {"train": 16, "val": 16, "": 15}
    assert s.width == (min(r.width for r in RECORDS), max(r.width for r in RECORDS))
    assert s.height == (480, 480)
    assert s.box_area.counts == tuple(np.histogram(areas, s.box_area.edges)[0])
    assert s.box_area.mean == pytest.approx(areas.mean(), rel=1e-5)
    longer = sum(len(x.text.split()) > MAX_TOKENS - 2 for r in RECORDS for x in r.sentences)
    assert s.cut == longer / summary.pairs > 0
    assert s.features.records == 47 and s.features.zeros == np.mean(features == 0)
    assert s.features.negative == np.mean(features < 0)
    assert (s.features.values.least, s.features.values.most) == (features.min(), features.max())
    assert sum(s.features.values.counts) == features.size
    assert s.objects is not None
    labels = Counter(i for r in RECORDS for i in label_ids(r))
    assert {i: n for i, _, n, _ in s.objects.top} == labels
    sure = [c for r in RECORDS if r.labels for c in r.labels.object_conf.tolist()]
    assert s.objects.confidence.counts == tuple(np.histogram(sure, s.objects.confidence.edges)[0])


def label_ids(record: ImageRecord) -> list[int]:
    assert record.labels
    return record.labels.object_id.tolist()


def test_a_draw_is_of_distinct_records_and_repeats(data: Path) -> None:
    first, page = inspect(str(data), Settings(records=12, seed=3))
    again, _ = inspect(str(data), Settings(records=12, seed=3))
    other, _ = inspect(str(data), Settings(records=12, seed=4))
    assert first == again and first.sampled != other.sampled and page is None
    assert first.sampled.records == 12 and first.sampled.seed == 3
    assert first.counted == other.counted


def test_a_draw_reads_few_shards_and_enough_records(data: Path) -> None:
    manifest = load_manifest(str(data))
    for records in (1, 12, 39, 40, 46):
        drawn = draw(manifest, records, seed=1)
        assert drawn.records == records
        assert len(drawn.rows) <= 8 or records > 35
        for shard, rows in drawn.rows.items():
            assert (
                len(set(rows.tolist())) == len(rows) and rows.max() < manifest.shards[shard].images
            )
    every = [draw(manifest, 6, seed=s).rows for s in range(300)]
    seen = {(shard, row) for rows in every for shard, r in rows.items() for row in r.tolist()}
    assert len(seen) == 47  # each has its chance
    assert draw(manifest, 47, seed=0).seed is None


def test_it_is_printed_for_people_and_for_scripts(
    data: Path, summary: Summary, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("inspect", data, "--records", "0", "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(summary.document()))
    assert command("inspect", data, "--records", "10") == 0
    out = capsys.readouterr().out
    assert "images       47" in out and "objects of an image: 1 to 5, median" in out
    assert "10 records from" in out and "of 10 shards, drawn with --seed 0" in out
    assert "█" in out and "vqa (questions)" in out and "vqa, best answers: " in out


def test_a_terminal_without_its_signs(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, "ascii", write_through=True))
    assert command("inspect", data) == 0
    assert b" %  ????" in raw.getvalue()


def test_names_of_labels(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = tmp_path / "objects.txt"
    names.write_text("".join(f"thing {i}\n" for i in range(11)))
    assert command("inspect", data, "--records", "0", "--objects", names) == 0
    out = capsys.readouterr().out
    assert "thing 3 " in out and "#11 " in out
    names.write_text("".join(f"thing {i}\n" for i in range(13)))
    with pytest.raises(DataError, match=r"13 names, and the data set 12 object classes: .*backgr"):
        command("inspect", data, "--objects", names)
    names.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"object names .*objects.txt are not UTF-8"):
        command("inspect", data, "--objects", names)
    with pytest.raises(DataError, match=r"cannot read the attribute names .*no.txt: No such file"):
        command("inspect", data, "--attributes", tmp_path / "no.txt")


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.table.safetensors"])
def test_damage_is_one_error_that_names_the_file(tmp_path: Path, name: str) -> None:
    data = build_set(made_records(12), tmp_path / "data")
    path = files_of(data) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{name} is damaged: sha256"):
        inspect(str(data), Settings())


def test_a_set_without_labels_or_answers(tmp_path: Path) -> None:
    records = [
        replace(r, labels=None, sentences=tuple(replace(s, answers=None) for s in r.sentences))
        for r in made_records(3)
    ]
    data = build_set(records, tmp_path / "data")
    summary, _ = inspect(str(data), Settings())
    assert summary.sampled.objects is None and summary.counted.sources[1].answers is None
    assert command("inspect", data) == 0 and command("dump", data, "0:2") == 0
    (tmp_path / "names").write_text("a\n")
    with pytest.raises(DataError, match=r"has no labels: leave .*names"):
        inspect(str(data), Settings(objects=tmp_path / "names"))


def test_from_s3_through_the_cache(s3: str, tmp_path: Path, data: Path, summary: Summary) -> None:
    upload_set(data, f"{s3}/inspected")
    found, _ = inspect(f"{s3}/inspected", Settings(records=0), tmp_path)
    assert replace(found, url=str(data)) == summary
    assert len(list((tmp_path / "files").iterdir())) == 10


def test_histograms() -> None:
    tally = WholeTally()
    for part in ([3, 100], [3, 7, 40]):
        tally.add(np.asarray(part))
    h = tally.histogram(bins=5)
    assert h.edges == (3, 23, 43, 63, 83, 103) and h.counts == (3, 1, 0, 0, 1)
    assert (h.least, h.most, h.median, h.mean, h.values) == (3, 100, 7, 30.6, 5)
    assert [h.span(i) for i in (0, 4)] == ["3–22", "83–102"]
    assert WholeTally().histogram().values == 0
    shares = Tally([0, 0.5, 1])
    shares.add([0.0, 0.49, 0.5, 1.0])
    shares.add([])
    assert shares.histogram().counts == (2, 2) and shares.histogram().most == 1.0

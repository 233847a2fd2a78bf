"""A joint answer table: which answers, in which order, and what they cover."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.cli.main import main
from shards.errors import DataError
from shards.format.answers import load_answers
from shards.sources.answer_table import Tally, make_table, write_table

ROWS = [
    ("vqa", "what?", {"red": 1, "Blue.": 0.3}),
    ("vqa", "what?", {"the red": 1}),
    ("vqa", "what?", {"green": 1}),
    ("gqa", "what?", {"Red": 1}),
    ("gqa", "what?", {"blue": 1, "BLUE": 0.5}),
    ("coco_cap", "a thing", None),
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [
        {"image": str(i), "sentence": text, "source": source} | ({"answers": a} if a else {})
        for i, (source, text, a) in enumerate(ROWS)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def run(rows: Path, *more: str) -> list[str]:
    out = rows.parent / "answers.json"
    command = ["shards", "answers", "--sentences", str(rows), "--out", str(out), "--quiet"]
    assert main([*command, *more]) == 0
    return load_answers(out)


def test_order_sizes_and_coverage(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(rows) == ["red", "blue", "green"]
    assert run(rows, "--min-count", "2") == ["red", "blue"]
    capsys.readouterr()
    assert run(rows, "--size", "1", "--json") == ["red"]
    told = json.loads(capsys.readouterr().out)
    assert told["answers"] == 1
    assert told["sets"]["vqa"] == {
        "questions": 3, "covered": 2, "score": 3.3, "covered_score": 2.0,
    }  # fmt: skip
    assert told["sets"]["gqa"]["covered"] == 1 and "coco_cap" not in told["sets"]
    run(rows, "--form", "lxmert")
    entries = json.loads((rows.parent / "answers.json").read_text())
    assert entries[0] == {"ans": "red", "dsets": ["gqa", "vqa"]}


def test_a_base_keeps_its_ids(
    rows: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shared_data / "lxmert_all_ans.json"
    given = load_answers(base)
    assert len(given) == 9500
    assert run(rows, "--base", str(base), "--size", "9500") == given
    assert "vqa          3 of 3 questions" in capsys.readouterr().out
    (rows.parent / "more.csv").write_text("image,sentence,answers\n1,what?,a wholly new answer\n")
    grown = run(rows.parent / "more.csv", "--base", str(base))
    assert grown == [*given, "wholly new answer"]


def test_lxmert_s_form_keeps_the_sets_of_a_base(tmp_path: Path) -> None:
    """LXMERT's own code leaves out answers whose sets it does not ask for."""
    base, out = tmp_path / "base.json", tmp_path / "out.json"
    base.write_text(json.dumps([{"ans": "red", "dsets": ["gqa"]}, {"ans": "a 2", "dsets": []}]))
    tally = Tally({"red": 2, "2": 1, "blue": 1}, {"red": {"vgqa"}, "2": {"vqa"}, "blue": {"vgqa"}})
    write_table(out, make_table(tally, base=base), tally, lxmert=True, base=base)
    assert json.loads(out.read_text()) == [
        {"ans": "red", "dsets": ["gqa", "visual7w"]},
        {"ans": "a 2", "dsets": ["vqa"]},
        {"ans": "blue", "dsets": ["visual7w"]},
    ]
    base.write_text('[{"ans": "red", "dsets": 3}]')
    with pytest.raises(DataError, match="\"dsets\" of 'red' are no list of names"):
        write_table(out, ["red"], tally, lxmert=True, base=base)


def test_tables_that_are_refused(tmp_path: Path) -> None:
    out, base, tally = tmp_path / "out.json", tmp_path / "base.json", Tally({"red": 2})
    with pytest.raises(DataError, match=r"would have no answer: .* lower --min-count"):
        make_table(tally, min_count=3)
    base.write_text('["a", "b"]')
    with pytest.raises(DataError, match=r"base.json has 2 answers, more than a table of 1 can"):
        make_table(tally, size=1, base=base)
    out.write_text("before")
    with pytest.raises(DataError, match="lone surrogate"):
        write_table(out, ["red", "\ud800"], tally, lxmert=False)
    assert out.read_text() == "before" and {p.name for p in tmp_path.iterdir()} == {
        "out.json", "base.json",
    }  # fmt: skip
    with pytest.raises(DataError, match="is a folder: name a file"):
        write_table(tmp_path, ["red"], tally, lxmert=False)

"""A joint answer table: which answers, in which order, and what they cover."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.cli.main import main
from shards.format.answers import load_answers

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

"""Tables of runs: what they share, what is printed; and a real one, cut and ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli.main import main
from cluster.compare import RESULTS, jobs
from cluster.comparison import load_comparison, markdown, with_rows
from shards.format.build import BuildSettings, build
from tests.conftest import files_of, small_records, subprocess_environment
from trainer.errors import ConfigError

PAPER = Path(__file__).parents[2] / "configs" / "paper"
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 24,
    "language_layers": 1,
    "object_layers": 1,
    "cross_layers": 1,
    "max_positions": 20,
}


def write(folder: Path, **changes: Any) -> Path:
    """A table with a pre-training, and rows with and without it, one of them blind."""
    common = {"model": SMALL, "train": {"steps": 4, "global_batch": 8}}
    (folder / "pre.yaml").write_text(yaml.safe_dump({"data": {"train": f"{folder}/set"}} | common))
    tuned = {"task": "vqa", "data": {"train": [{"url": f"{folder}/set"}]}} | common
    (folder / "vqa.yaml").write_text(yaml.safe_dump(tuned))
    cell = {"config": "vqa.yaml", "from": "pretrain"}
    table = {
        "storage": f"{folder}/runs",
        "seeds": [1, 2],
        "columns": {"questions": {"data": f"{folder}/test"}},
        "runs": {"pretrain": {"config": "pre.yaml"}, "unused": {"config": "pre.yaml"}},
        "rows": [
            {"name": "scratch", "cells": {"questions": {"config": "vqa.yaml"}}},
            {"name": "pre-trained", "cells": {"questions": cell}, "paper": {"questions": 69.9}},
            {"name": "without sight", "cells": {"questions": cell | {"blind": True}}},
        ],
    }
    (folder / "table.yaml").write_text(yaml.safe_dump(table | changes))
    return folder / "table.yaml"


def test_the_runs_of_a_table(tmp_path: Path) -> None:
    table = load_comparison(write(tmp_path))
    found = [(job.name, job.run, job.after) for job in jobs(table) if job.seed == 2]
    tuned = "pre-trained-questions/seed-2"
    assert found == [
        ("pretrain/seed-2", "pretrain/seed-2", None),
        ("scratch-questions/seed-2", "scratch-questions/seed-2", None),
        (tuned, tuned, "pretrain/seed-2"),
        # Trained as the row above: one run, measured twice.
        ("without-sight-questions/seed-2", tuned, tuned),
    ]
    some = with_rows(table, ["scratch"])
    assert [job.name for job in jobs(some)] == [f"scratch-questions/seed-{s}" for s in (1, 2)]
    with pytest.raises(ConfigError, match="the table has no row 'x': it has scratch, pre-trained"):
        with_rows(table, ["x"])


def test_means_and_spreads_beside_the_paper(tmp_path: Path) -> None:
    table = load_comparison(write(tmp_path))
    found = {
        "scratch-questions/seed-1": {"accuracy": 0.4},
        "scratch-questions/seed-2": {"accuracy": 0.42},
        "pre-trained-questions/seed-1": {"accuracy": 0.8},
    }
    assert markdown(table, found).splitlines() == [
        "|  | questions | paper |",
        "| --- | ---: | ---: |",
        "| scratch | 41.0 (40.0 to 42.0, 2 seeds) |  |",
        "| pre-trained | 80.0 | 69.9 |",
        "| without sight | – |  |",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": []}, "seeds: "),
        ({"colums": {}}, "colums: "),
        ({"rows": [{"name": "a", "cells": {"x": {"config": "vqa.yaml"}}}]}, "no column x"),
        ({"rows": [{"name": "a", "cells": {"questions": {"config": "vqa.yaml", "from": "y"}}}]},
         "from: y is no run"),
        ({"rows": [{"name": n, "cells": {"questions": {"config": "vqa.yaml"}}}
                   for n in ("lr+1", "lr-1")]}, "two runs would be in one folder, lr-1-questions"),
        ({"seeds": [1, 1]}, "seeds: one is there twice"),
        ({"runs": {"a": {"config": "pre.yaml", "from": "a"}}}, "from: a is no run above it"),
        ({"runs": {"pretrain": {"config": "pre.txt"}}}, "pre.txt is no YAML file"),
    ],
)  # fmt: skip
def test_wrong_tables(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path, **change)
    with pytest.raises(ConfigError, match=message) as error:
        load_comparison(path)
    assert str(path) in str(error.value)


def test_wrong_configurations_are_found_before_anything_is_trained(tmp_path: Path) -> None:
    runs = {"pretrain": {"config": "pre.yaml", "set": ["objectives.qua=0"]}}
    table = load_comparison(write(tmp_path, runs=runs))
    with pytest.raises(ConfigError, match=r"objectives\.qua: no such key"):
        jobs(table)
    assert not (tmp_path / "runs").exists()
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not valid YAML"):
        load_comparison(tmp_path / "broken.yaml")


@pytest.mark.parametrize("name", ["scenes", "easy-vqa", "lxmert"])
def test_the_tables_that_come_with_it(name: str) -> None:
    table = load_comparison(PAPER / f"{name}.yaml")
    assert len(jobs(table)) >= len(table.seeds) * len(table.rows)


@pytest.mark.faults
def test_a_table_is_trained_measured_and_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ended by SIGTERM under way, then run again; then nothing is left to do."""
    path = write(tmp_path, seeds=[1])
    records = small_records(30)
    build(records[:20], tmp_path / "set", BuildSettings("set", "test"))
    table = json.loads((files_of(tmp_path / "set") / "answers.json").read_text())
    settings = BuildSettings("test", "test", vocab=tmp_path / "set", answers=table)
    test = [replace(r, sentences=r.sentences[-1:]) for r in records[20:]]
    build(test, tmp_path / "test", settings)
    command = [sys.executable, "-m", "cluster.cli", "compare", str(path), "--jobs", "2"]
    cut = subprocess.Popen(command, env=subprocess_environment(), stderr=subprocess.PIPE, text=True)
    assert cut.stderr is not None
    assert any("1 of 4 runs" in line for line in cut.stderr)
    cut.send_signal(signal.SIGTERM)
    assert cut.wait(120) == 143
    deadline = time.monotonic() + 30
    while _trainings(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not _trainings(tmp_path), "what it began ends with it"
    assert main(["compare", str(path), "--jobs", "2", "--out", str(tmp_path / "out.md")]) == 0
    shown = capsys.readouterr().out
    assert (tmp_path / "out.md").read_text() == shown
    found = json.loads((tmp_path / "runs" / RESULTS).read_bytes())
    assert f"{100 * found['scratch-questions/seed-1']['accuracy']:.1f}" in shown
    # What the table says now is what was trained, or it is said.
    rows = yaml.safe_load(path.read_text())["rows"]
    cell = rows[0]["cells"]["questions"]
    for change, message in (
        ({"set": ["train.steps=5"]}, "was trained with another train.steps than the table has now"),
        # As the pre-training is: that is one run, which has no accuracy of its own.
        ({"config": "pre.yaml"}, "has no metric 'accuracy'"),
    ):
        rows[0]["cells"]["questions"] = cell | change
        assert main(["compare", str(write(tmp_path, seeds=[1], rows=rows))]) == 2
        assert message in capsys.readouterr().err
    write(tmp_path, seeds=[1], columns={"questions": {"data": f"{tmp_path}/test", "metric": "f1"}})
    assert main(["compare", str(path)]) == 2
    assert "has no metric 'f1': it has loss, accuracy" in capsys.readouterr().err
    write(tmp_path, seeds=[1])
    began = time.monotonic()
    assert main(["compare", str(path)]) == 0
    assert time.monotonic() - began < 10 and capsys.readouterr().out == shown
    # A run of another beginning is told of; once it is removed, so is what was measured of it.
    shutil.rmtree(tmp_path / "runs" / "pretrain")
    assert main(["compare", str(path)]) == 2
    told = "pre-trained-questions/seed-1 began from a run that was trained anew since: remove it"
    assert told in capsys.readouterr().err
    shutil.rmtree(tmp_path / "runs" / "pre-trained-questions")
    assert main(["compare", str(path)]) == 0
    (tmp_path / "runs" / RESULTS).write_text("[1]")
    assert main(["compare", str(path)]) == 2
    assert "comparison.json is not what a comparison writes: remove it" in capsys.readouterr().err


def _trainings(folder: Path) -> list[str]:
    """Commands under way that name the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if f"{folder}/runs" in line and "train" in line:
                found.append(line)
    return found

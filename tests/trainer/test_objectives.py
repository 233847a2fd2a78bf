"""What follows from the table of objectives, over a whole run."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shards.format.build import BuildSettings, build
from tests.conftest import small_records, subprocess_environment
from tests.ranks import config_tree, step_record

SCRIPT = """
import json, multiprocessing, sys
from dataclasses import replace
from model.objectives import OBJECTIVES
OBJECTIVES["again"] = replace(OBJECTIVES["matching"], name="again")
OBJECTIVES["labels"] = replace(OBJECTIVES["masked_object"], name="labels", needs="labels")
from tests.ranks import _rank
jobs = [(json.loads(sys.argv[2]), None, False)]
_rank(0, 1, int(sys.argv[1]), jobs, multiprocessing.SimpleQueue(), {}, None)
"""


@pytest.mark.parametrize("mode", ["alternating", pytest.param("natural", marks=pytest.mark.faults)])
def test_a_row_of_the_table_is_all_that_a_run_needs(tmp_path: Path, mode: str) -> None:
    """Its weight is a key, its steps serve it, it is counted, trained, validated and logged; and it
    is left out where the data set lacks what it needs."""
    build(small_records(20), tmp_path / "data", BuildSettings("d", "test", images_per_shard=10))
    tree = config_tree(
        tmp_path / "data",
        tmp_path,
        "run",
        data={"validation": str(tmp_path / "data")},
        sampler={"mode": mode},
        objectives={"again": 0.5, "matching": 2},
        train={"steps": 6},
    )
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, port, json.dumps(tree)],
        env=subprocess_environment(),
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    said = done.stdout + done.stderr
    assert "masked_object, masked_attribute, labels" in said
    manifest = json.loads(max((tmp_path / "run" / "checkpoints").glob("*.json")).read_text())
    assert manifest["objectives"]["again"] == 0.5 and "labels" not in manifest["objectives"]
    served = [
        step for step in step_record({**tree, "objectives": {}}).values() if "loss/again" in step
    ]
    assert len(served) == (6 if mode == "natural" else 2)
    for step in served:
        assert step["loss/again"] == pytest.approx(step["loss/matching"], rel=1e-5)
        assert "loss/labels" not in step
    assert "accuracy/again" in said and "accuracy/masked_feature" not in said

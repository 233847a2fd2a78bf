"""A run that is taken from a job in the middle of it; and one that must not be."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import pytest

from shards.format.build import BuildSettings, build
from tests.conftest import small_records
from tests.ranks import config_tree, run_ranks
from trainer.audit import audit
from trainer.checkpoint.generations import Generation, generations
from trainer.checkpoint.owner import Claimant, claim


@pytest.fixture
def data(tmp_path: Path) -> Path:
    build(small_records(31), tmp_path / "set", BuildSettings("owner", "test", images_per_shard=7))
    return tmp_path / "set"


def test_a_run_that_is_taken_over_ends_on_every_rank(data: Path, tmp_path: Path) -> None:
    """Long before its next save would tell; and whoever has it goes on, with every pair once."""
    often = {"every": 10, "keep": 2}
    sizes = {"steps": 100_000}
    tree = config_tree(data, tmp_path, "run", train=sizes, checkpoint=often)
    ended: list[list[str]] = []
    ranks = threading.Thread(target=lambda: ended.append(run_ranks(2, [(tree, None, False)])))
    ranks.start()
    run = str(tmp_path / "run")
    deadline = time.monotonic() + 200
    while not any(isinstance(g, Generation) for g in generations(run)):
        assert ranks.is_alive() and time.monotonic() < deadline
        time.sleep(0.1)
    second = claim(run, Claimant(take_over=True))
    ranks.join()
    second.close()
    (errors,) = ended
    assert len(errors) == 2
    for error in errors:
        assert error.startswith("StaleAttemptError: attempt 1 of") and "attempt 2 (host" in error
    (found, *_) = second.found
    assert isinstance(found, Generation)
    short = config_tree(data, tmp_path, "run", train={"steps": found.step + 3}, checkpoint=often)
    assert not run_ranks(1, [(short, None, False)])
    assert not audit(run, cache=str(tmp_path / "cache")).problems


def test_a_command_that_cannot_go_on_does_not_claim_the_run(data: Path, tmp_path: Path) -> None:
    tree = config_tree(data, tmp_path, "run", train={"steps": 2})
    assert not run_ranks(1, [(tree, None, False)])
    places = [tmp_path / "run" / p for p in ("attempts", "checkpoints")]
    before = [sorted(p.iterdir()) for p in places]
    for wrong, message in (
        ({"model": {"hidden_size": 32}}, "CheckpointError: .* checkpoint of another model"),
        ({"sampler": {"window": 1}}, "ConfigError: the data state of the checkpoint"),
        ({"data": {"train": str(tmp_path / "none")}}, "DataError: "),
    ):
        (error,) = run_ranks(1, [(config_tree(data, tmp_path, "run", **wrong), None, False)])
        assert re.match(message, error), error
    assert [sorted(p.iterdir()) for p in places] == before

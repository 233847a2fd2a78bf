"""What a person on call sees, also where it cannot be written."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.ranks import config_tree
from trainer.config import parse_config
from trainer.curves import curves_url
from trainer.progress import Progress
from trainer.step.laps import Laps


def test_a_full_disk_ends_no_training(tmp_path: Path, said: list[logging.LogRecord]) -> None:
    config = parse_config(config_tree(tmp_path, tmp_path, "run"), "test")
    folder = Path(curves_url(config))
    folder.mkdir(parents=True)
    (folder / "steps-a000001-000001.jsonl").symlink_to("/dev/full")
    progress = Progress(config, 1, 0, 3)
    for step in (1, 2, 3):
        progress.step(step, {"loss": 1.0, "lr": 0.1}, 4, Laps(), 1000)
    progress.validation(3, {"accuracy": 0.5})
    progress.close()
    (complaint,) = [r.getMessage() for r in said if r.levelno == logging.ERROR]
    assert "No space left on device" in complaint
    assert any("step 3/3" in r.getMessage() for r in said)


def test_losses_shown_are_means_over_the_interval(
    tmp_path: Path, said: list[logging.LogRecord]
) -> None:
    tree = config_tree(tmp_path, tmp_path, "run", train={"log_every": 3})
    config = parse_config(tree, "test")
    progress = Progress(config, 1, 0, 6)
    steps = (
        {"loss/masked_lm": 8.0, "loss": 8.0},
        {"loss/qa": 3.0, "loss": 3.0},
        {"loss/masked_lm": 6.0, "loss": 6.0},
        {"loss/masked_lm": math.nan, "loss": math.nan},  # had no update
        {"loss/masked_lm": 5.0, "loss": 5.0},
        {"loss/masked_lm": 4.0, "loss": 4.0},
    )
    for number, values in enumerate(steps, start=1):
        progress.step(number, {**values, "lr": 0.1}, 4, Laps(), 1000)
    progress.close()
    first, second = (r.getMessage() for r in said if "pairs/s" in r.getMessage())
    assert "step 3/6 | masked_lm 7.000 qa 3.000 | lr" in first
    assert "step 6/6 | masked_lm 4.500 | lr" in second
    events = EventAccumulator(curves_url(config)).Reload()
    shown = {tag: [e.value for e in events.Scalars(f"train/{tag}")] for tag in ("loss", "lr")}
    assert shown["loss"] == pytest.approx([17 / 3, 4.5]) and len(shown["lr"]) == 2

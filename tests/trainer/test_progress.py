"""What a person on call sees, where it cannot be written."""

from __future__ import annotations

import logging
from pathlib import Path

from tests.ranks import config_tree
from trainer.config import parse_config
from trainer.curves import curves_url
from trainer.progress import Progress


def test_a_full_disk_ends_no_training(tmp_path: Path, said: list[logging.LogRecord]) -> None:
    config = parse_config(config_tree(tmp_path, tmp_path, "run"), "test")
    folder = Path(curves_url(config))
    folder.mkdir(parents=True)
    (folder / "steps-a000001-000001.jsonl").symlink_to("/dev/full")
    progress = Progress(config, 1, 0, 3)
    for step in (1, 2, 3):
        progress.step(step, {"loss": 1.0, "lr": 0.1}, 4, 0.1, 0.0)
    progress.validation(3, {"accuracy": 0.5})
    progress.close()
    (complaint,) = [r.getMessage() for r in said if r.levelno == logging.ERROR]
    assert "No space left on device" in complaint
    assert any("step 3/3" in r.getMessage() for r in said)

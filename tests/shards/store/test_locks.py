"""Locks between processes: one holder at a time, and nothing left of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import subprocess_environment

# Each adds to a number that is read and written with no other protection.
ADDER = """
import sys
from pathlib import Path
from shards.store.locks import alone
folder = Path(sys.argv[1])
for _ in range(300):
    with alone(folder / "lock"):
        count = int((folder / "count").read_text())
        (folder / "count").write_text(str(count + 1))
"""


def test_one_process_at_a_time_is_alone(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    adders = [
        subprocess.Popen([sys.executable, "-c", ADDER, str(tmp_path)], env=subprocess_environment())
        for _ in range(3)
    ]
    assert [adder.wait() for adder in adders] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "900"
    assert [p.name for p in tmp_path.iterdir()] == ["count"]

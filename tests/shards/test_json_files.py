"""JSON files that users give: what is wrong with one is said in one error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.errors import DataError
from shards.format.answers import load_answers
from shards.format.record import Report
from shards.sources.sentences import aggregated, pictures

READERS: list[Callable[[Path], object]] = [
    load_answers,
    lambda path: list(aggregated.FORMAT.read([path], "x", Report())),
    lambda path: list(pictures.FORMAT.read([path], "x", Report())),
]


@pytest.mark.parametrize("read", READERS)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, read: Callable[[Path], object]) -> None:
    path = tmp_path / "given.json"
    for content, message in (
        (None, f"cannot read the .* {path}: No such file"),
        ("[{", f"{path} is not JSON"),
        ("[" * 100_000, f"{path} is not JSON"),
        (json.dumps({"a": 1}), f"{path} is not a list"),
    ):
        if content is not None:
            path.write_text(content)
        with pytest.raises(DataError, match=message):
            read(path)
    path.write_text("[]")
    read(path)

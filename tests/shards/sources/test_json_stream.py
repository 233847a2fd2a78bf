"""JSON read item by item: the same as the standard library, wherever blocks end."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from shards.errors import DataError
from shards.sources import json_stream
from shards.sources.json_stream import list_items, pairs


def value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(8 if depth < 3 else 6)
    if kind == 6:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return {str(rng.random()): value(rng, depth + 1) for _ in range(rng.randrange(4))}
    text = 'a"\\é\U0001f600\n]}[{,:' * rng.randrange(3)
    return [rng.randrange(-(10**9), 10**9), rng.random() * 1e30, 1e-7, text, None, True][kind]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 1 << 20])
def test_as_the_standard_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(json_stream, "_BLOCK", block)
    path, rng = tmp_path / "x.json", random.Random(block)
    for _ in range(40):
        items = [value(rng) for _ in range(rng.randrange(5))]
        keys = {str(i): value(rng) for i in range(rng.randrange(5))}
        style: dict[str, Any] = {
            "indent": rng.choice([None, 1]),
            "ensure_ascii": rng.random() < 0.5,
        }
        path.write_text(json.dumps(items, **style))
        assert [x for _, x in list_items(path, "file")] == items
        path.write_text(json.dumps(keys | {"list": items, "z": 1}, **style))
        assert [x for _, x in list_items(path, "file", "list")] == items
        assert dict(pairs(path, "file")) == keys | {"list": items, "z": 1}
        whole = json.dumps(items).encode()
        for cut in range(len(whole)):
            path.write_bytes(whole[:cut])
            with pytest.raises(DataError, match="not JSON"):
                list(list_items(path, "file"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1,]", "a value is expected after a comma at character 3"),
        (b"[1 2]", "a comma is expected at character 3"),
        (b"[1]x", "there is more after its end"),
        (b"[1]]", "there is more after its end"),
        (b'["\xff"]', "it is not UTF-8 text"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1}', "is not a list"),
        (b"", "it ends too early at character 0"),
    ],
)
def test_what_is_no_list(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"the file {path} .*{message}"):
        list(list_items(path, "file"))


def test_a_fault_is_found_where_it_is(tmp_path: Path) -> None:
    """And not at the end of the file, read into memory to see whether it mends the fault."""
    path = tmp_path / "x.json"
    path.write_text('[{"phrase": oops},' + ",".join(['{"phrase": "a man"}'] * 500_000) + "]")
    tracemalloc.start()
    with pytest.raises(DataError, match=r"Expecting value at character 12"):
        list(list_items(path, "file"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 9e6 and peak < 6e6


def test_memory_is_that_of_an_item(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[" + ",".join(['{"phrase": "a man on a bench"}'] * 400_000) + "]")
    tracemalloc.start()
    assert sum(1 for _ in list_items(path, "file")) == 400_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 12e6 and peak < 6e6

"""Files made from others: made once, verified in every process, and made again when damaged."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from shards.errors import NodeError
from shards.store.derived import derived_file
from shards.store.marks import mark_of

CONTENT = b"whole" * 1000


def make(path: Path, cache: Path, made: list[Path]) -> bytes:
    def build(temporary: Path) -> None:
        made.append(temporary)
        temporary.write_bytes(CONTENT)

    return derived_file(path, cache, build).read_bytes()


def test_one_process_makes_it_and_nobody_sees_half_of_it(tmp_path: Path) -> None:
    path = tmp_path / "made" / "x"
    made: list[Path] = []

    def broken(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        derived_file(path, tmp_path, broken)
    assert not path.exists()
    threads = [threading.Thread(target=make, args=(path, tmp_path, made)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert path.read_bytes() == CONTENT and len(made) == 1


@pytest.mark.parametrize("damage", ["flipped", "short", "long", "empty", "gone", "seal", "no seal"])
def test_a_damaged_one_is_made_again(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x"
    made: list[Path] = []
    make(path, tmp_path, made)
    seal = path.with_name("x.seal")
    if damage == "flipped":
        path.write_bytes(b"W" + CONTENT[1:])
    elif damage == "short":
        path.write_bytes(CONTENT[:-1])
    elif damage == "long":
        path.write_bytes(CONTENT + b"!")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "gone":
        path.unlink()
    elif damage == "seal":
        seal.write_text(seal.read_text()[:9])
    else:
        seal.unlink()
    for _ in range(2):
        assert make(path, tmp_path, made) == CONTENT
    assert len(made) == 2


def test_a_whole_one_is_not_made_again(tmp_path: Path) -> None:
    made: list[Path] = []
    for _ in range(3):
        make(tmp_path / "x", tmp_path, made)
    assert len(made) == 1


def test_a_cache_that_is_none_any_more_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "x"
    make(path, tmp_path, [])
    mark = mark_of(tmp_path, path)
    mark.unlink()
    mark.mkdir()
    with pytest.raises(NodeError, match=f"cannot use .*{mark.name}: Is a directory"):
        make(path, tmp_path, [])

"""Pickles of plain data, written by Python's own pickler, and those that are more than that."""

from __future__ import annotations

import collections
import io
import os
import pickle
import pickletools
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.sources.restricted_pickle import PickleError, loads

PLAIN: dict[Any, Any] = {
    "text": "Ünïcode",
    "numbers": [0, -1, 255, 256, 65536, -(2**31), 2**63, 10**30, 1.5, float("inf")],
    "bytes": [b"", b"x", b"\xff" * 300],
    "nothing": [None, True, False, (), [], {}, ("a",), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
    "sets": [set(), {1, 2, "x"}],
    "arrays": [
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.arange(3, dtype=">f8"),
        np.zeros((0, 4), np.float16),
        np.asarray(["a", "bcd"]),
        np.asarray([True, False]),
        np.arange(12).reshape(3, 4)[:, 1:3],
    ],
    "scalars": [np.float32(2.5), np.int64(7), np.str_("é"), np.bool_(True)],
    7: "a number as a key",
    "long": ["x" * 100_000, list(range(3000))],
}


def same(found: Any, due: Any) -> bool:
    if isinstance(due, np.ndarray | np.generic):
        return type(found) is type(due) and found.dtype == due.dtype and np.array_equal(found, due)
    if isinstance(due, dict):
        return list(found) == list(due) and all(same(found[k], due[k]) for k in due)
    if isinstance(due, list | tuple):
        return type(found) is type(due) and all(map(same, found, due)) and len(found) == len(due)
    return type(found) is type(due) and found == due


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data(protocol: int) -> None:
    assert same(loads(pickle.dumps(PLAIN, protocol)), PLAIN)
    out_of_line = pickletools.optimize(pickle.dumps(PLAIN, protocol))
    assert same(loads(out_of_line), PLAIN)


def test_numpy_1_and_python_2() -> None:
    """Names that modules had, and text that was bytes."""
    array = np.arange(3, dtype=np.float32)
    old = pickle.dumps({"a": array}, 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in old and same(loads(old), {"a": array})
    # pickle.dumps({'id': '\xe9'}, 2) of Python 2
    assert loads(b"\x80\x02}q\x00U\x02idq\x01U\x01\xe9q\x02s.") == {"id": "é"}


def test_what_numpy_saves_of_a_dict() -> None:
    f = io.BytesIO()
    info = {"bbox": np.ones((2, 4), np.float32), "num_boxes": 2}
    np.save(f, info, allow_pickle=True)
    packed = f.getvalue()[f.getvalue().index(b"\n") + 1 :]
    assert same(loads(packed, boxed=True), info)
    with pytest.raises(PickleError, match="array of objects"):
        loads(packed)
    with pytest.raises(PickleError, match="no object that numpy"):
        loads(pickle.dumps(info), boxed=True)
    for objects in ([info, info], [os.system]):
        with pytest.raises(PickleError):
            loads(pickle.dumps(np.asarray(objects, object)), boxed=True)


class Calls:
    def __init__(self, function: Any, *given: Any) -> None:
        self.call = function, given

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def module_of(module: str, name: str, *given: str) -> bytes:
    """A pickle that calls a function by its name."""
    arguments = b"".join(b"X" + len(g).to_bytes(4, "little") + g.encode() for g in given)
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + arguments + b"tR."


REFUSED: list[tuple[Any, str]] = [
    (Calls(os.system, "touch ran"), "names 'posix.system'"),
    (Calls(eval, "1"), r"names '(builtins|__builtin__)\.eval'"),
    (Calls(subprocess.Popen, ["touch", "ran"]), r"names '(subprocess|commands)\.Popen'"),
    (collections.OrderedDict(a=1), "names 'collections.OrderedDict'"),
    (Path("x"), "names 'pathlib"),
    (os.system, "names 'posix.system'"),
    (complex(1), r"names '\w+\.complex'"),
    (np.asarray([{}], object), "array of objects"),
    (np.zeros(2, [("a", "f4"), ("b", "O")]), "array of type 'V12'"),
    (np.zeros(2, [("a", "f4")]), "array of type 'V4'"),
    (np.datetime64("2020"), "array of type 'M8'"),
    (np.dtype("f4"), "numpy.dtype in its data"),
    ([np.ndarray], "numpy.ndarray in its data"),
    (np.ma.masked_array([1]), "names 'numpy.ma"),
    ({(1, 2): 3}, "a tuple as a key"),
    (module_of("os", "system", "touch ran"), "names 'os.system'"),
    (module_of("numpy", "ndarray", "x"), "calls numpy.ndarray"),
    (module_of("_codecs", "encode", "x", "rot13"), "no latin-1 text"),
    (module_of("builtins", "bytes", "x"), "makes bytes of what it has"),
    (module_of("numpy", "dtype", "O"), "in its data"),
    (b"\x80\x02ccopyreg\n_reconstructor\n.", "names 'copyreg._reconstructor'"),
    (b"\x80\x02Pid\n.", "instruction 0x50"),
    (b"\x80\x02\x82\x01.", "instruction 0x82"),  # of the registry of extensions
    (b"\x80\x04}(\x8c\x01ai\x01u.", "instruction 0x69"),
    (b"\x80\x00N.", "protocol"),
    (b"c" + b"x" * 10_000 + b"\n.", "a name does not end"),
]


@pytest.mark.parametrize(("value", "message"), REFUSED)
def test_nothing_else_is_read_or_run(
    value: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [value] if isinstance(value, bytes) else [pickle.dumps(value, p) for p in (2, 4, 5)]
    for data in given:
        with pytest.raises(PickleError, match=message):
            loads(data)
    assert not (tmp_path / "ran").exists()


def test_it_imports_nothing() -> None:
    """Naming a module is enough for Python's unpickler to import it."""
    assert "this" not in sys.modules
    with pytest.raises(PickleError, match="names 'this"):
        loads(module_of("this", "s"))
    assert "this" not in sys.modules


def encoded_again_and_again() -> bytes:
    text = b"X" + (50_000).to_bytes(4, "little") + b"x" * 50_000
    call = b"h\x00X\x06\x00\x00\x00latin1\x86Ra"  # text, codec → a tuple; call; append
    return b"\x80\x02" + text + b"q\x00" + b"]" + (b"c_codecs\nencode\n" + call) * 5000 + b"."


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04B\xff\xff\xff\x7fxx.",  # bytes of 2 GB
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",  # of 2 ** 63
        b"\x80\x05\x96\x00\x00\x00\x00\x00\x01\x00\x00.",  # a bytearray of 256 TB
        b"\x80\x04X\xff\xff\xff\xffa.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",  # an integer
        b"\x80\x02\x8b\x00\x00\x01\x00" + b"\xff" * (1 << 16) + b".",
        b"\x80\x04Nr\xff\xff\xff\xff0.",  # a place in the memo
        encoded_again_and_again(),
        pickle.dumps(np.ones(4)).replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85"),
    ],
)
def test_declared_sizes_take_no_memory(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(PickleError):
            loads(data)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(data) + (4 << 20)
    finally:
        tracemalloc.stop()


def test_depth_and_circles() -> None:
    """Lists in lists in lists, one in itself, and tuples that would hash for ever."""
    loads(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    assert loads(b"\x80\x02]q\x00h\x00a.")[0] is not None
    doubled = b"\x80\x02)" + b"q\x00h\x00h\x00\x86" * 60
    with pytest.raises(PickleError, match="a tuple as a key"):
        loads(doubled + b"}q\x010h\x01h\x00Ns.")


def test_damage() -> None:
    good = pickle.dumps(PLAIN, 4)[:1500]
    for seed in range(1500):
        made = random.Random(seed)
        data = bytearray(good if seed % 2 else pickle.dumps(PLAIN["arrays"], 2))
        if seed % 5 == 0:
            del data[made.randrange(len(data)) :]
        for _ in range(made.choice([1, 3])):
            if data:
                data[made.randrange(len(data))] = made.randrange(256)
        try:
            loads(bytes(data))
        except PickleError as error:
            assert len(str(error)) < 300

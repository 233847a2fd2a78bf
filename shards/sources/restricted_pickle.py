"""Pickles of plain data, read without Python's unpickler.

Nothing that a pickle names is ever imported or called: a name is text here, and the few that numpy
arrays are pickled with have a meaning below; every other one is refused by its name. What comes out
is made of dict, list, tuple, set, str, bytes, int, float, bool, None, and numpy arrays and scalars
of numbers and text. Memory is bounded by the size of the pickle: no size that it declares is
trusted, and what it asks for again and again is counted. What the names mean is in
shards/sources/pickled_names.py.

The binary protocols 2 to 5 are read (https://docs.python.org/3/library/pickletools.html). Text that
Python 2 wrote becomes str as latin-1, as numpy's own `encoding="latin1"` has it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from shards.sources.pickled_names import (
    ADMITTED,
    CALLS,
    Array,
    Box,
    Name,
    PickleError,
    data_of,
    key_of,
    set_state,
)

_MOST_COPIED = 4  # times the size of the pickle that copies of its parts may take, and a megabyte
_LONGEST_NAME = 4096


def loads(data: bytes, boxed: bool = False) -> Any:
    """The value of a pickle. PickleError names what cannot be read.

    boxed: it is the pickle in a .npy that `numpy.save` made of a dict, an object array without
    dimensions; its only item is the value.
    """
    machine = _Machine(data, boxed)
    try:
        value = machine.run()
    except PickleError:
        raise
    except (ValueError, TypeError, IndexError, OverflowError, struct.error):
        raise PickleError("the pickle is damaged or cut off") from None
    if boxed and not isinstance(value, Box):
        raise PickleError("the pickle is no object that numpy.save wrote")
    return value.item if isinstance(value, Box) else value


# --- the machine ----------------------------------------------------------------------------------

_MARK = object()


class _Machine:
    """A pickle is a program for a machine with a stack and a memo; this is that machine."""

    def __init__(self, data: bytes, boxed: bool) -> None:
        self.data, self.boxed, self.at = data, boxed, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def run(self) -> Any:
        while True:
            code = self.data[self.at]
            self.at += 1
            if code == 0x2E:  # STOP
                return data_of(_plain(self.pop(), boxed=self.boxed))
            step = _STEPS.get(code)
            if step is None:
                raise PickleError(
                    f"the pickle has an instruction {code:#04x} at byte {self.at - 1:,}, which "
                    "plain data does not need, or it is damaged"
                )
            step(self)

    def take(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self.data):
            raise PickleError("the pickle is cut off, or declares a size that it does not have")
        self.at, begin = end, self.at
        return self.data[begin:end]

    def number(self, form: str) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + _LONGEST_NAME)
        if end < 0:
            raise PickleError("the pickle is damaged: a name does not end")
        text = self.take(end - self.at).decode("utf-8", "replace")
        self.at += 1
        return text

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise PickleError("the pickle is damaged: it takes what it did not make")
        return value

    def since_mark(self) -> list[Any]:
        """The values above the last mark; both leave the stack."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise PickleError("the pickle is damaged: it takes what it did not make")
        values = [_plain(value) for value in self.stack[at + 1 :]]
        del self.stack[at:]
        return values

    def last(self, kind: type) -> Any:
        """What is on top of the stack, which must be of a kind."""
        if not isinstance(self.stack[-1], kind):
            raise PickleError(
                f"the pickle adds to a {type(self.stack[-1]).__name__} as to a {kind.__name__}"
            )
        return self.stack[-1]

    def copy(self, size: int) -> None:
        """Count what a pickle can ask for again and again in a few bytes each."""
        self.copied += size
        if self.copied > _MOST_COPIED * len(self.data) + (1 << 20):
            raise PickleError("the pickle unpacks to far more than it has: it is no data set's")


def _plain(value: Any, boxed: bool = False) -> Any:
    """A value that may be part of another."""
    if isinstance(value, Array):
        value = value.value
        if value is None:
            raise PickleError("the pickle has an array without content: it is damaged")
    if isinstance(value, Box) and not boxed:
        raise PickleError("the pickle has an array of objects: only those of numbers are read")
    if value is _MARK:
        raise PickleError("the pickle is damaged: it takes what it did not make")
    return value


def _name(m: _Machine, module: Any, name: Any) -> None:
    if not isinstance(module, str) or not isinstance(name, str):
        raise PickleError("the pickle is damaged: a name is no text")
    found = Name(module, name)
    if found not in ADMITTED:
        raise PickleError(
            f"the pickle names {str(found)!r:.120}, which is no plain data: nothing of it was run"
        )
    m.push(found)


def _reduce(m: _Machine) -> None:
    given, function = m.pop(), m.pop()
    if not isinstance(given, tuple) or not isinstance(function, Name):
        raise PickleError("the pickle calls what is no function that plain data needs")
    made = CALLS.get(function.name)
    if made is None:
        raise PickleError(f"the pickle calls {function}, which plain data does not need")
    m.push(made(m.copy, given))


def _build(m: _Machine) -> None:
    state = m.pop()
    set_state(m.stack[-1], state, m.boxed, m.copy)


# --- instructions ---------------------------------------------------------------------------------


def _frame(m: _Machine) -> None:
    m.take(8)  # how much comes, for readers of streams


def _drop(m: _Machine) -> None:
    m.stack.pop()


def _drop_to_mark(m: _Machine) -> None:
    m.since_mark()


def _constant(value: Any) -> Callable[[_Machine], None]:
    return lambda m: m.push(value)


def _fresh(kind: Callable[[], Any]) -> Callable[[_Machine], None]:
    return lambda m: m.push(kind())


def _integer(form: str) -> Callable[[_Machine], None]:
    return lambda m: m.push(m.number(form))


def _sized(form: str, made: Callable[[bytes], Any]) -> Callable[[_Machine], None]:
    """A value whose size comes before it."""
    return lambda m: m.push(made(m.take(m.number(form))))


def _put(form: str) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        m.memo[m.number(form)] = m.stack[-1]

    return step


def _memoize(m: _Machine) -> None:
    m.memo[len(m.memo)] = m.stack[-1]


def _get(form: str) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        index = m.number(form)
        if index not in m.memo:
            raise PickleError("the pickle is damaged: it takes what it did not make")
        m.push(m.memo[index])

    return step


def _tuple(count: int) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        values = [_plain(m.pop()) for _ in range(count)]
        m.push(tuple(reversed(values)))

    return step


def _append(m: _Machine) -> None:
    value = data_of(_plain(m.pop()))
    m.last(list).append(value)


def _appends(m: _Machine) -> None:
    values = m.since_mark()
    m.last(list).extend(map(data_of, values))


def _set_item(m: _Machine) -> None:
    value, key = data_of(_plain(m.pop())), key_of(_plain(m.pop()))
    m.last(dict)[key] = value


def _set_items(m: _Machine) -> None:
    values = m.since_mark()
    target = m.last(dict)
    for key, value in zip(values[::2], values[1::2], strict=True):
        target[key_of(key)] = data_of(value)


def _add_items(m: _Machine) -> None:
    values = m.since_mark()
    m.last(set).update(map(key_of, values))


def _global(m: _Machine) -> None:
    module = m.line()
    _name(m, module, m.line())


def _stack_global(m: _Machine) -> None:
    name, module = m.pop(), m.pop()
    _name(m, module, name)


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise PickleError("the pickle is damaged: its text is not UTF-8") from None


def _old_text(raw: bytes) -> str:
    return raw.decode("latin-1")


def _long(raw: bytes) -> int:
    if len(raw) > 64:
        raise PickleError(f"the pickle has an integer of {len(raw):,} bytes")
    return int.from_bytes(raw, "little", signed=True)


def _protocol(m: _Machine) -> None:
    if not 2 <= m.number("B") <= 5:
        raise PickleError("the pickle is of a protocol that is not read: 2 to 5 are")


_STEPS: dict[int, Callable[[_Machine], None]] = {
    0x80: _protocol,
    0x95: _frame,
    ord("N"): _constant(None),
    0x88: _constant(True),
    0x89: _constant(False),
    ord("J"): _integer("<i"),
    ord("K"): _integer("<B"),
    ord("M"): _integer("<H"),
    0x8A: _sized("<B", _long),
    0x8B: _sized("<I", _long),
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    0x8C: _sized("<B", _text),
    ord("X"): _sized("<I", _text),
    0x8D: _sized("<Q", _text),
    ord("C"): _sized("<B", bytes),
    ord("B"): _sized("<I", bytes),
    0x8E: _sized("<Q", bytes),
    0x96: _sized("<Q", bytes),  # BYTEARRAY8
    ord("U"): _sized("<B", _old_text),
    ord("T"): _sized("<I", _old_text),
    ord("]"): _fresh(list),
    ord("a"): _append,
    ord("e"): _appends,
    ord("l"): lambda m: m.push(list(map(data_of, m.since_mark()))),
    ord(")"): _fresh(tuple),
    0x85: _tuple(1),
    0x86: _tuple(2),
    0x87: _tuple(3),
    ord("t"): lambda m: m.push(tuple(m.since_mark())),
    ord("}"): _fresh(dict),
    ord("s"): _set_item,
    ord("u"): _set_items,
    0x8F: _fresh(set),
    0x90: _add_items,
    ord("("): lambda m: m.push(_MARK),
    ord("0"): _drop,
    ord("1"): _drop_to_mark,
    ord("q"): _put("<B"),
    ord("r"): _put("<I"),
    0x94: _memoize,
    ord("h"): _get("<B"),
    ord("j"): _get("<I"),
    ord("c"): _global,
    0x93: _stack_global,
    ord("R"): _reduce,
    ord("b"): _build,
}

"""Names of object and attribute labels, from text files with one a line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shards.errors import DataError
from shards.format.manifest import Schema

_LARGEST = 1 << 24  # bytes: no list of classes has more


@dataclass(frozen=True)
class Names:
    """Of labels by id; ids beyond a list, and those with an empty name, have none."""

    objects: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()

    def object(self, number: int) -> str:
        """The name, or the id as `#12`."""
        return _name(self.objects, number)

    def attribute(self, number: int) -> str:
        return _name(self.attributes, number)


def _name(names: tuple[str, ...], number: int) -> str:
    return (names[number] if number < len(names) else "") or f"#{number}"


def load_names(objects: Path | None, attributes: Path | None, schema: Schema) -> Names:
    """The names in given files. DataError naming the file where it cannot be read, or has names of
    more classes than the data set."""
    return Names(
        _load(objects, "object", schema.labels, schema.num_object_classes),
        _load(attributes, "attribute", schema.labels, schema.num_attribute_classes),
    )


def _load(path: Path | None, what: str, labels: bool, classes: int) -> tuple[str, ...]:
    if path is None:
        return ()
    if not labels:
        raise DataError(f"the data set has no labels: leave {path}, names of them, out")
    try:
        with open(path, "rb") as f:
            data = f.read(_LARGEST + 1)
    except OSError as error:
        raise DataError(f"cannot read the {what} names {path}: {error.strerror}") from None
    if len(data) > _LARGEST:
        raise DataError(f"{path} is no list of {what} names: it has more than {_LARGEST:,} bytes")
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"the {what} names {path} are not UTF-8 text: {error}") from None
    names = tuple(line.strip() for line in (lines[:-1] if not lines[-1] else lines))
    if len(names) > classes:
        raise DataError(
            f"{path} has {len(names):,} names, and the data set {classes:,} {what} classes: ids "
            "count from 0, without a background class; take such a line out"
        )
    return names

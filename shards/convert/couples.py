"""Two images that share their sentences: listed each, with the features, and built as one record.

A row of the table `couple` says which are one. Joined, they are a row of the table `image` in the
place of the first.
"""

from __future__ import annotations

import sqlite3

from shards.errors import DataError

TABLE = """
create table couple (image text primary key, first text not null, second text not null);
"""
ALONE = "id not in (select first from couple) and id not in (select second from couple)"
"""Of images: in no couple."""

# `second` has what a reader needs beside: [[name of the first], [name, file, position, place,
# objects, version]].
_JOIN = """
insert into image (name, id, file, position, place, version, objects, split, of_vg, second)
select c.image, c.image, a.file, a.position, a.place, a.version, a.objects + b.objects,
    coalesce(a.split, b.split), 0,
    json_array(json_array(a.name),
        json_array(b.name, b.file, b.position, b.place, b.objects, b.version))
from couple c join image a on a.id = c.first join image b on b.id = c.second order by a.number
"""


def add(database: sqlite3.Connection, image: str, first: str, second: str) -> None:
    """Two images, and what both are called."""
    database.execute("insert or ignore into couple values (?, ?, ?)", (image, first, second))


def remove(database: sqlite3.Connection, image: str) -> None:
    """Forget the couples that an image is in, with their sentences."""
    of = "select image from couple where first = ? or second = ?"
    database.execute(f"delete from text where image in ({of})", (image, image))
    database.execute("delete from couple where first = ? or second = ?", (image, image))


def are_there(database: sqlite3.Connection) -> bool:
    """Whether records are of two images each; DataError where some are and some are not."""
    if not database.execute("select 1 from couple limit 1").fetchone():
        return False
    single = "select image from text where image not in (select image from couple) limit 1"
    if row := database.execute(single).fetchone():
        raise DataError(
            f"some sentences are about two images, those of {row[0]!r:.120} about one: build two "
            "data sets of them"
        )
    return True


def join(database: sqlite3.Connection, skip_bad: bool) -> str:
    """Add an image for each two that share their sentences; which images are then single ones.
    DataError for one without features, unless such are left out."""
    (last,) = database.execute("select coalesce(max(number), 0) from image").fetchone()
    missing = database.execute(
        "select i from (select first i from couple union select second from couple) "
        "where i not in (select id from image) limit 1"
    ).fetchone()
    if missing and not skip_bad:
        raise DataError(
            f"image {missing[0]!r:.120} of two has no features: name all feature files, or leave "
            "such out with --skip-bad"
        )
    database.execute(_JOIN)
    return f"number <= {last}"

"""Create-only writes: one of any number of writers succeeds, on a real store and in a folder."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shards.errors import DataError
from shards.store import create, objects
from shards.store.create import (
    check_conditions,
    check_create_only,
    create_bytes,
    replace_bytes,
)
from shards.store.retry import Retry
from tests.object_store import FaultProxy, ObjectStore, first

FAST = Retry(base=0.01, cap=0.05, deadline=20)


@pytest.fixture
def s3(server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> str:
    """A real gateway's in `make test-faults`."""
    for key, value in server.environment.items():
        monkeypatch.setenv(key, value)
    return server.bucket


@pytest.fixture(params=["folder", "moto", pytest.param("gateway", marks=pytest.mark.faults)])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "folder":
        return str(tmp_path)
    store: ObjectStore = request.getfixturevalue(request.param)
    for key, value in store.environment.items():
        monkeypatch.setenv(key, value)
    return f"{store.bucket}/{tmp_path.name}"


def test_a_name_is_given_once(place: str) -> None:
    url = f"{place}/deep/name"
    assert create_bytes(url, b"one")
    assert not create_bytes(url, b"two")
    assert create_bytes(url, b"one"), "the reply to an earlier try was lost"
    assert objects.read_bytes(url) == b"one"
    assert objects.list_names(f"{place}/deep") == ["name"]
    large = os.urandom(20 << 20)
    assert create_bytes(f"{place}/large", large)
    assert objects.read_bytes(f"{place}/large") == large


def test_one_of_many_writers_wins(place: str) -> None:
    writers = 12
    start = threading.Barrier(writers)

    def write(number: int, url: str) -> bool:
        start.wait()
        return create_bytes(url, b"%d" % number, FAST)

    with ThreadPoolExecutor(writers) as pool:
        for race in range(20):
            url = f"{place}/race-{race}"
            won = list(pool.map(write, range(writers), [url] * writers))
            assert sum(won) == 1
            assert objects.read_bytes(url) == b"%d" % won.index(True)


@pytest.mark.parametrize("kind", ["lost", "reset", "503"])
def test_a_lost_reply_is_no_other_writer(s3: str, proxy: FaultProxy, kind: str) -> None:
    proxy.begin(first(2, kind))
    assert create_bytes(f"{s3}/reply-{kind}", b"one", FAST)
    proxy.begin(first(2, kind))
    assert not create_bytes(f"{s3}/reply-{kind}", b"two", FAST)


def test_a_conflict_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [409, 409, None]

    def put(*_: object) -> None:
        if status := answers.pop(0):
            error = OSError("ConditionalRequestConflict")
            vars(error)["response"] = {"ResponseMetadata": {"HTTPStatusCode": status}}
            raise error

    monkeypatch.setattr(create, "_put_new", put)
    assert create_bytes("s3://bucket/name", b"", FAST) and not answers


def test_a_store_that_can_do_it_is_told_from_one_that_cannot(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_create_only(place)
    assert not objects.list_names(place)
    if "://" in place:
        monkeypatch.setattr(create, "_put_new", lambda u, d, _: objects.write_bytes(u, d))
        message = r"http://127.* overwrites objects in spite of If-None-Match"
    else:

        def link(*_: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
        message = "runs need a file system with hard links"
    with pytest.raises(DataError, match=message):
        check_create_only(place)
    assert not objects.list_names(place)


# --- replacing ------------------------------------------------------------------------------------


def test_what_was_read_is_replaced_and_nothing_else(place: str) -> None:
    url = f"{place}/deep/manifest"
    assert not replace_bytes(url, b"two", "0" * 32, FAST), "there is nothing to replace"
    assert replace_bytes(url, b"one", None, FAST) and not replace_bytes(url, b"other", None, FAST)
    data, tag = objects.read_tagged(url)
    assert data == b"one" and replace_bytes(url, b"two", tag, FAST)
    assert not replace_bytes(url, b"three", tag, FAST), "another writer was first"
    assert replace_bytes(url, b"two", tag, FAST), "the reply to an earlier try was lost"
    assert objects.read_tagged(url)[0] == b"two"
    assert not [n for n in objects.list_names(f"{place}/deep") if n != "manifest"]


def test_one_of_many_replacers_wins(place: str) -> None:
    writers = 12
    start = threading.Barrier(writers)
    url = f"{place}/raced"
    create_bytes(url, b"first")

    def write(number: int, tag: str) -> bool:
        start.wait()
        return replace_bytes(url, b"%d" % number, tag, FAST)

    with ThreadPoolExecutor(writers) as pool:
        for race in range(20):
            tag = objects.read_tagged(url)[1]
            own = [race * 1000 + i for i in range(writers)]  # never what is there already
            won = list(pool.map(write, own, [tag] * writers))
            assert sum(won) == 1
            assert objects.read_bytes(url) == b"%d" % own[won.index(True)]


@pytest.mark.parametrize("kind", ["lost", "reset", "503"])
def test_a_lost_reply_to_a_replacement_is_no_other_writer(
    s3: str, proxy: FaultProxy, kind: str
) -> None:
    url = f"{s3}/replaced-{kind}"
    assert create_bytes(url, b"one", FAST)
    tag = objects.read_tagged(url)[1]
    proxy.begin(first(2, kind))
    assert replace_bytes(url, b"two", tag, FAST)
    proxy.begin(first(2, kind))
    assert not replace_bytes(url, b"three", tag, FAST)


def test_a_store_that_ignores_conditions_is_refused(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_conditions(place)
    assert not objects.list_names(place)
    if "://" not in place:
        return
    monkeypatch.setattr(create, "_put_in_place", lambda u, d, *_: objects.write_bytes(u, d))
    with pytest.raises(DataError, match=r"overwrites objects in spite of If-Match"):
        check_conditions(place)
    assert not objects.list_names(place)

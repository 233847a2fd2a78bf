"""A data set of any number of shards that no disk holds: an S3 server makes their bytes as asked.

Every shard is one real shard, built once, but for its number, which stands in the last bytes of its
tar and of its table's tokens: so each has content and hashes of its own, as real ones have.
"""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.format.arrays import array_sizes, map_arrays
from shards.format.build import BuildSettings, build
from shards.format.manifest import Counts, Manifest, load_manifest, with_pages
from shards.format.record import ImageRecord, Sentence
from shards.format.shard_list import ShardList

BUCKET = "simulated"
_TABLE = "table.safetensors"
# The tokens that hold a shard's number, and which of the vocabulary they are.
_DIGITS, _BASE, _LEAST = 5, 32, 10


def _records(images: int, sentences: int) -> Iterator[ImageRecord]:
    """Images of two objects with so many sentences each."""
    rng = np.random.default_rng(0)
    words = [a + b for a in "bdfgklmnprst" for b in ("a", "en", "il", "o", "ur")]
    for i in range(images):
        rows = rng.choice(words, (sentences, 9))
        yield ImageRecord(
            image=f"image{i}",
            width=640,
            height=480,
            boxes=np.asarray([[0, 0, 0.5, 0.5], [0.2, 0.2, 1, 1]], dtype=np.float32),
            features=rng.random((2, 8)).astype(np.float16),
            sentences=tuple(Sentence(" ".join(row), "cap") for row in rows.tolist()),
        )


@dataclasses.dataclass(frozen=True)
class Template:
    """The shard that all others are made from."""

    tar: bytes
    table: bytes
    at: int
    """Where the number begins in the table."""

    def file(self, name: str) -> bytes | None:
        """The bytes of a tar or table by its name; None for another name."""
        found = re.fullmatch(r"shard-(\d+)\.(tar|table\.safetensors)", name)
        if not found:
            return None
        number = int(found[1])
        if found[2] == "tar":
            return self.tar[:-8] + number.to_bytes(8, "little")
        digits = [_LEAST + number // _BASE**i % _BASE for i in range(_DIGITS)]
        place = np.asarray(digits, dtype="<u2").tobytes()
        return self.table[: self.at] + place + self.table[self.at + len(place) :]

    def hashes(self, names: list[str]) -> NDArray[np.uint8]:
        """sha256 of tars or of tables, (names, 32)."""
        tar = names[0].endswith(".tar")
        # What all have in common is hashed once.
        same = len(self.tar) - 8 if tar else self.at
        begun = hashlib.sha256((self.tar if tar else self.table)[:same])
        out = np.empty((len(names), 32), dtype=np.uint8)
        for row, name in zip(out, names, strict=True):
            whole = begun.copy()
            whole.update((self.file(name) or b"")[same:])
            row[:] = np.frombuffer(whole.digest(), dtype=np.uint8)
        return out


def simulate(folder: Path, shards: int, images: int, sentences: int) -> tuple[Template, Manifest]:
    """Make `folder` the place of a data set of so many shards of images x sentences pairs, but for
    the shards themselves."""
    settings = BuildSettings("simulated", "simulated", shard_bytes=1 << 40)
    build(_records(images, sentences), folder / "one", settings)
    one = load_manifest(str(folder / "one"))
    info = one.shards[0]
    tar, table = (next((folder / "one").rglob(n)) for n in (info.name, info.table))
    (folder / "set").mkdir()
    for file in (one.vocab, one.answers):
        path = next((folder / "one").rglob(file.file))
        (folder / "set" / file.file).write_bytes(path.read_bytes())
    template = Template(tar.read_bytes(), table.read_bytes(), _last_tokens(table))
    names = [f"shard-{i:06d}" for i in range(shards)]
    first = one.shards[:1]
    many = {f.name: getattr(first, f.name) for f in dataclasses.fields(first)}
    many = {k: v if k == "sources" else np.repeat(v, shards, 0) for k, v in many.items()}
    for column, hashes, kind in (("name", "sha256", "tar"), ("table", "table_sha256", _TABLE)):
        many[column] = np.asarray([f"{n}.{kind}" for n in names], "S")
        many[hashes] = template.hashes([f"{n}.{kind}" for n in names])
    listed = ShardList(**many)
    totals = dict(zip(one.sources, listed.pairs_per_source.sum(0).tolist(), strict=True))
    counts = Counts(int(listed.images.sum()), int(listed.pairs.sum()), totals)
    manifest = dataclasses.replace(one, shards=listed, counts=counts, folder="")
    manifest = with_pages(manifest, folder / "set")
    (folder / "set" / "manifest.json").write_bytes(manifest.to_json())
    return template, manifest


def _last_tokens(table: Path) -> int:
    """Where the last tokens of a table begin that can hold a number."""
    tokens, content = map_arrays(table)["tokens"], table.read_bytes()
    at = content.rindex(tokens[-_DIGITS:].tobytes())
    assert array_sizes(table)["tokens"] > _DIGITS and content.count(tokens[-99:].tobytes()) == 1
    return at


# --- the store ----------------------------------------------------------------------------------


@contextmanager
def serving(folder: Path, template: Template) -> Iterator[str]:
    """A process that serves the data set as an S3 store does, which the environment then names;
    its URL."""
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("fork").Process(
        target=_serve, args=(folder / "set", template, theirs), daemon=True
    )
    server.start()
    given = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ours.recv()}",
        "AWS_ACCESS_KEY_ID": "simulated",
        "AWS_SECRET_ACCESS_KEY": "simulated",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {key: os.environ.get(key) for key in given}
    os.environ.update(given)
    try:
        yield f"s3://{BUCKET}"
    finally:
        server.terminate()
        server.join()
        for key, value in before.items():
            if value is None:
                os.environ.pop(key)
            else:
                os.environ[key] = value


def _serve(folder: Path, template: Template, pipe: Connection) -> None:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            name = self.path.partition("?")[0].removeprefix(f"/{BUCKET}/")
            data = template.file(name)
            if data is None and (folder / name).is_file():
                data = (folder / name).read_bytes()
            if data is None:
                self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            elif asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                begin, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
                self.extra = f"bytes {begin}-{end}/{len(data)}"
                self._answer(206, data[begin : end + 1])
            else:
                self._answer(200, data)

        do_HEAD = do_GET  # noqa: N815

        def _answer(self, status: int, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.md5(self.path.encode()).hexdigest()}"')
            self.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
            self.send_header("Accept-Ranges", "bytes")
            if status == 206:
                self.send_header("Content-Range", self.extra)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    pipe.send(server.server_address[1])
    server.serve_forever()

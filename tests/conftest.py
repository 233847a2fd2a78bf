"""Fixtures that several test files share."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from shards.format.manifest import load_manifest
from shards.format.record import ImageRecord, Labels, Sentence
from shards.store import objects
from tests.object_store import (
    SHARED,
    FaultProxy,
    ObjectStore,
    moto_server,
    radosgw,
    why_no_radosgw,
)

COSTS: list[str] = []
"""Lines about what a fault cost, shown when all tests have ended."""


def note_cost(what: str, seconds: float | None) -> None:
    COSTS.append(f"{what:<60}{'not seen' if seconds is None else f'{seconds:8.1f} s'}")


def pytest_configure() -> None:
    """A shell's job in the background ignores Ctrl-C, as would the processes that tests start."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Where there is no GPU, Triton's kernels are interpreted. It reads this when it is imported,
    # which may be by another package.
    os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidia0").exists() else "1")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if COSTS:
        terminalreporter.section("what faults cost: seconds to the next step, or as said")
        for line in COSTS:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real sample files that lies beside the repository."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs ../shared/data, which is not part of the repository")
    return SHARED / "data"


@pytest.fixture(scope="session")
def moto() -> Iterator[ObjectStore]:
    with moto_server() as server:
        yield server


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A real S3 gateway."""
    if reason := why_no_radosgw():
        pytest.skip(reason)
    with radosgw(tmp_path_factory.mktemp("radosgw")) as server:
        yield server


@pytest.fixture(scope="session", params=["moto", pytest.param("gateway", marks=pytest.mark.faults)])
def server(request: pytest.FixtureRequest) -> ObjectStore:
    """moto in `make test`, a real gateway in `make test-faults`."""
    found: ObjectStore = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="session")
def s3(moto: ObjectStore) -> Iterator[str]:
    """URL of a bucket on moto's server; exports endpoint and credentials."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in moto.environment.items():
            patch.setenv(key, value)
        yield moto.bucket


@pytest.fixture
def proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the server of `s3`, which clients take from now on."""
    server = FaultProxy(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    yield server
    server.down()


@pytest.fixture
def said() -> Iterator[list[logging.LogRecord]]:
    """What the project's log says during the test. (pytest's own way depends on whether another
    test has set the log up for a command.)"""
    records: list[logging.LogRecord] = []
    logger, handler = logging.getLogger("lxscale"), logging.Handler(logging.INFO)
    handler.emit = records.append  # type: ignore[assignment, method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield records
    logger.setLevel(level)
    logger.removeHandler(handler)


MakeRecords = Callable[..., list[ImageRecord]]


def small_records(
    n: int, labels: bool = False, feature_dim: int = 8, seed: int = 0
) -> list[ImageRecord]:
    """n image records, of which the questions have answers and the captions have none."""
    rng = np.random.default_rng(seed)
    words = ["a", "red", "green", "blue", "small", "circle", "line", "on", "the", "left"]
    records = []
    for i in range(n):
        objects = int(rng.integers(1, 5))
        corners = np.sort(rng.random((objects, 2, 2)), axis=1).reshape(objects, 4)
        captions = [
            Sentence(" ".join(rng.choice(words, size=int(rng.integers(1, 9)))), "coco_cap")
            for _ in range(int(rng.integers(0, 3)))
        ]
        color = str(rng.choice(["red", "green", "blue"]))
        questions = [Sentence(f"what color is it {i}?", "vqa", {color: 1.0, "rare": 0.3}, i)]
        records.append(
            ImageRecord(
                image=f"pictures/image {i}.png",
                width=640,
                height=480,
                boxes=corners.astype(np.float32),
                features=rng.random((objects, feature_dim)).astype(np.float16),
                sentences=(*captions, *questions),
                labels=Labels(
                    rng.integers(0, 1600, objects).astype(np.int32),
                    rng.random(objects, dtype=np.float32),
                    rng.integers(0, 400, objects).astype(np.int32),
                    rng.random(objects, dtype=np.float32),
                )
                if labels
                else None,
            )
        )
    return records


def files_of(folder: Path) -> Path:
    """Where the files of a data set in a folder are, but for the manifest."""
    return Path(load_manifest(str(folder)).place(str(folder)))


def contents(folder: Path) -> dict[str, str]:
    """The files of a data set, the manifest's fingerprint among them."""
    files = sorted(files_of(folder).iterdir())
    manifest = {"fingerprint": load_manifest(str(folder)).fingerprint}
    return manifest | {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def upload_set(folder: Path, url: str) -> None:
    """A copy of a data set in the store."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        objects.upload(path, objects.join(url, str(path.relative_to(folder))))


@pytest.fixture(scope="session")
def make_records() -> MakeRecords:
    """`small_records`, for tests."""
    return small_records


def subprocess_environment(**changes: str) -> dict[str, str]:
    """The environment for a child process that imports the packages of this repository."""
    root = str(Path(__file__).parents[1])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **changes}

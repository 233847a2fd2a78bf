"""What a watch does about all that it may find, what a job is given, and clusters that are none."""

from __future__ import annotations

import itertools
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import watch
from cluster.cli.main import main
from cluster.errors import AwayError, LaunchError
from cluster.job_server import Job
from cluster.jobs import How, attempt_id, config_at, entrypoint, job_environment, portable
from cluster.watch import Decision, Facts, decide, pause
from shards.errors import NotFoundError
from tests.ranks import config_tree
from trainer.config import RunConfig, parse_config, read_config
from trainer.run_status import RunStatus
from trainer.setup import note_run, run_url

URL = "s3://bucket/runs/tiny"
RUN = RunStatus(URL, "dead", 40, 100, "a000002-000003", 1.0, 2, "host a, process 1")
NEVER = Job("lxscale-tiny-1", URL, "tiny", "FAILED")

# What each number that a command ends with leads to (docs/cluster.md), where the run is not done.
ENDS = {
    0: "submit",
    2: "end",
    126: "end",
    127: "end",
    **dict.fromkeys((1, 3, 75, 130, 138, 143, -9, -15, None), "submit"),
}
JOBS = {
    "none": (),
    "pending": (replace(NEVER, status="PENDING"),),
    "running": (replace(NEVER, status="RUNNING"),),
    "stopped": (replace(NEVER, status="STOPPED"),),
    **{
        f"ended {code}": (
            replace(NEVER, status="FAILED" if code != 0 else "SUCCEEDED", exit_code=code),
        )
        for code in ENDS
    },
    "away": None,
}
RUNS = {
    **{s: replace(RUN, state=s) for s in ("new", "running", "done", "stopped", "dead")},
    "length unknown": replace(RUN, total=None),
    "missing": None,
    "store away": None,
}


def expected(jobs: str, run: str) -> str:
    """What a person would do."""
    if jobs in ("pending", "running") or run == "running":
        return "wait"
    if run == "done":
        return "end"
    if run == "missing" and jobs in ("none", "away"):
        return "end"
    if jobs == "away" or run == "store away":
        return "wait"
    if jobs == "stopped" or run == "missing":
        return "end"
    if jobs == "ended 0" and run == "length unknown":
        return "end"
    return "submit" if jobs == "none" else ENDS[eval(jobs.removeprefix("ended "))]


@pytest.mark.parametrize(("jobs", "run"), list(itertools.product(JOBS, RUNS)))
def test_every_state_of_jobs_and_run_has_its_answer(jobs: str, run: str) -> None:
    away = "no answer" if "away" in (jobs, run.removeprefix("store ")) else ""
    facts = Facts(JOBS[jobs], RUNS[run], away, missing=run == "missing")
    found = decide(facts, 5)
    assert found.do == expected(jobs, run), found
    assert found.text and "\n" not in found.text
    if found.do == "end":
        done = run == "done" or jobs == "ended 0"
        person = jobs == "stopped" and run != "done"
        assert found.status == (3 if person else 2 if run == "missing" or not done else 0), found


def test_a_job_that_ended_for_good_is_told_by_its_last_error() -> None:
    log = "error: first\nTraceback\nerror: no such data set\n"
    job = replace(NEVER, exit_code=2, message=f"last available logs:\n{log}")
    found = decide(Facts((job,), RUN), 5)
    assert (found.do, found.status) == ("end", 2) and found.text.endswith(": no such data set")


def test_jobs_without_a_new_checkpoint_are_counted() -> None:
    """From the job list alone; a checkpoint in between makes them none."""
    job = replace(NEVER, exit_code=75)
    for tries in range(1, 6):
        found = decide(Facts((job,), RUN), 5)
        assert (found.do, found.tries) == ("submit", tries)
        job = replace(job, tries=found.tries, generation=RUN.generation)
    found = decide(Facts((job,), RUN), 5)
    assert (found.do, found.status) == ("end", 1) and "5 jobs in a row" in found.text
    further = replace(RUN, generation="a000003-000001")
    assert decide(Facts((job,), further), 5).tries == 1
    assert decide(Facts((replace(NEVER, exit_code=75),), RUN), 0).status == 1


def test_pauses_grow_and_end() -> None:
    for n in range(1, 40):
        assert 0 < pause(n) <= min(300, 2**n) and pause(n) >= min(300, 2**n) / 2 * 0.99
    assert len({pause(3) for _ in range(9)}) > 1


# --- two of them, and a cluster that comes and goes -----------------------------------------------


class Server:
    """Of a cluster that takes an id once."""

    def __init__(self) -> None:
        self.all: list[Job] = []
        self.up = True

    def __call__(self, _address: str | None) -> Server:
        if not self.up:
            raise AwayError("cannot reach it")
        return self

    def jobs(self) -> list[Job]:
        return list(self.all)

    def job(self, id_: str) -> Job:
        found = [job for job in self.all if job.id == id_]
        if not found:
            raise LaunchError("404")
        return found[0]

    def submit(self, id_: str, _entrypoint: str, _environment: dict[str, str], of: Job) -> None:
        if any(job.id == id_ for job in self.all):
            raise LaunchError(f"{id_} already exists")
        self.all.append(replace(of, id=id_, status="RUNNING", started=len(self.all)))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_LOOK_S", "_AWAY_S", "_FIRST_S", "_LONGEST_S"):
        monkeypatch.setattr(watch, name, 0.01)


def configured(folder: Path) -> RunConfig:
    config = portable(parse_config(config_tree(folder / "set", folder, "tiny"), "test"))
    note_run(config)
    return config


def test_a_full_cluster_ends_no_watch_and_a_crash_loop_does() -> None:
    """A job that ends with 75 before it has begun an attempt is not counted, but waited longer."""

    def after(number: int, attempt: int) -> Decision:
        jobs: list[Job] = []
        for n in range(1, number + 1):
            tries = decide(Facts(tuple(jobs), run), 3).tries
            id_ = f"lxscale-x-a{attempt:06d}-{n}"
            jobs.append(
                Job(id_, run.url, "x", "FAILED", 75, tries=tries, generation=run.generation)
            )
        return decide(Facts(tuple(jobs), run), 3)

    run = replace(RUN, state="dead", attempt=2)
    full = after(20, attempt=3)
    assert full.do == "submit" and full.tries == 1 and full.jobs == 21
    assert after(2, attempt=2).do == "submit" and after(3, attempt=2).do == "end"


def test_two_watches_submit_each_job_once(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each job fails as it begins, but for the third, which ends the run; before it the cluster
    is lost with all that it knew."""
    config, server = configured(tmp_path), Server()
    url = run_url(config)
    state = [replace(RUN, url=url)]
    told: list[str] = []
    monkeypatch.setattr(watch, "JobServer", server)
    monkeypatch.setattr(watch, "run_status", lambda _: state[0])

    ends: list[Decision] = []

    def look_after() -> None:
        ends.append(watch.watch(url, None, How(), 5, told.append))

    watches = [threading.Thread(target=look_after, daemon=True) for _ in range(2)]
    for thread in watches:
        thread.start()

    def wait(until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not until():
            assert time.monotonic() < deadline, (told, server.all)
            time.sleep(0.005)

    for number in (1, 2):
        wait(lambda n=number: len(server.all) == n)
        time.sleep(0.1)
        assert len(server.all) == number
        server.all[-1] = replace(server.all[-1], status="FAILED", exit_code=75)
    ids = [job.id for job in server.all]
    assert ids[0].endswith("-a000003-1") and ids[1].endswith("-a000003-2")
    # For neither of them there was room: that is no crash.
    assert [job.tries for job in server.all] == [1, 1]
    server.up = False
    wait(lambda: any("cannot reach" in line for line in told))
    server.all.clear()
    server.up = True
    wait(lambda: len(server.all) == 1)
    state[0] = replace(state[0], state="done", step=100)
    server.all[0] = replace(server.all[0], status="SUCCEEDED", exit_code=0)
    for thread in watches:
        thread.join(10)
    assert [end.status for end in ends] == [0, 0] and len(server.all) == 1


def test_an_id_is_of_the_run_and_not_only_of_its_name() -> None:
    one = attempt_id("s3://a/x y/1", "x y/1", 8, [])
    assert one != attempt_id("s3://b/x y/1", "x y/1", 8, [])
    assert one.startswith("lxscale-x-y-1-") and one.endswith("-a000008-1")


# --- what a job is given --------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["pretrain", "vqa"])
def test_a_configuration_travels_whole_on_the_command_line(tmp_path: Path, task: str) -> None:
    odd = 'it\'s "so": {x}, [y] #1\nand $HOME `z` é'
    tree = config_tree(
        tmp_path / "set",
        tmp_path,
        "a name/with parts",
        optimizer={"lr": 1e-5, "no_decay": ["bias", odd]},
        data={"train": [{"url": "s3://b/one", "weight": 3}, {"url": "s3://b/two", "weight": 1}]},
        cluster={"workers": "1..4"},
    )
    tree["task"] = task
    if task == "pretrain":
        families = {"masked": 2, "matching": 1, "qa": 1}
        tree["sampler"] = {"mode": "alternating", "families": families}
    config = portable(parse_config(tree, "test"))
    words = shlex.split(entrypoint(config, How(python="/x y/python")))
    assert words[:5] == ["exec", "/x y/python", "-m", "cluster.cli", "train"]
    keys = [word for word in words[5:] if "=" in word]
    assert read_config(b"", "test", keys) == config
    assert read_config(b"", "test", keys).given() == config.given()
    with pytest.raises(LaunchError, match="does not fit on a command line"):
        tree["optimizer"] = {"no_decay": ["x" * 200_000]}
        entrypoint(parse_config(tree, "test"), How())


def test_credentials_go_along_only_when_that_is_wished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(
        config_tree(tmp_path / "set", tmp_path, "x", cluster={"stop_timeout_s": 100}), "test"
    )
    given = {
        "AWS_ENDPOINT_URL": "http://h:1",
        "AWS_ACCESS_KEY_ID": "secret-1",
        "AWS_SECRET_ACCESS_KEY": "secret-2",
        "AWS_SESSION_TOKEN": "secret-3",
        "LXSCALE_STORE_DEADLINE": "7",
        "LXSCALE_CACHE": "/here",
    }
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    told = job_environment(config, credentials=False)
    assert "secret" not in str(told) and "LXSCALE_CACHE" not in told
    assert told["AWS_ENDPOINT_URL"] == "http://h:1" and told["LXSCALE_STORE_DEADLINE"] == "7"
    assert int(told["RAY_JOB_STOP_WAIT_TIME_S"]) > 100
    # A run without its endpoint would look elsewhere.
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://me:secret-0@h:1")
    with pytest.raises(LaunchError, match="AWS_ENDPOINT_URL_S3 has a password") as caught:
        job_environment(config, credentials=False)
    assert "secret" not in str(caught.value)
    assert (
        job_environment(config, credentials=True).items()
        >= {k: v for k, v in given.items() if k.startswith("AWS_")}.items()
    )


def test_a_runs_storage_is_enough_to_submit_it_anywhere(tmp_path: Path) -> None:
    config = configured(tmp_path)
    url = run_url(config)
    # As a worker wrote it, on a machine that had its events in a folder of its own.
    stored = Path(url, "config.yaml")
    tree = config.model_dump(mode="json")
    tree["run"]["tensorboard"] = str(tmp_path / "runs" / "tiny" / "tensorboard")
    stored.write_text(yaml.safe_dump(tree))
    found = config_at(url, ["cluster.workers=3"])
    assert found.cluster.workers == 3 and found.run.tensorboard is None
    assert found.data.cache == config.data.cache and run_url(found) == url
    tree["run"]["tensorboard"] = str(tmp_path / "events")
    stored.write_text(yaml.safe_dump(tree))
    assert config_at(url).run.tensorboard == str(tmp_path / "events")
    moved = tmp_path / "moved"
    Path(url).rename(moved)
    with pytest.raises(ValueError, match=r"moved or copied.*run\.storage="):
        config_at(str(moved))
    assert run_url(config_at(str(moved), ["run.name=moved"])) == str(moved)
    with pytest.raises(NotFoundError, match="is no run"):
        config_at(url)


# --- clusters that are none -----------------------------------------------------------------------


@pytest.fixture
def web() -> Iterator[str]:
    """A server that is no Ray."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class _Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "http://127.0.0.1:1/", "auto", "ray://h:1", "http://", "web"]
)
def test_an_address_without_a_job_server_is_one_line_at_once(
    address: str,
    web: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # An option counts before the environment.
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://elsewhere:1")
    address = web if address == "web" else address
    url = run_url(configured(tmp_path))
    for command in (["logs", "x"], ["stop", "x"], ["resubmit", url], ["status", url]):
        began = time.monotonic()
        assert main([*command, "--ray-address", address]) == 2
        assert time.monotonic() - began < 20
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and address.strip("/") in line and "elsewhere" not in line
        assert "dashboard" in line

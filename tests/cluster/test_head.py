"""An address without a Ray that can be joined: one clear line, in time, whatever is there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import ExitStack, closing
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray

from cluster.errors import AgainError, LaunchError
from cluster.head import host_and_port, reach
from tests.conftest import subprocess_environment
from tests.object_store import free_port


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("ray://127.0.0.1:10001", "Ray Client does not do here"),
        ("http://127.0.0.1:8265", "a dashboard's"),
        ("https://user:secret@head", "a dashboard's"),
        ("local", "leave --ray-address out"),
        ("10.0.0.1", "give HOST:PORT"),
        ("head", "give HOST:PORT"),
        (":6379", "give HOST:PORT"),
        ("head:port", "give HOST:PORT"),
        ("head:99999", "give HOST:PORT"),
        ("tcp://head:6379", "give HOST:PORT"),
        ("", "give HOST:PORT"),
    ],
)
def test_an_address_of_another_form_says_which_it_has_to_have(address: str, says: str) -> None:
    with pytest.raises(LaunchError, match=says) as caught:
        host_and_port(address)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
    assert host_and_port("[::1]:6379") == ("::1", 6379)
    assert host_and_port("head.example:6379") == ("head.example", 6379)


REFUSED = "127.0.0.1:1"


def no_answer(stack: ExitStack) -> str:
    """Takes connections and says nothing."""
    s = stack.enter_context(closing(socket.create_server(("127.0.0.1", 0))))
    return f"127.0.0.1:{s.getsockname()[1]}"


def black_hole(stack: ExitStack) -> str:
    """A socket whose queue is full: the kernel answers no more, as where packets are dropped."""
    s = stack.enter_context(closing(socket.socket()))
    s.bind(("127.0.0.1", 0))
    s.listen(0)
    for _ in range(3):
        waiting = stack.enter_context(closing(socket.socket()))
        waiting.setblocking(False)
        waiting.connect_ex(s.getsockname())
    return f"127.0.0.1:{s.getsockname()[1]}"


def web(stack: ExitStack) -> str:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Quiet))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stack.callback(server.shutdown)
    return f"127.0.0.1:{server.server_port}"


def other_grpc(stack: ExitStack) -> str:
    import grpc

    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    stack.callback(server.stop, None)
    return f"127.0.0.1:{port}"


PLACES: dict[str, tuple[Callable[[ExitStack], str], str]] = {
    "refused": (lambda _: REFUSED, "Connection refused"),
    "silent": (no_answer, "timed out"),
    "black hole": (black_hole, "timed out"),
    "web": (web, "another kind of server"),
    "grpc": (other_grpc, "another kind of server"),
    "no name": (lambda _: "no-such-head.invalid:6379", "name no-such-head.invalid"),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_head_is_one_line(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time for which a head is waited for is cut short; the next test has it whole."""
    monkeypatch.setattr("cluster.head._REACH_S", 0.1)
    make, says = PLACES[place]
    with ExitStack() as stack, pytest.raises(LaunchError, match=says) as caught:
        address = make(stack)
        reach(address, lambda: False)
    assert str(caught.value).startswith(f"cannot join Ray at {address}: ")
    assert "\n" not in str(caught.value)


def test_a_stop_ends_the_wait() -> None:
    with pytest.raises(AgainError):
        reach(REFUSED, lambda: True)


# --- by the command, in all of its time ---------------------------------------------------------


def joins(tmp_path: Path, address: str, *within: str, **environment: str) -> tuple[str, float]:
    """What `lxscale train` says, and the seconds that it takes for it beside its own start, which
    depends on what else the machine does."""
    _, start = command(tmp_path, "local", *within, **environment)
    said, whole = command(tmp_path, address, *within, **environment)
    return said, whole - start


def command(tmp_path: Path, address: str, *within: str, **environment: str) -> tuple[str, float]:
    """Ends with 2."""
    config = tmp_path / "run.yaml"
    place = tmp_path / "runs"
    config.write_text(
        f"run: {{storage: {place}}}\ndata: {{train: {tmp_path}}}\ntrain: {{steps: 1}}"
    )
    began = time.monotonic()
    done = subprocess.run(
        [*within, sys.executable, "-m", "cluster.cli", "train", config, "--ray-address", address],
        env=subprocess_environment(**environment),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stdout == "" and done.stderr.count("\n") == 1, (done.stdout, done.stderr)
    return done.stderr, time.monotonic() - began


@pytest.mark.faults
@pytest.mark.parametrize("place", PLACES)
def test_the_command_says_so_in_time(place: str, tmp_path: Path) -> None:
    make, says = PLACES[place]
    with ExitStack() as stack:
        said, seconds = joins(tmp_path, make(stack))
    assert says in said and seconds < 25, (said, seconds)


@pytest.fixture
def silent_resolver(tmp_path: Path) -> Iterator[list[str]]:
    """What runs a command where no name server answers."""
    if os.geteuid():
        pytest.skip("needs root, for a mount of its own")
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as s:
        s.bind(("127.0.0.211", 53))
        (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.211\noptions timeout:30\n")
        mount = f'mount --bind {tmp_path}/resolv.conf /etc/resolv.conf && exec "$@"'
        yield ["unshare", "--mount", "sh", "-c", mount, "sh"]


@pytest.mark.faults
def test_a_resolver_that_hangs_is_one_line_in_time(
    silent_resolver: list[str], tmp_path: Path
) -> None:
    said, seconds = joins(tmp_path, "head.example:6379", *silent_resolver)
    assert "head.example is not resolved" in said and seconds < 25, (said, seconds)


@pytest.mark.faults
def test_auto_without_a_cluster_is_one_line(tmp_path: Path) -> None:
    """In a process namespace of its own: Ray looks for others' processes."""
    if os.geteuid():
        pytest.skip("needs root, for a process namespace")
    within = ("unshare", "--pid", "--fork", "--mount-proc")
    said, seconds = joins(tmp_path, "auto", *within, RAY_TMPDIR=str(tmp_path))
    assert "no Ray runs on this machine" in said and seconds < 25, (said, seconds)


# --- a token ------------------------------------------------------------------------------------


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[str]:
    """The address of a Ray that asks for a token."""
    port, log = free_port(), tmp_path / "ray.log"
    address = f"{ray.util.get_node_ip_address()}:{port}"
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    options = [f"--port={port}", "--num-cpus=0", "--include-dashboard=false"]
    options += [f"--ray-client-server-port={free_port()}", "--disable-usage-stats"]
    options += [f"--object-store-memory={80 << 20}"]
    with log.open("w") as output:
        process = subprocess.Popen(
            start + options,
            stdout=output,
            stderr=output,
            env=subprocess_environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="right" * 8),
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 90
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.faults
def test_a_token_that_is_not_here_is_one_line_with_the_remedy(
    guarded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    home = {"HOME": str(tmp_path / "home")}
    (tmp_path / "home" / ".ray").mkdir(parents=True)
    wrong = {**home, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "wrong" * 8}
    for environment in (home, wrong, {**home, "RAY_AUTH_MODE": "token"}):
        said, seconds = joins(tmp_path, guarded, **environment)
        assert "token" in said and "RAY_AUTH_TOKEN" in said and seconds < 25, (said, seconds)
        assert "right" not in said and "wrong" not in said
    # Ray itself takes a token that is in the home for `auto` alone.
    (tmp_path / "home" / ".ray" / "auth_token").write_text("right" * 8)
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "doctor", "--ray-address", guarded],
        env=subprocess_environment(**home),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0 and "asked for, and right" in done.stdout, done

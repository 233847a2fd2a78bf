"""A Ray of one node for one command: loopback only, in a folder of its own, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import ray
import ray._private.ray_constants as ray_constants
import torch
from ray._private.authentication import authentication_token_setup as tokens

from cluster import reaper
from cluster.errors import LaunchError, LostError
from shards.processes import STOP_SIGNALS, sweep_homes, without_signals
from shards.store.folders import owned_folder
from trainer.sections import ClusterSection

# Ray's object store carries a configuration and log lines here: its smallest size will do.
_OBJECT_STORE_BYTES = 80 << 20
_PREFIX = "lxscale-"
# Ray lets everybody into the folder that it is given: it gets one inside of ours, which lets in its
# owner alone.
_RAY = "ray"
# Below this folder Ray makes sockets, whose whole paths may have 107 bytes.
_LONGEST_ROOT = 20
_FAILED, _KEEP_FAILED_S = "-failed", 7 * 86400

# Ray asks for a token, which it would make in the user's home otherwise: there it has every later
# `ray start --head` ask for it, too, and nodes that do not have it stay out. One for this process,
# as Ray reads it once.
_TOKEN = secrets.token_hex(32)

_ENVIRONMENT = {
    # ray.init turns 127.0.0.1 into the address of a network card unless this says that there are
    # no other nodes; every server of Ray's then listens on loopback only.
    ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
    # By default workers run at nice 15 and starve beside anything else on the machine.
    "RAY_worker_niceness": "0",
    # Workers for tasks, of which there are none.
    "RAY_prestart_worker_first_driver": "0",
}


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables that are not set yet, for a while; child processes inherit them."""
    added = [key for key in values if key not in os.environ]
    os.environ.update({key: values[key] for key in added})
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


@contextlib.contextmanager
def local_ray(
    cluster: ClusterSection, folder: Path, started: Callable[..., AbstractContextManager[None]]
) -> Iterator[None]:
    """Have Ray `started` for cluster.workers workers, the fewest of a range at least, and end it.
    Cores may be over-subscribed, GPUs not.

    folder: of `scratch`; all that belongs to this Ray is in it.
    """
    gpus = torch.cuda.device_count() if cluster.gpus_per_worker else 0
    if cluster.fewest * cluster.gpus_per_worker > gpus:
        raise LaunchError(
            f"cluster.workers={cluster.workers} with cluster.gpus_per_worker="
            f"{cluster.gpus_per_worker:g} need more than the {gpus} GPUs of this machine: lower "
            "them, or join a cluster with --ray-address"
        )
    cores = int(cluster.fewest * cluster.cpus_per_worker + 0.999)
    session = str(folder)
    with without_signals(*STOP_SIGNALS):
        watch = reaper.start(folder)
    with environment({**_ENVIRONMENT, reaper.MARK: session}), _one_node(), _own_token():
        try:
            with started(
                address="local",
                include_dashboard=False,
                num_cpus=max(cores, os.cpu_count() or 1),
                num_gpus=gpus,
                object_store_memory=_OBJECT_STORE_BYTES,
                _temp_dir=str(folder / _RAY),
            ):
                _end_at_once()
                yield
        finally:
            reaper.reap(session)
            sweep_homes()
            reaper.stop(watch)


def _end_at_once() -> None:
    """Have Ray's daemons killed at the end: SIGTERM does not reach them, and is waited for."""
    node = ray._private.worker._global_node
    assert node
    kill = node.kill_all_processes
    node.kill_all_processes = lambda **_: kill(check_alive=False, allow_graceful=False)


def dead_daemon() -> str | None:
    """The name of one of Ray's daemons of this machine that a run cannot do without and that has
    ended, if any."""
    node = ray._private.worker._global_node
    dead: list[str] = [name for name, _ in node.dead_processes()] if node else []
    needed = (ray_constants.PROCESS_TYPE_GCS_SERVER, ray_constants.PROCESS_TYPE_RAYLET)
    return next((name for name in needed if name in dead), None)


@contextlib.contextmanager
def _own_token() -> Iterator[None]:
    """ray.init leaves its mode behind, with which a cluster that is joined next would be asked."""
    mode = tokens.AUTH_MODE_ENV_VAR
    given = mode in os.environ
    with environment({"RAY_AUTH_TOKEN": _TOKEN}):
        # What this process asked of another Ray before may have had another one.
        tokens.AuthenticationTokenLoader.instance().reset_cache()
        try:
            yield
        finally:
            if not given and mode in os.environ:
                del os.environ[mode]
                tokens.Config.initialize("")


@contextlib.contextmanager
def _one_node() -> Iterator[None]:
    """Ray read the variable when it was imported."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder with a short path; those of drivers that were killed are removed first.

    After a LaunchError it is kept, with the logs of Ray and of the workers, and the error names it.
    """
    root = Path(tempfile.gettempdir())
    if len(str(root)) > _LONGEST_ROOT and Path("/tmp").is_dir():
        root = Path("/tmp")
    with owned_folder(root, _PREFIX, _is_kept) as folder:
        try:
            yield folder
        except (LaunchError, LostError) as error:
            if not any((folder / _RAY).glob("session_*")):
                raise
            logs = folder.with_name(f"{folder.name}{_FAILED}")
            folder.rename(logs)
            raise type(error)(f"{error}. Logs of Ray and of the workers: {logs}") from error


def _is_kept(folder: Path) -> bool:
    """Whether a folder that nobody uses stays: a failed run's logs do for a week."""
    age = time.time() - folder.stat().st_mtime
    return folder.name.endswith(_FAILED) and age < _KEEP_FAILED_S

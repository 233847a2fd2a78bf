"""Placing a run on Ray: start or join a cluster, run the trainer in Ray Train workers, end cleanly.

Ray places, watches and restarts; checkpoints and tensors are the trainer's own. A worker that dies
costs a new attempt of the whole group, which goes on from the last committed generation; an error
of the user's ends the run at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from cluster.board import Board, WorkerSide, wait_for_lines
from cluster.errors import FINAL_ERRORS, LaunchError
from trainer.config import RunConfig, parse_config
from trainer.loop import Control, train
from trainer.progress import tensorboard_folder

Loop = Callable[[RunConfig, Control], dict[str, Any]]

# Ray's object store carries a configuration and log lines here: its smallest size will do.
_OBJECT_STORE_BYTES = 80 << 20
_RAY_FOLDER = "lxscale-ray-"


class FinalError(RuntimeError):
    """An error in a worker that no new attempt can mend; its text is the message for the user."""


class _EndOnUserErrors(DefaultFailurePolicy):
    """Retries lost workers as Ray does, but not errors of the user's."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if _final_message(training_failed_error):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class _Trainer(TorchTrainer):
    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        run_config: Any = self.run_config
        arguments["failure_policy"] = _EndOnUserErrors(run_config.failure_config)
        return super()._initialize_and_run_controller(**arguments)  # type: ignore[misc]


def _final_message(error: BaseException) -> str | None:
    """The text of a FinalError among the workers' failures."""
    if isinstance(error, WorkerGroupError):
        for failure in error.worker_failures.values():
            cause = getattr(failure, "_base_exc", failure)
            if isinstance(cause, FinalError):
                return str(cause)
    return None


def launch(config: RunConfig, *, ray_address: str | None = None, loop: Loop = train) -> dict:
    """Run `loop` in config.cluster.workers workers and return what rank 0's returns.

    The first SIGINT or SIGTERM asks for a clean stop (the loop saves and returns), the second
    aborts. Raises one of FINAL_ERRORS with the worker's message, or LaunchError.
    """
    config = absolute_paths(config)
    with _ray(config, ray_address), _scratch() as scratch:
        board: Any = ray.remote(num_cpus=0)(Board).remote()
        trainer = _Trainer(
            _work,
            train_loop_config={"config": config.given(), "board": board, "loop": loop},
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.cluster.workers,
                use_gpu=config.cluster.gpus_per_worker > 0,
                resources_per_worker=_resources(config),
            ),
            torch_config=TorchConfig(
                backend="cpu:gloo,cuda:nccl" if config.cluster.gpus_per_worker else "gloo",
                timeout_s=int(config.cluster.process_group_timeout_s),
            ),
            run_config=ray.train.RunConfig(
                name="lxscale",
                storage_path=scratch,
                failure_config=ray.train.FailureConfig(max_failures=config.cluster.max_failures),
            ),
        )
        failure: list[BaseException] = []

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:
                failure.append(error)

        # In a thread of its own, Ray Train leaves SIGINT to us.
        thread = threading.Thread(target=fit, name="lxscale-fit", daemon=True)
        with _stop_on_signal(board):
            thread.start()
            wait_for_lines(board, thread)
        if failure:
            raise _explain(failure[0], config)
        result: dict[str, Any] | None = ray.get(board.result.remote())
        if result is None:
            raise LaunchError("the workers ended without a result: see Ray's logs")
        return result


def _work(given: dict[str, Any]) -> None:
    """What runs in every worker: the loop, with the board around it."""
    side = WorkerSide(given["board"], logging.getLogger("lxscale"))
    rank = ray.train.get_context().get_world_rank()
    try:
        config = parse_config(given["config"], "the configuration")
        result = given["loop"](config, Control(side.should_stop))
        if rank == 0:
            ray.get(given["board"].finish.remote(result))
    except FINAL_ERRORS as error:
        raise FinalError(f"{type(error).__name__}:{error}") from error
    finally:
        side.close()


def _explain(error: BaseException, config: RunConfig) -> BaseException:
    """The one error to show for a failed run."""
    message = _final_message(error)
    if message is not None:
        name, _, text = message.partition(":")
        kinds = {kind.__name__: kind for kind in FINAL_ERRORS}
        return kinds.get(name, LaunchError)(text)
    if isinstance(error, TrainingFailedError):
        last = str(error).strip().splitlines()[-1]
        return LaunchError(
            f"the workers failed more than cluster.max_failures={config.cluster.max_failures} "
            f"times; the last failure: {last}. The same command goes on from the last checkpoint"
        )
    return error


def absolute_paths(config: RunConfig) -> RunConfig:
    """Local paths made absolute: workers have another working directory."""

    def absolute(path: str | None) -> str | None:
        return path if path is None or "://" in path else str(Path(path).absolute())

    given = config.given()
    given.setdefault("run", {})["tensorboard"] = str(tensorboard_folder(config).absolute())
    for section, keys in (
        ("run", ("storage",)),
        ("data", ("train", "validation", "cache")),
        ("train", ("init_from",)),
    ):
        for key in keys:
            value = absolute(getattr(getattr(config, section), key))
            if value is not None:
                given.setdefault(section, {})[key] = value
    return parse_config(given, "the configuration")


def _resources(config: RunConfig) -> dict[str, float]:
    resources = {"CPU": config.cluster.cpus_per_worker}
    if config.cluster.gpus_per_worker:
        resources["GPU"] = config.cluster.gpus_per_worker
    return resources


@contextlib.contextmanager
def _ray(config: RunConfig, address: str | None) -> Iterator[None]:
    """Join the Ray cluster at `address`, or start one on loopback and remove it at the end."""
    cluster = config.cluster
    environment = {
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(cluster.health_check_interval_s),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(cluster.start_timeout_s),
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Worker processes share the cores: without this each would take all of them.
        "OMP_NUM_THREADS": str(max(1, int(cluster.cpus_per_worker))),
    }
    for key, value in environment.items():
        os.environ.setdefault(key, value)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    folder = None
    if address:
        options["address"] = address
    else:
        _remove_leftovers()
        # Sockets live below it, and their paths may not be long.
        folder = tempfile.mkdtemp(prefix=f"{_RAY_FOLDER}{os.getpid()}-")
        needed = int(cluster.workers * cluster.cpus_per_worker + 0.999)
        options |= {
            "address": "local",
            "_node_ip_address": "127.0.0.1",
            "include_dashboard": False,
            "num_cpus": max(needed, os.cpu_count() or 1),
            "num_gpus": torch.cuda.device_count() if cluster.gpus_per_worker else 0,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "_temp_dir": folder,
        }
    try:
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise LaunchError(
                f"cannot {'join Ray at ' + address if address else 'start Ray'}: {first}"
            ) from error
        yield
    finally:
        ray.shutdown()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers() -> None:
    """Remove the folders of Rays whose driver was killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_RAY_FOLDER}*"):
        pid = path.name.removeprefix(_RAY_FOLDER).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    """Ray Train wants a place for its ledger; ours is the trainer's, so this one is thrown away."""
    folder = tempfile.mkdtemp(prefix="lxscale-train-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _stop_on_signal(board: Any) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks the workers to save and stop; the second raises here."""
    asked = False

    def handle(number: int, _frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        print("stopping: the workers save a checkpoint; once more to abort", flush=True)
        board.stop.remote()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)

"""Placing a run on Ray: start or join a cluster, run the trainer in Ray Train workers, end cleanly.

Ray places, watches and restarts; checkpoints and tensors are the trainer's own. A worker that dies
costs a new attempt of the whole group, which goes on from the last committed generation; an error
of the user's ends the run at once.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.driver_channel import DriverChannel, WorkerChannel, follow
from cluster.errors import FINAL_ERRORS, LaunchError
from cluster.local_ray import environment, local_ray, scratch
from trainer.checkpoint.owner import Claimant, check_free
from trainer.config import RunConfig, parse_config
from trainer.loop import Control, TrainResult, train
from trainer.progress import tensorboard_folder
from trainer.setup import run_url

Loop = Callable[[RunConfig, Control], TrainResult]


class FinalError(RuntimeError):
    """An error in a worker that no new attempt can mend; its text is the message for the user."""


class _Policy(DefaultFailurePolicy):
    """Retries lost workers as Ray does, saying so, but not errors of the user's."""

    def __init__(self, failure_config: Any, channel: Any) -> None:
        super().__init__(failure_config)
        self._channel = channel

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if _final_message(training_failed_error):
            return FailureDecision.RAISE
        decision = super().make_decision(training_failed_error)
        if decision is FailureDecision.RETRY:
            cause = _cause(training_failed_error)
            self._channel.exchange.remote([f"{cause}; starting again"])
        return decision


class _Trainer(TorchTrainer):
    """Ray Train's trainer with our failure policy, for which it has no parameter."""

    channel: Any
    """The driver channel, on which the policy says what it does."""

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        run_config: Any = self.run_config
        arguments["failure_policy"] = _Policy(run_config.failure_config, self.channel)
        return super()._initialize_and_run_controller(**arguments)  # type: ignore[misc]


def _cause(error: TrainingFailedError) -> str:
    """Why the workers failed: which were lost, or else the traceback of those that raised."""
    if isinstance(error, WorkerGroupError):
        # Where one is lost, the others fail with broken connections.
        lost = [
            str(rank)
            for rank, failure in sorted(error.worker_failures.items())
            if isinstance(failure, WorkerHealthCheckFailedError | WorkerHealthCheckTimeoutError)
        ]
        if lost:
            return f"lost worker {', '.join(lost)} (killed, crashed, out of memory or unreachable)"
    elif isinstance(error, ControllerError):
        if isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
            return "no room for all workers within cluster.start_timeout_s"
        return str(error.controller_failure)
    return str(error).strip()


def _final_message(error: BaseException) -> str | None:
    """The text of a FinalError among the workers' failures."""
    if isinstance(error, WorkerGroupError):
        for failure in error.worker_failures.values():
            cause = getattr(failure, "_base_exc", failure)
            if isinstance(cause, FinalError):
                return str(cause)
    return None


def launch(
    config: RunConfig,
    *,
    ray_address: str | None = None,
    take_over: bool = False,
    loop: Loop = train,
) -> TrainResult:
    """Run `loop` in config.cluster.workers workers; returns the result of the loop on rank 0.

    ray_address: a Ray cluster to join; None starts a local one and ends it. take_over: the run from
    a job that is alive.
    The first SIGINT or SIGTERM asks for a clean stop (the loop saves and returns), the second
    aborts. Raises one of FINAL_ERRORS with the worker's message, or LaunchError.
    """
    config = absolute_paths(config)
    claimant = check_free(run_url(config), Claimant(take_over=take_over))
    # Ray sets signal handlers when it starts: ours come after.
    with scratch() as folder, _ray(config, ray_address, folder), _counting_signals() as asked:
        # Where the driver is: a node that is lost must not take it along.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        channel: Any = (
            ray.remote(DriverChannel).options(num_cpus=0, scheduling_strategy=here).remote()
        )
        trainer = _trainer(config, loop, claimant, channel, folder)
        failure: list[BaseException] = []

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:
                failure.append(error)

        # In a thread of its own, Ray Train leaves SIGINT to us.
        thread = threading.Thread(target=fit, name="lxscale-fit", daemon=True)
        thread.start()
        follow(channel, thread, asked)
        if failure:
            raise _explain(failure[0], config)
        result: TrainResult | None = ray.get(channel.result.remote())
        if result is None:
            raise LaunchError("the workers ended without a result")
        return result


def _trainer(
    config: RunConfig, loop: Loop, claimant: Claimant, channel: Any, folder: Path
) -> _Trainer:
    """Ray Train's trainer for the run; `folder` goes with the run's end."""
    cluster = config.cluster
    trainer = _Trainer(
        _work,
        train_loop_config={
            "config": config.given(),
            "channel": channel,
            "loop": loop,
            "claimant": claimant,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=_resources(config),
        ),
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if cluster.gpus_per_worker else "gloo",
            timeout_s=int(cluster.process_group_timeout_s),
        ),
        # Ray Train wants a place for its ledger; ours is the trainer's, so this one goes.
        run_config=ray.train.RunConfig(
            name="lxscale",
            storage_path=str(folder / "ledger"),
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
        ),
    )
    trainer.channel = channel
    return trainer


def _work(given: dict[str, Any]) -> None:
    """What runs in every worker: the loop, with the channel around it."""
    rank = ray.train.get_context().get_world_rank()
    channel = WorkerChannel(given["channel"], logging.getLogger("lxscale"), rank)
    try:
        config = parse_config(given["config"], "the configuration")
        result = given["loop"](config, Control(channel.should_stop, given["claimant"]))
        if rank == 0:
            ray.get(given["channel"].finish.remote(result))
    except FINAL_ERRORS as error:
        raise FinalError(f"{type(error).__name__}:{error}") from error
    finally:
        channel.close()


def _explain(error: BaseException, config: RunConfig) -> BaseException:
    """The one error to show for a failed run."""
    message = _final_message(error)
    if message is not None:
        name, _, text = message.partition(":")
        kinds = {kind.__name__: kind for kind in FINAL_ERRORS}
        return kinds.get(name, LaunchError)(text)
    if isinstance(error, TrainingFailedError):
        return LaunchError(
            f"the workers failed more than cluster.max_failures={config.cluster.max_failures} "
            f"times; the same command goes on from the last checkpoint. The last failure: "
            f"{_cause(error)}"
        )
    return error


def absolute_paths(config: RunConfig) -> RunConfig:
    """Local paths made absolute: workers have another working directory."""

    def absolute(path: str | None) -> str | None:
        return path if path is None or "://" in path else str(Path(path).absolute())

    given = config.given()
    given.setdefault("run", {})["tensorboard"] = str(tensorboard_folder(config).absolute())
    given["data"]["train"] = (
        absolute(config.data.train)
        if isinstance(config.data.train, str)
        else [{**p, "url": absolute(p["url"])} for p in given["data"]["train"]]
    )
    for section, keys in (
        ("run", ("storage",)),
        ("data", ("validation", "cache")),
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
def _ray(config: RunConfig, address: str | None, folder: Path) -> Iterator[None]:
    """Join the Ray cluster at `address`, or start one on this machine and remove it at the end."""
    cluster = config.cluster
    settings = {
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(cluster.health_check_interval_s),
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(cluster.health_check_timeout_s),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(cluster.start_timeout_s),
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        # Ray Train's own print writes each line twice.
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Worker processes share the cores: without this each would take all of them.
        "OMP_NUM_THREADS": str(max(1, int(cluster.cpus_per_worker))),
    }
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    # Ray prints what its daemons say, many lines a lost worker, whatever log_to_driver is; the
    # failure policy says it in one.
    vars(ray._private.worker)["print_to_stdstream"] = lambda *_, **__: None
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with environment(settings):
        try:
            with contextlib.ExitStack() as stack:
                try:
                    if address:
                        ray.init(address, **options)
                        stack.callback(ray.shutdown)
                    else:
                        stack.enter_context(local_ray(cluster, folder, options))
                except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                    if isinstance(error, LaunchError):
                        raise
                    first = (str(error).strip().splitlines() or [repr(error)])[0]
                    raise LaunchError(
                        f"cannot {'join Ray at ' + address if address else 'start Ray'}: {first}"
                    ) from error
                yield
        except ray.exceptions.RayError as error:
            raise LaunchError(
                f"Ray failed: {str(error).strip().splitlines()[0]}. The same command goes on from "
                "the last checkpoint"
            ) from error


@contextlib.contextmanager
def _counting_signals() -> Iterator[Callable[[], bool]]:
    """Yields whether SIGINT or SIGTERM has come, which asks for a clean stop; a second one raises
    KeyboardInterrupt here. The handler does nothing else: it may interrupt anything."""
    count = 0

    def handle(_number: int, _frame: Any) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: count > 0
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)

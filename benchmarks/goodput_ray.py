"""A run of the plain loop under Ray Train v2, elastic: goodput_ray.py SPEC ADDRESS

What it is given, so that it is at its best:

    ScalingConfig           num_workers=(1, 4); a look for more room every GROW_S
    FailureConfig           max_failures=-1, as are preemptions by default
    CheckpointConfig        num_to_keep=2; a checkpoint as often as ours
    preemption              get_preemption_info() once a second of steps, and a checkpoint when it
                            first tells of one, as Ray's documentation and its own benchmark do
    health checks           1 s (2 by default), of preemptions, too (5 by default)
    start of a group        given up after 20 s (60)
    a worker is silent      for 15 s (600)
    gloo                    30 s (1800)
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from goodput_plain import GLOO_TIMEOUT, Spec, read_state, train, write_state
from goodput_steps import NODES

GROW_S = 30.0

SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "15",
}


def worker(given: dict[str, Any]) -> None:
    """In each of Ray Train's workers."""
    import ray.train as ray_train

    spec = Spec(**given)
    rank = ray_train.get_context().get_world_rank()
    looks, often = 0, max(1, round(1 / spec.step_seconds))

    def save(state: dict[str, Any], step: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            if rank == 0:
                write_state(Path(folder), state)
            checkpoint = ray_train.Checkpoint.from_directory(folder) if rank == 0 else None
            ray_train.report({"step": step}, checkpoint=checkpoint)

    def notice() -> bool:
        nonlocal looks
        looks += 1
        # It waits for all workers, so it is not asked at every step.
        return looks % often == 0 and ray_train.get_preemption_info() is not None

    checkpoint, state = ray_train.get_checkpoint(), None
    if checkpoint:
        with checkpoint.as_directory() as folder:
            state = read_state(Path(folder))
    train(spec, state, save, notice)


def main() -> None:
    os.environ.update(SETTINGS)
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import ScalingConfig

    import goodput_ray  # by name, as workers import it

    spec = Spec(**yaml.safe_load(Path(sys.argv[1]).read_text()))
    ray.init(address=sys.argv[2], log_to_driver=False)
    TorchTrainer(
        goodput_ray.worker,
        train_loop_config=asdict(spec),
        torch_config=TorchConfig(backend="gloo", timeout_s=int(GLOO_TIMEOUT.total_seconds())),
        scaling_config=ScalingConfig(
            num_workers=(1, NODES), elastic_resize_monitor_interval_s=GROW_S
        ),
        run_config=RunConfig(
            name="plain",
            storage_path=spec.storage,
            failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


if __name__ == "__main__":
    main()

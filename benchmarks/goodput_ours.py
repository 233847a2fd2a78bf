"""`lxscale train` at the pace of goodput.py: goodput_ours.py CONFIG [ARGUMENTS]

LXSCALE_BENCH_LOG and LXSCALE_BENCH_SECONDS are the parts of the pace.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import cluster.cli.train as command
from cluster.cli.main import main
from cluster.launch import launch
from goodput_steps import Pace, StepLog
from trainer.config import RunConfig
from trainer.loop import Control, TrainResult

LOG, SECONDS = "LXSCALE_BENCH_LOG", "LXSCALE_BENCH_SECONDS"


def paced_train(config: RunConfig, control: Control) -> TrainResult:
    """The loop, in a worker, with its steps at the pace and written down."""
    import torch.distributed as dist

    import trainer.loop
    import trainer.run

    pace = Pace(Path(os.environ[LOG]), float(os.environ[SECONDS]))
    log = StepLog(pace, dist.get_rank(), dist.get_world_size())
    step, train_step = trainer.loop.step, trainer.run.train_step
    number = 0

    @functools.wraps(step)
    def numbered(run: Any, state: Any, *rest: Any) -> Any:
        nonlocal number
        number = state.step + 1
        return step(run, state, *rest)

    @functools.wraps(train_step)
    def paced(*given: Any) -> Any:
        # Here, and not around all of the step: its line in the journal is to have this time.
        with log.step(number):
            return train_step(*given)

    vars(trainer.loop)["step"], vars(trainer.run)["train_step"] = numbered, paced
    return trainer.loop.train(config, control)


if __name__ == "__main__":
    # By name, as workers import it: as part of __main__ it would be another.
    module = importlib.import_module("goodput_ours")
    command.launch = functools.partial(launch, loop=module.paced_train)
    sys.exit(main(["train", *sys.argv[1:]]))

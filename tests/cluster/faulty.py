"""`lxscale train` with faults at named places in its workers: a script that takes its arguments.

LXSCALE_TEST_FAULTS names a folder with `plan.json`, a list of faults; each happens once, and leaves
a file of its name with the time.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

import cluster.cli.train as command
from cluster.cli.main import main
from cluster.launch import launch
from trainer.config import RunConfig
from trainer.loop import Control, TrainResult

FOLDER = "LXSCALE_TEST_FAULTS"

PLACES = {
    "forward": "model.lxmert:Lxmert.forward",
    "backward": "deepspeed:DeepSpeedEngine.backward",
    "reduction": "deepspeed:DeepSpeedEngine.allreduce_gradients",
    "optimizer step": "torch.optim:AdamW.step",
    "snapshot": "trainer.checkpoint.saver:snapshot",
    "upload": "trainer.checkpoint.saver:write_object",
    "commit": "trainer.checkpoint.owner:Owner.commit",
}


@dataclass(frozen=True)
class Fault:
    name: str
    step: int
    """It happens when so many steps have been begun in the run."""
    place: str
    """Of PLACES, or "end": the loop has returned."""
    rank: int
    how: str
    """kill: of the worker; stop: SIGSTOP of it; freeze: the thread sleeps for ever; raylet: kill -9
    of that of its node; raise."""


def write_plan(folder: Path, faults: list[Fault]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps([asdict(f) for f in faults]))


def faulty_train(config: RunConfig, control: Control) -> TrainResult:
    """The loop, in a worker, with the faults of the plan."""
    import torch.distributed as dist

    import trainer.run
    from trainer.loop import train

    folder = Path(os.environ[FOLDER])
    faults = [Fault(**f) for f in json.loads((folder / "plan.json").read_text())]
    mine = [f for f in faults if f.rank == dist.get_rank() and not (folder / f.name).exists()]
    at = [0]
    _wrap("trainer.run:step", lambda run, state, *_: at.__setitem__(0, state.step + 1))
    import trainer.loop

    trainer.loop.step = trainer.run.step
    for place in {f.place for f in mine} & PLACES.keys():
        _wrap(PLACES[place], functools.partial(_maybe, place, mine, at, folder))
    result = train(config, control)
    _maybe("end", mine, at, folder)
    return result


def _wrap(name: str, before: Callable[..., Any]) -> None:
    """Call `before` with the arguments of a function each time that it is called."""
    module, _, path = name.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, last = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    real = getattr(owner, last)

    @functools.wraps(real)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before(*args)
        return real(*args, **kwargs)

    setattr(owner, last, wrapped)


def _maybe(place: str, faults: list[Fault], at: list[int], folder: Path, *_: Any) -> None:
    for fault in faults:
        if fault.place != place or at[0] < fault.step or (folder / fault.name).exists():
            continue
        (folder / fault.name).write_text(repr(time.time()))
        if fault.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault.how == "freeze":
            threading.Event().wait()
        elif fault.how == "raylet":
            (raylet,) = [p for p in psutil.Process().parents() if p.name() == "raylet"]
            raylet.kill()
            continue
        raise KeyError(f"injected: {fault.name}")


if __name__ == "__main__":
    # By name, as workers import it: as part of __main__ it would be another.
    module = importlib.import_module("tests.cluster.faulty")
    command.launch = functools.partial(launch, loop=module.faulty_train)
    sys.exit(main(["train", *sys.argv[1:]]))

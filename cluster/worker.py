"""A worker: the Ray actor in which the trainer runs, and by which the driver watches it.

The driver calls `prepare`, then `work`, which lasts as long as the training, and beside it
`exchange`, several times a second. No tensor passes through any of them.
"""

from __future__ import annotations

import logging
import os
import socket
import statistics
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist

from cluster.errors import AGAIN_ERRORS, FINAL_ERRORS
from cluster.interfaces import interface_of
from cluster.worker_output import Lines, collected
from trainer.checkpoint.lease import Made
from trainer.checkpoint.owner import Claimant
from trainer.config import RunConfig, parse_config
from trainer.loop import Control, TrainResult

Loop = Callable[[RunConfig, Control], TrainResult]

# Steps whose durations the median is of, and how many it takes to have one.
_LATEST_STEPS, _ENOUGH_STEPS = 50, 5

# What torch says where a peer, the network, or a loader process was lost.
_LOST = (
    "gloo",
    "NCCL",
    "onnection",
    "timed out",
    "Timed out",
    "Broken pipe",
    "Socket",
    "DataLoader worker",
    "lost the other workers",
)


@dataclass(frozen=True)
class Placed:
    """Where a worker is."""

    node: str
    """Ray's id."""
    address: str
    """Of its node, in the cluster's network."""
    gpu: bool
    """Whether it has one."""


@dataclass(frozen=True)
class Seat:
    """A worker's part in a group."""

    rank: int
    world: int
    local_rank: int
    """0 with GPUs, as a worker sees its own alone; else its index among the node's workers."""
    gpu: bool
    master: tuple[str, int]
    """Address and port of rank 0's store."""


@dataclass(frozen=True)
class Work:
    """What a group is to do."""

    config: dict[str, Any]
    """As given; see RunConfig.given."""
    loop: Loop
    claimant: Claimant


@dataclass(frozen=True)
class Report:
    """How a worker is."""

    lines: tuple[str, ...] = ()
    """What it has said since the last report."""
    phase: str = "start"
    """What the loop is at."""
    age: float = 0.0
    """Seconds for which it has been at this."""
    median: float | None = None
    """Seconds of a step, where enough have been made."""
    made: Made = field(default_factory=Made)
    """What it has done, without what it is at."""


@dataclass(frozen=True)
class Failure:
    """How `work` ended, where not with a result."""

    kind: str
    """user: the user has to change something; again: it is worth another command; code: nobody has
    foreseen it; lost: a peer, the network or a loader process failed."""
    name: str
    """Of the exception's class."""
    text: str


class Worker:
    """The actor; `ray.remote` makes it one, with two threads. A group that ends ends it, too: there
    is nothing to clean up in it."""

    def __init__(self, environment: dict[str, str]) -> None:
        for key, value in environment.items():
            os.environ.setdefault(key, value)
        self._lines = Lines()
        self._stop = threading.Event()
        self._phase, self._since = "start", time.monotonic()
        self._steps: deque[float] = deque(maxlen=_LATEST_STEPS)
        self._made = Made()
        self._listener: socket.socket | None = None

    def prepare(self) -> Placed:
        """Import what training needs, which takes seconds; tell where this is."""
        from trainer.step.engine import import_deepspeed

        import_deepspeed()
        return Placed(
            ray.get_runtime_context().get_node_id(),
            ray.util.get_node_ip_address(),
            bool(ray.get_gpu_ids()),
        )

    def listen(self, address: str) -> int:
        """Take a port for the group's store, on this one interface; rank 0's."""
        self._listener = socket.create_server((address, 0), backlog=1024)
        return int(self._listener.getsockname()[1])

    def work(self, work: Work, seat: Seat) -> Any:
        """Join the group and train; the loop's result, or a Failure."""
        with collected(self._lines, logging.getLogger("lxscale"), seat.rank):
            try:
                config = parse_config(work.config, "the configuration")
                self._join(config, seat)
                control = Control(self._stop.is_set, self._enter, work.claimant, self._tell)
                return work.loop(config, control)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:
                return self._failure(error)

    def exchange(self, stop: bool) -> Report:
        """Take the wish to stop; tell how this worker is."""
        if stop:
            self._stop.set()
        median = statistics.median(self._steps) if len(self._steps) >= _ENOUGH_STEPS else None
        age = time.monotonic() - self._since
        return Report(tuple(self._lines.take()), self._phase, age, median, self._made)

    def _enter(self, phase: str) -> None:
        """The loop's next phase."""
        now = time.monotonic()
        if self._phase == "step":
            self._steps.append(now - self._since)
        self._phase, self._since = phase, now

    def _tell(self, made: Made) -> None:
        """What the loop has done."""
        self._made = made

    def _join(self, config: RunConfig, seat: Seat) -> None:
        """Form the process group."""
        address, port = seat.master
        timeout = timedelta(seconds=config.cluster.process_group_timeout_s)
        here = ray.util.get_node_ip_address()
        if interface := interface_of(here):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        os.environ |= {
            "RANK": str(seat.rank),
            "WORLD_SIZE": str(seat.world),
            "LOCAL_RANK": str(seat.local_rank),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
        }
        if seat.gpu:
            torch.cuda.set_device(seat.local_rank)
        store = dist.TCPStore(
            address,
            port,
            seat.world,
            is_master=seat.rank == 0,
            timeout=timedelta(seconds=config.cluster.start_timeout_s),
            wait_for_workers=False,
            master_listen_fd=self._listener.detach() if self._listener else None,
        )
        backend = "cpu:gloo,cuda:nccl" if seat.gpu else "gloo"
        dist.init_process_group(
            backend, store=store, rank=seat.rank, world_size=seat.world, timeout=timeout
        )

    def _failure(self, error: BaseException) -> Failure:
        """What became of the loop, in a form that needs none of its classes."""
        name, text = type(error).__name__, str(error).strip()
        if isinstance(error, FINAL_ERRORS):
            return Failure("again" if isinstance(error, AGAIN_ERRORS) else "user", name, text)
        if isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError | OSError) and any(part in text for part in _LOST)
        ):
            return Failure("lost", name, (text.splitlines() or [name])[0])
        for line in traceback.format_exc().splitlines():
            print(line)
        frame = traceback.extract_tb(error.__traceback__)[-1]
        first = (text.splitlines() or [""])[0]
        at = f"{os.path.basename(frame.filename)}:{frame.lineno} in {frame.name}"
        return Failure("code", name, f"{name}: {first} ({at})")

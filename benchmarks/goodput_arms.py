"""The three arms of goodput.py: the nodes that each runs on, and the command that trains.

    lxscale       `lxscale train` with cluster.workers 1..4
    Ray Train     the plain loop under Ray Train v2, elastic (goodput_ray.py)
    restart all   the plain loop, a process for each node, under a supervisor as people write it:
                  when a process ends, all are killed and started again from the last checkpoint,
                  one on each node that is there; it heeds neither notices nor new nodes

The first two have real Ray nodes of one machine, each with room for one worker. A node goes as by
a power cut. For the third a node is a name, and its loss the SIGKILL of its process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from goodput_ours import LOG, SECONDS
from goodput_plain import Spec
from goodput_steps import NODES

HERE = Path(__file__).parent
# DRAIN_NODE_REASON_PREEMPTION of Ray's autoscaler.proto.
_PREEMPTION = 2
# Above cluster.stop_timeout_s.
_END_S = 90.0


def prepare_environment() -> None:
    """Of all processes of all arms, this one's and Ray's among them."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE)])
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
    }


class Arm(ABC):
    """A run and the nodes that it is on."""

    name: str

    @abstractmethod
    def add(self) -> None:
        """A node comes."""

    @abstractmethod
    def warn(self, notice: float) -> None:
        """The oldest node of which nobody has said so yet will go in so many seconds."""

    @abstractmethod
    def remove(self) -> None:
        """The oldest node goes."""

    @abstractmethod
    def start(self) -> None:
        """Begin to train."""

    @abstractmethod
    def running(self) -> bool:
        """Whether it goes on; called several times a second. RuntimeError where it has failed."""

    @abstractmethod
    def close(self) -> None:
        """End all that was started."""


class RayArm(Arm):
    """A command that joins a Ray cluster."""

    again: int | None = None
    """An exit status with which the same command is to be run again."""

    def __init__(self, folder: Path) -> None:
        import ray
        from ray.cluster_utils import Cluster

        self._ray = ray
        self._cluster: Any = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False},
        )
        self._nodes: list[Any] = []
        self._warned = 0
        """So many of the oldest."""
        self._log = folder / f"{self.name.replace(' ', '-')}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def command(self, address: str) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return {}

    def add(self) -> None:
        self._nodes.append(self._cluster.add_node(num_cpus=1, object_store_memory=80 << 20))

    def warn(self, notice: float) -> None:
        raylet: Any = self._ray._raylet
        client = raylet.GcsClient(address=self._cluster.address)
        until, node = int((time.time() + notice) * 1000), self._nodes[self._warned]
        accepted, why = client.drain_node(node.node_id, _PREEMPTION, "the machine is needed", until)
        if not accepted:
            raise RuntimeError(f"Ray does not drain a node: {why}")
        self._warned += 1

    def remove(self) -> None:
        self._cluster.remove_node(self._nodes.pop(0), allow_graceful=False)
        self._warned = max(0, self._warned - 1)

    def start(self) -> None:
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                self.command(self._cluster.address),
                stdout=log,
                stderr=log,
                env=os.environ | self.environment(),
                start_new_session=True,
            )

    def running(self) -> bool:
        assert self._process
        status = self._process.poll()
        if status and status == self.again:
            print(f"    run again: {_end_of(self._log).splitlines()[-1]}", flush=True)
            self.start()
            return True
        if status:
            raise RuntimeError(f"{self.name}: status {status}\n{_end_of(self._log)}")
        return status is None

    def close(self) -> None:
        if self._process and self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._ray.shutdown()
        self._cluster.shutdown()


class Ours(RayArm):
    name = "lxscale"
    again = 75

    def __init__(self, folder: Path, config: dict[str, Any], log: Path, seconds: float) -> None:
        super().__init__(folder)
        self._config, self._steps, self._seconds = folder / "ours.yaml", log, seconds
        self._config.write_text(yaml.safe_dump(config))

    def command(self, address: str) -> list[str]:
        script = [sys.executable, str(HERE / "goodput_ours.py"), str(self._config)]
        return [*script, "--ray-address", address]

    def environment(self) -> dict[str, str]:
        return {LOG: str(self._steps), SECONDS: repr(self._seconds)}


class RayTrain(RayArm):
    name = "Ray Train"

    def __init__(self, folder: Path, spec: Spec) -> None:
        super().__init__(folder)
        self._spec = folder / "spec.yaml"
        self._spec.write_text(yaml.safe_dump(asdict(spec)))

    def command(self, address: str) -> list[str]:
        return [sys.executable, str(HERE / "goodput_ray.py"), str(self._spec), address]


class RestartAll(Arm):
    name = "restart all"

    def __init__(self, folder: Path, spec: Spec) -> None:
        self._spec, self._log = folder / "spec.yaml", folder / "restart-all.log"
        self._spec.write_text(yaml.safe_dump(asdict(spec)))
        self._nodes: list[int] = []
        self._count = 0
        self._workers: dict[int, subprocess.Popen[bytes]] = {}
        """By node."""

    def add(self) -> None:
        self._nodes.append(self._count)
        self._count += 1

    def warn(self, notice: float) -> None:
        pass

    def remove(self) -> None:
        node = self._nodes.pop(0)
        if node in self._workers:
            self._workers[node].kill()

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        there = self._nodes[:NODES]
        with open(self._log, "ab") as log:
            for rank, node in enumerate(there):
                command = [sys.executable, str(HERE / "goodput_plain.py"), str(self._spec)]
                command += map(str, (rank, len(there), port))
                self._workers[node] = subprocess.Popen(command, stdout=log, stderr=log)

    def running(self) -> bool:
        ended = [p.poll() for p in self._workers.values()]
        if all(status == 0 for status in ended):
            return False
        if not any(ended):  # alive, or done before the others
            return True
        lost = any(status == -signal.SIGKILL for status in ended)
        self._kill()
        if not lost:
            raise RuntimeError(f"{self.name}: a worker failed\n{_end_of(self._log)}")
        self.start()
        return True

    def _kill(self) -> None:
        for process in self._workers.values():
            process.kill()
        for process in self._workers.values():
            process.wait()
        self._workers = {}

    def close(self) -> None:
        self._kill()


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]

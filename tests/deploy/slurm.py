"""A Slurm of one machine, in a folder: Debian's real daemons with ports and keys of their own.

Needs root, which starts jobs as users.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray

from tests.conftest import subprocess_environment
from tests.object_store import free_port

_NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")

_CONFIGURATION = """\
ClusterName=lxscale
SlurmctldHost={host}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
# Without cgroups, which a container may not have.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
# A job that is put back waits for two minutes otherwise.
SchedulerParameters=sched_interval=2,bf_interval=2
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_no_slurm() -> str:
    """Why this process cannot start one, or "" where it can."""
    if missing := [name for name in _NEEDED if not shutil.which(name)]:
        return f"needs {', '.join(missing)} (Debian: slurmctld slurmd slurm-client munge)"
    return "" if os.geteuid() == 0 else "Slurm's daemons need root"


@dataclass(frozen=True)
class Slurm:
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return subprocess_environment(SLURM_CONF=str(self.folder / "slurm.conf"))

    def call(self, *command: str) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def job(self, number: int) -> dict[str, str]:
        """What Slurm says of a job."""
        told = self.call("scontrol", "show", "job", "-o", str(number))
        return dict(re.findall(r"(\S+?)=(\S*)", told))

    def logs(self) -> str:
        return "\n".join(p.read_text()[-3000:] for p in sorted(self.folder.glob("*.log")))


@contextlib.contextmanager
def slurm(folder: Path, nodes: int = 2, cpus: int = 2) -> Iterator[Slurm]:
    """So many nodes, all of them this machine."""
    folder.chmod(0o755)
    host, address = socket.gethostname(), ray.util.get_node_ip_address()
    lines = [
        f"NodeName=n{i} NodeHostname={host} NodeAddr={address} Port={free_port()} CPUs={cpus} "
        "RealMemory=1000 State=UNKNOWN"
        for i in range(nodes)
    ]
    text = _CONFIGURATION.format(
        host=host, address=address, folder=folder, port=free_port(), nodes="\n".join(lines)
    )
    (folder / "slurm.conf").write_text(text)
    for name in ("state", *(f"spool-n{i}" for i in range(nodes))):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    made = Slurm(folder)
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        with (folder / f"{command[0]}-{len(daemons)}.log").open("w") as log:
            daemons.append(subprocess.Popen(command, env=made.environment, stdout=log, stderr=log))

    try:
        munge = {"socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        start(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--log-file={folder / 'munged.log'}",
            *(f"--{option}={folder / name}" for option, name in munge.items()),
        )
        _wait(lambda: (folder / "munge.socket").exists(), made)
        start("slurmctld", "-D")
        for i in range(nodes):
            start("slurmd", "-D", "-N", f"n{i}")
        _wait(lambda: made.call("sinfo", "-h", "-o", "%T %D").split() == ["idle", str(nodes)], made)
        yield made
    finally:
        with contextlib.suppress(Exception):
            _end_jobs(made)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(15)
            daemon.kill()


def _end_jobs(made: Slurm) -> None:
    jobs = made.call("squeue", "-h", "-o", "%A").split()
    if not jobs:
        return
    made.call("scancel", "--signal=KILL", "--full", *jobs)
    made.call("scancel", *jobs)
    _wait(lambda: not made.call("squeue", "-h", "-o", "%A").split(), made)


def _wait(done: Callable[[], bool], made: Slurm, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            if done():
                return
        assert time.monotonic() < deadline, made.logs()
        time.sleep(0.2)


def submit(made: Slurm, *command: Sequence[str] | str) -> int:
    """sbatch; the job's number."""
    return int(made.call("sbatch", "--parsable", *map(str, command)).split(";")[0])

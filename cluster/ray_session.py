"""Ray for one command: a cluster that is joined, or one of this machine; and whether it lives."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray._private.state
import ray._private.worker

from cluster.bounded import StillBusyError, held
from cluster.errors import AgainError, LaunchError, LostError
from cluster.head import reach
from cluster.local_ray import dead_daemon, environment, local_ray
from cluster.stopping import Stop
from shards.processes import STOP_SIGNALS, without_signals
from trainer.sections import ClusterSection

# Seconds between two looks at the cluster's nodes; without an answer for so long its head is lost
# (Ray itself ends the process after 60 s, with a page of text).
_LOOK_S, _LOST_S = 2.0, 20.0
# Seconds that leaving a Ray may take that is lost.
_LEAVE_S = 5.0


class RaySession:
    """A joined or started Ray, looked at by a thread: its calls may hang."""

    def __init__(self, local: bool) -> None:
        self._local = local
        self._draining: frozenset[str] = frozenset()
        self._answered = time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._look, name="lxscale-nodes", daemon=True).start()

    def draining(self) -> frozenset[str]:
        """Nodes that will be taken away soon."""
        return self._draining

    def lost(self) -> str:
        """What of Ray is gone, so that nothing can be placed any more; "" where it lives."""
        if self._local:
            name = dead_daemon()
            return f"Ray's {name.replace('_', ' ')} is gone" if name else ""
        silent = time.monotonic() - self._answered
        return f"Ray's head has not answered for {silent:.0f} s" if silent > _LOST_S else ""

    def can_start_again(self) -> bool:
        """Whether this process can have another Ray: one that has lost its GCS is ended by Ray's
        client library a minute later, whatever it does."""
        return self._local and dead_daemon() == "raylet"

    def close(self) -> None:
        self._closed.set()

    def _look(self) -> None:
        while not self._closed.wait(_LOOK_S):
            with contextlib.suppress(Exception):
                self._draining = frozenset(ray._private.state.state.get_draining_nodes())
                self._answered = time.monotonic()


@contextlib.contextmanager
def ray_session(
    cluster: ClusterSection, address: str | None, folder: Path, stop: Stop
) -> Iterator[RaySession]:
    """Join the Ray cluster at `address`, or start one on this machine and remove it at the end.

    Raises LaunchError where that cannot be, LostError where a Ray of its own does not start,
    AgainError where a stop is asked for before.
    """
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # torch makes this folder, if only to look into it.
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Worker processes share the cores: without this each would take all of them.
        "OMP_NUM_THREADS": str(max(1, int(cluster.cpus_per_worker))),
    }
    # Ray prints what its daemons say, many lines a lost worker, whatever log_to_driver is; the
    # launcher says it in one.
    vars(ray._private.worker)["print_to_stdstream"] = lambda *_, **__: None
    doing = f"cannot join Ray at {address}" if address else "cannot start Ray"
    # A busy machine passes, a wrong address does not.
    kind = LaunchError if address else LostError
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}

    def keep_signals() -> None:
        """Ray's own handlers, in C++, would end this process with a page of text."""
        stop.take_signals()
        if stop.asked():
            raise AgainError("stopped while Ray was starting")

    @contextlib.contextmanager
    def started(**more: Any) -> Iterator[None]:
        def begin() -> None:
            # Workers that have to save outlive a signal to all processes of the job.
            with without_signals(*STOP_SIGNALS):
                ray.init(**options, **more)

        with held(begin, ray.shutdown, cluster.start_timeout_s, _LEAVE_S, keep_signals):
            stop.take_signals()
            yield

    with environment(settings), contextlib.ExitStack() as stack:
        if address:
            address = reach(address, stop.asked)
        try:
            stack.enter_context(
                started(address=address) if address else local_ray(cluster, folder, started)
            )
        except StillBusyError:
            raise kind(
                f"{doing}: no answer within cluster.start_timeout_s={cluster.start_timeout_s:g}"
            ) from None
        except (LaunchError, AgainError):
            raise
        except Exception as error:  # Ray's own timeouts among them, which are no class of their own
            first = (str(error).strip().splitlines() or [repr(error)])[0]
            raise kind(f"{doing}: {first}") from error
        session = RaySession(local=not address)
        stack.callback(session.close)
        yield session

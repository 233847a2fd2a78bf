"""Where a group's workers go: room for all of them or for none, as many as the run can use.

Room is asked for as placement groups. Their number grows with cluster.workers, and the looks at the
cluster with its nodes.
"""

from __future__ import annotations

import functools
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.bounded import StillBusyError, bounded
from cluster.group import End, Group, Wishes, close, first_line
from cluster.worker import Placed, Worker
from trainer.config import RunConfig
from trainer.sections import ClusterSection

# Seconds between two looks for answers.
_LOOK_S = 0.1
# Seconds between two looks at which nodes to avoid and how much room there is, while there is none.
_ROOM_S = 3.0
# Seconds for an answer of Ray's head, which never comes where it is gone.
_ANSWER_S = 20.0


@dataclass(frozen=True)
class Freed:
    """Room that has just been given back."""

    nodes: tuple[str, ...] = ()
    """Of each worker of the group before."""
    room: int = 0
    """For so many workers there was room."""

    def fitting(self, cluster: ClusterSection, avoided: frozenset[str]) -> int:
        """For how many workers there is room, once all that is given back is free."""
        back = sum(node not in avoided for node in self.nodes)
        return max(self.room, back + _fitting(cluster, avoided.union(self.nodes)))


def place(
    config: RunConfig,
    environment: dict[str, str],
    avoid: Callable[[], frozenset[str]],
    wishes: Wishes,
    freed: Freed,
) -> Group | End:
    """Room for as many workers as there is room for, of the numbers that the run may have, and the
    workers in it, ready to train.

    avoid: nodes that are not to be used, asked for again while there is no room. freed: what Ray's
    account, which is behind the time, may not have yet. Waits for cluster.start_timeout_s.
    """
    cluster = config.cluster
    room: PlacementGroup | None = None
    workers: list[Any] = []
    try:
        room = _room(config, avoid, wishes, freed)
        options = {
            "num_cpus": cluster.cpus_per_worker,
            "num_gpus": cluster.gpus_per_worker,
            "max_concurrency": 2,
        }
        for i in range(room.bundle_count):
            strategy = PlacementGroupSchedulingStrategy(room, placement_group_bundle_index=i)
            actor = ray.remote(Worker).options(scheduling_strategy=strategy, **options)
            workers.append(actor.remote(environment))
        placed = _all([w.prepare.remote() for w in workers], cluster.start_timeout_s, wishes)
    except BaseException as error:
        if room:
            close(room, workers)
        if isinstance(error, _NotPlacedError):
            return End(str(error), f"within cluster.start_timeout_s={cluster.start_timeout_s:g}")
        if isinstance(error, TimeoutError):
            return End(
                "lost",
                f"{room.bundle_count if room else 0} workers have not started within "
                f"cluster.start_timeout_s={cluster.start_timeout_s:g}",
            )
        if isinstance(error, StillBusyError):
            return End("lost", "Ray's head does not answer")
        if isinstance(error, ray.exceptions.RayError):
            return End("lost", f"a worker could not be started: {first_line(error)}")
        raise
    # Ranks of a node are neighbours.
    order = sorted(range(len(workers)), key=lambda i: (placed[i].node, i))
    return Group(room, [workers[i] for i in order], [placed[i] for i in order])


def _room(
    config: RunConfig, avoid: Callable[[], frozenset[str]], wishes: Wishes, freed: Freed
) -> PlacementGroup:
    """Room that is there, for all workers. It is asked for anew when what is to be avoided has
    changed, as a link may have come back, or how many workers there is room for."""
    deadline = time.monotonic() + config.cluster.start_timeout_s
    while True:
        avoided = avoid()
        n = number(config, freed.fitting(config.cluster, avoided))
        room = ask_for_room(config.cluster, n, avoided)
        look = time.monotonic() + _ROOM_S
        try:
            while not bounded(functools.partial(room.wait, _LOOK_S), _ANSWER_S):
                if wishes.stop():
                    raise _NotPlacedError("stopped")
                if time.monotonic() > deadline:
                    raise _NotPlacedError("no room")
                if time.monotonic() > look:
                    now = avoid()
                    if now != avoided or n != number(config, _fitting(config.cluster, now)):
                        break
                    look = time.monotonic() + _ROOM_S
            else:
                return room
        except BaseException:
            close(room)
            raise
        close(room)
        freed = Freed()


def number(config: RunConfig, fitting: int) -> int:
    """How many workers to have where there is room for so many: the fewest, at least, which may
    come."""
    sizes = config.world_sizes
    return sizes[max(bisect_right(sizes, fitting), 1) - 1]


def _fitting(cluster: ClusterSection, avoided: frozenset[str]) -> int:
    """For how many workers there is room, by Ray's account."""
    if cluster.fewest == cluster.most:
        return cluster.most
    free = bounded(available_resources_per_node, _ANSWER_S)
    return sum(_on_node(cluster, left) for node, left in free.items() if node not in avoided)


def _on_node(cluster: ClusterSection, left: Mapping[str, float]) -> int:
    """How many workers a node with these resources left takes."""
    return min(
        int(left.get(kind, 0.0) / amount + 1e-6) for kind, amount in _resources(cluster).items()
    )


def _resources(cluster: ClusterSection) -> dict[str, float]:
    """Of one worker."""
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    return resources


def ask_for_room(cluster: ClusterSection, n: int, avoided: frozenset[str]) -> PlacementGroup:
    """Room for n workers, all of it or none, once there is."""
    selector = {"ray.io/node-id": f"!in({','.join(sorted(avoided))})"} if avoided else {}
    bundles = [_resources(cluster)] * n
    ask = functools.partial(placement_group, bundles, bundle_label_selector=[selector] * n)
    room: PlacementGroup = bounded(ask, _ANSWER_S)
    return room


class _NotPlacedError(Exception):
    """Its text is an End's kind."""


def _all(refs: list[Any], seconds: float, wishes: Wishes) -> list[Placed]:
    """The results of all. TimeoutError where they take longer."""
    deadline = time.monotonic() + seconds
    waiting = list(refs)
    while waiting:
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=_LOOK_S)
        if wishes.stop():
            raise _NotPlacedError("stopped")
        if time.monotonic() > deadline:
            raise TimeoutError
    return list(ray.get(refs))

"""Two owners as processes on a real gateway: one is stopped at each of its requests in turn."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from shards.store import objects
from tests.object_store import Fault, FaultProxy, ObjectStore, Request
from tests.ranks import CONTEXT
from tests.trainer.checkpoint.test_checkpoint import newest_whole, save
from trainer.checkpoint.errors import OwnedError, StaleAttemptError
from trainer.checkpoint.generations import Generation, find_generation, generations, load_weights
from trainer.checkpoint.owner import Claimant, claim

pytestmark = pytest.mark.faults

STEPS = (10, 20, 30)


def _owner(run: str, environment: dict[str, str], said: Any) -> None:
    """Own the run and save at each of STEPS; tell how it ended."""
    os.environ |= environment
    try:
        with contextlib.closing(claim(run, Claimant())) as mine:
            for step in STEPS:
                save(mine, step, float(step))
                said.put(step)
        said.put("done")
    except StaleAttemptError:
        said.put("stale")
    except OwnedError:
        said.put("owned")


def _stop_at(number: int, lost: bool, place: str, gateway: ObjectStore) -> bool:
    """Stop an owner at its request of that number, let another one go on, and wake the first.

    lost: the request is reset instead of carried out. False when there are not so many requests.
    """
    run = f"{place}-{number}-{lost}"
    proxy = FaultProxy(gateway.endpoint)
    said = CONTEXT.SimpleQueue()
    environment = gateway.environment | {"AWS_ENDPOINT_URL": proxy.url}
    process = CONTEXT.Process(target=_owner, args=(run, environment, said))
    stopped = False

    def plan(request: Request) -> Fault | None:
        nonlocal stopped
        if request.number != number:
            return None
        os.kill(process.pid, signal.SIGSTOP)
        stopped = True
        return Fault("reset") if lost else None

    proxy.begin(plan)
    process.start()
    while process.is_alive() and not stopped:
        time.sleep(0.01)
    if stopped:
        time.sleep(0.1)  # the request is carried out meanwhile, if it is
        before = _newest(run)
        with contextlib.closing(claim(run, Claimant(take_over=True))) as second:
            first = next((g for g in second.found if isinstance(g, Generation)), None)
            assert (first.step if first else 0) == before
            save(second, 41, 41.0)
            os.kill(process.pid, signal.SIGCONT)
            save(second, 42, 42.0)
            process.join(60)
            save(second, 43, 43.0)
    process.join(60)
    assert process.exitcode == 0
    proxy.down()
    words = []
    while not said.empty():
        words.append(said.get())
    if not stopped:
        assert words == [*STEPS, "done"]
        return False
    # One that slept before its claim finds a live owner; one that slept at its end had ended.
    assert words[-1] in ("stale", "owned") or number > 10, words
    assert newest_whole(run) == 43.0
    for generation in generations(run):
        assert isinstance(generation, Generation)
        load_weights(generation)
    kept = [g.manifest for g in generations(run) if isinstance(g, Generation)]
    assert [m.step for m in kept] == [43, 42]
    names = objects.list_names(objects.join(run, "checkpoints", "objects"))
    assert set(names) == {o.name for m in kept for o in m.objects}
    return True


def _newest(run: str) -> int:
    found = [g for g in generations(run) if isinstance(g, Generation)]
    return found[0].step if found else 0


@pytest.mark.parametrize("lost", [False, True])
def test_stopped_at_every_request(
    lost: bool, gateway: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for key, value in gateway.environment.items():
        monkeypatch.setenv(key, value)
    number = 0
    while _stop_at(number, lost, f"{gateway.bucket}/{tmp_path.name}", gateway):
        number += 1
    assert number > 20
    assert find_generation(f"{gateway.bucket}/{tmp_path.name}-{number}-{lost}").step == STEPS[-1]

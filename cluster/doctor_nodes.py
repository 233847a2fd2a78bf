"""Every node of a Ray cluster, looked at by an actor of its own; storage; and Ray's token."""

from __future__ import annotations

import contextlib
import email.utils
import os
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray._private.authentication import authentication_token_setup as tokens
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.doctor import SKEW_S3_S, Finding, Machine, connects, examine, listen
from cluster.environment import passed_on, take
from cluster.errors import USER_ERRORS
from cluster.head import TOKEN_REMEDY
from shards.format.manifest import load_manifest
from shards.store import objects
from shards.store.retry import Retry
from shards.store.s3 import endpoint
from trainer.config import RunConfig

# Seconds for all nodes to start an actor and to answer.
_NODES_S = 90.0
# Seconds for a fault of the store: a report is to come soon.
_RETRY = Retry(deadline=10.0)


class Visitor:
    """The actor. It takes the driver's environment, as workers do."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment

    def examine(self, cache: str | None, key: bytes) -> Machine:
        machine = examine(ray.util.get_node_ip_address(), cache, key)  # the node's own environment
        take(self._environment)
        return machine

    def listen(self) -> tuple[str, int]:
        self._listener = listen(ray.util.get_node_ip_address())
        host, port = self._listener.getsockname()[:2]
        return str(host), int(port)

    def connects(self, peers: list[tuple[str, int]]) -> list[str]:
        return [connects(*peer) for peer in peers]

    def store(self, probe: str, manifests: list[str]) -> str:
        return sees(probe, manifests)


def visit(config: RunConfig | None, probe: str) -> tuple[list[Machine], list[Finding]]:
    """All nodes' machines, and what is found between them. `probe`: an object that the driver has
    written, to be seen by all; "" for none."""
    cache = config.data.cache if config else None
    key = secrets.token_bytes(16)
    here = examine(ray.util.get_node_ip_address(), cache, key)
    nodes = [n for n in ray.nodes() if n["Alive"]]
    # The head first: it is everybody's peer.
    nodes.sort(key=lambda n: "node:__internal_head__" not in n["Resources"])
    actors: list[Any] = [
        ray.remote(Visitor)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], False))
        .remote(passed_on())
        for n in nodes
    ]
    try:
        places, silent = _answers([a.listen.remote() for a in actors])
        found = [_silent([nodes[i]["NodeManagerAddress"] for i in silent], len(nodes))]
        up = [a for a, place in zip(actors, places, strict=True) if place]
        # They have begun by now: the answers come at once, which the clocks need.
        asked = time.time()
        told, _ = _answers([a.examine.remote(cache, key) for a in up])
        took = time.time() - asked
        machines = [replace(m, clock=_ahead(m.clock, asked, took)) for m in told if m]
        if up and len(machines) == len(up):
            found.append(_ports(up, [p for p in places if p], machines))
            if config and probe:
                manifests = [spec.url for spec in config.data.specs()]
                told, _ = _answers([a.store.remote(probe, manifests) for a in up])
                found.append(_store(told, machines, config))
        return [here, *machines], found
    finally:
        for actor in actors:
            ray.kill(actor)


def _ahead(clock: float, asked: float, took: float) -> float:
    """Seconds by which a clock is surely ahead (or behind, negative): it was read at some time
    between the question and the last answer."""
    return max(0.0, clock - asked - took) + min(0.0, clock - asked)


def _answers(refs: list[Any]) -> tuple[list[Any], set[int]]:
    """What has been answered in time, None for the others; which those are."""
    ray.wait(refs, num_returns=len(refs), timeout=_NODES_S)
    found: list[Any] = []
    for ref in refs:
        try:
            found.append(ray.get(ref, timeout=0.1))
        except (ray.exceptions.RayError, TimeoutError):
            found.append(None)
    return found, {i for i, answer in enumerate(found) if answer is None}


def _silent(silent: Sequence[str], nodes: int) -> Finding:
    if silent:
        text = f"{len(silent)} of {nodes} nodes do not answer ({', '.join(silent[:3])})"
        remedy = "see that this checkout of lxscale is installed there, and `ray status`"
        return Finding("problem", "nodes", text, remedy)
    return Finding("ok", "nodes", f"{nodes} answer")


def _ports(
    actors: Sequence[Any], places: Sequence[tuple[str, int]], machines: Sequence[Machine]
) -> Finding:
    """Each to the first and to its neighbour: 2 n connections."""
    n = len(actors)
    peers = [[i for i in {0, (me + 1) % n} if i != me] for me in range(n)]
    asked = [a.connects.remote([places[i] for i in p]) for a, p in zip(actors, peers, strict=True)]
    answers, _ = _answers(asked)
    for me, told in enumerate(answers):
        for peer, why in zip(peers[me], told or ["no answer"] * len(peers[me]), strict=True):
            if why:
                text = (
                    f"{machines[me].name} ({machines[me].address}) cannot reach "
                    f"{machines[peer].name} ({machines[peer].address}) on a free port ({why})"
                )
                remedy = "open all TCP ports between the nodes: workers choose free ones"
                return Finding("problem", "ports", text, remedy)
    return Finding("ok", "ports", f"{sum(map(len, peers))} connections between nodes")


# --- storage ------------------------------------------------------------------------------------


@contextlib.contextmanager
def probed(config: RunConfig) -> Any:
    """(Finding, the probe's URL or ""): an object in run.storage, or in the nearest folder of it
    that is there, for as long as the block takes."""
    place = config.run.storage
    if path := objects.local_path(place):
        path = path.absolute()
        while not path.exists() and path != path.parent:
            path = path.parent
        place = str(path)
    probe = objects.join(place, f".lxscale-doctor-{secrets.token_hex(8)}")
    written = False
    try:
        objects.write_bytes(probe, probe.encode(), _RETRY, durable=False)
        written = True
        specs = config.data.specs()
        why = sees(probe, [])
        manifests = [load_manifest(spec.url) for spec in specs]
        text = f"{config.run.storage} takes and gives; {len(manifests)} data sets are there"
        yield Finding("problem", "storage", why) if why else Finding("ok", "storage", text), probe
    except USER_ERRORS as error:
        yield Finding("problem", "storage", str(error)), probe if written else ""
    finally:
        if written:
            objects.delete(probe, _RETRY)


def sees(probe: str, manifests: Sequence[str]) -> str:
    """Why a node cannot read the driver's probe and the data sets, and write beside it; or ""."""
    own = f"{probe}-{secrets.token_hex(8)}"
    try:
        if objects.read_bytes(probe, _RETRY) != probe.encode():
            return f"{probe} has other bytes than were written"
        for url in manifests:
            objects.file_size(objects.join(url, "manifest.json"), _RETRY)
        objects.write_bytes(own, b"", _RETRY, durable=False)
        objects.delete(own, _RETRY)
    except USER_ERRORS as error:
        return str(error)
    return ""


def _store(told: Sequence[str | None], machines: Sequence[Machine], config: RunConfig) -> Finding:
    for machine, why in zip(machines, told, strict=True):
        if why != "":
            text = f"{machine.name} ({machine.address}): {why or 'no answer'}"
            remedy = "run.storage and data.train have to be the same place on every node"
            return Finding("problem", "storage", text, remedy)
    return Finding("ok", "storage", f"{len(machines)} nodes see {config.run.storage} and the data")


def store_clock() -> Finding:
    """This clock against that of the S3 endpoint, which refuses requests that are off."""
    url = endpoint()
    url = "https://s3.amazonaws.com" if url == "AWS" else url
    try:
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=5) as answer:
            date = answer.headers["Date"]
    except urllib.error.HTTPError as error:
        date = error.headers["Date"]
    except (OSError, ValueError) as error:
        return Finding("warning", "clock", f"the S3 endpoint does not tell the time ({error})")
    try:
        ahead = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return Finding("ok", "clock", "the S3 endpoint does not tell the time")
    if abs(ahead) > SKEW_S3_S:
        text = f"this machine is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} S3"
        return Finding("problem", "clock", text, "let NTP (chrony) set it: S3 refuses requests")
    return Finding("ok", "clock", f"S3's is {abs(ahead):.0f} s from this one")


# --- Ray's token --------------------------------------------------------------------------------


def token(joined: bool) -> Finding:
    """What Ray's authentication does here. Ray's own rule: `ray start --head` asks for a token
    where its user has one in ~/.ray/auth_token, and `ray start --address` sends none unless it is
    told to."""
    mode = os.environ.get(tokens.AUTH_MODE_ENV_VAR, "").lower()
    here = tokens.AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    if mode == "token" and not here:
        return Finding("problem", "Ray's token", "RAY_AUTH_MODE=token, and no token", TOKEN_REMEDY)
    if joined:
        text = "asked for, and right" if mode == "token" else "none is asked for"
        return Finding("ok", "Ray's token", text)
    if here and not mode and (Path.home() / ".ray" / "auth_token").exists():
        text = "~/.ray/auth_token is here: `ray start --head` will ask other nodes for it"
        return Finding("warning", "Ray's token", text, TOKEN_REMEDY)
    return Finding("ok", "Ray's token", mode or "none is set")

"""`lxscale runs`: how all runs of a storage stand."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from cluster.cli.status import age, steps
from shards.arguments import given_place
from shards.errors import NotFoundError
from shards.urls import shown
from trainer.run_status import RunStatus, run_statuses

_LINE = "{:<30} {:<10} {:>15} {:>8} {:>8} {:>8}  {}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("storage", type=given_place, help="folder or URL that has runs below it")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each")
    parser.set_defaults(func=_runs)


def _runs(arguments: argparse.Namespace) -> int:
    storage = arguments.storage.rstrip("/")
    any_ = False
    for found in run_statuses(storage):
        if arguments.json:
            print(json.dumps(asdict(found)), flush=True)
        elif not any_:
            print(_LINE.format("run", "state", "step", "attempt", "saved", "goodput", "owner"))
        any_ = True
        if not arguments.json:
            print(_LINE.format(*_cells(found, storage)), flush=True)
    if not any_:
        raise NotFoundError(f"there is no run below {storage}")
    return 0


def _cells(found: RunStatus, storage: str) -> tuple[str, ...]:
    name = found.url.removeprefix(storage).strip("/") or found.url
    goodput = "" if found.goodput is None else f"{found.goodput:.1%}"
    saved = age(found) if found.generation else ""
    owner = shown(found.problem) or found.owner
    return name, found.state, steps(found), str(found.attempt), saved, goodput, owner

"""`lxscale doctor`: what a run needs, checked before there is one."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import ray

from cluster.cli.common import verdict
from cluster.doctor import Finding, examine, findings
from cluster.doctor_nodes import probed, store_clock, token, visit
from cluster.errors import USER_ERRORS
from cluster.launch import absolute_paths
from cluster.ray_session import ray_session
from cluster.stopping import Stop
from shards.arguments import given_path
from shards.urls import shown
from trainer.config import RunConfig, load_config
from trainer.sections import ClusterSection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", type=given_path, help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--ray-address", help="check every node of this Ray cluster, too")
    parser.set_defaults(func=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    config = None
    if arguments.config:
        config = absolute_paths(load_config(arguments.config, arguments.overrides))
    if config is None:
        found = _found(arguments.ray_address, None, "")
    else:
        with probed(config) as (storage, probe):
            found = [storage, *_found(arguments.ray_address, config, probe)]
        if any(url.startswith("s3://") for url in _places(config)):
            found.append(store_clock())
    for finding in found:
        print(shown(finding))
    bad = [f.text for f in found if f.kind == "problem"]
    return verdict(arguments.ray_address or "this machine", bad, "no problem")


def _found(address: str | None, config: RunConfig | None, probe: str) -> list[Finding]:
    cache = config.data.cache if config else None
    if address:
        cluster = config.cluster if config else ClusterSection()
        try:
            with (
                tempfile.TemporaryDirectory(prefix="lxscale-") as folder,
                ray_session(cluster, address, Path(folder), Stop(60)),
            ):
                machines, found = visit(config, probe)
                return [*found, token(joined=True), *findings(machines, joined=True)]
        except USER_ERRORS as error:
            unreached = [Finding("problem", "Ray", str(error))]
    else:
        unreached = [token(joined=False)]
    here = examine(ray.util.get_node_ip_address(), cache)
    return [*unreached, *findings([here], joined=False)]


def _places(config: RunConfig) -> list[str]:
    return [config.run.storage, *(spec.url for spec in config.data.specs())]

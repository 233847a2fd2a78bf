"""`lxscale train`: start a run, or go on with it."""

from __future__ import annotations

import argparse

from cluster.cli.common import add_run
from cluster.launch import launch
from shards.arguments import given_path
from trainer.config import load_config
from trainer.progress import format_metrics
from trainer.setup import run_url


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=given_path, help="YAML file of the run")
    add_run(parser)
    parser.set_defaults(func=_train)


def _train(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    result = launch(config, ray_address=arguments.ray_address, take_over=arguments.take_over)
    url = run_url(config)
    if result.stopped:
        print(f"stopped at step {result.step}, saved in {url}; the same command goes on")
        return 75
    print(f"done: step {result.step}, saved in {url}")
    if result.metrics:
        print(f"validation: {format_metrics(result.metrics)}")
    return 0

"""`lxscale evaluate`: the metrics of a checkpoint over a data set."""

from __future__ import annotations

import argparse
import json

from cluster.cli.common import CHECKPOINT, add_cache
from cluster.cli.progress import shown_progress
from shards.arguments import given_path, given_place, whole
from trainer.predict import evaluate_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=given_place, help=CHECKPOINT)
    add("--data", type=given_place, required=True, help="folder or URL of a data set")
    add("--blind", action="store_true", help="zero all features")
    add("--batch", type=whole(1), default=256, help="pairs per batch")
    add("--annotations", nargs="+", default=[], type=given_path, metavar="FILE",
        help="the task's own files, for its official metrics")  # fmt: skip
    add("--choices", nargs="+", default=[], type=given_path, metavar="FILE",
        help="GQA's choices, for validity and plausibility")  # fmt: skip
    add_cache(parser)
    add("--json", action="store_true", help="print the metrics as JSON")
    parser.set_defaults(func=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    with shown_progress() as progress:
        metrics = evaluate_checkpoint(
            arguments.checkpoint,
            arguments.data,
            cache=arguments.cache,
            batch_size=arguments.batch,
            blind=arguments.blind,
            annotations=arguments.annotations,
            choices=arguments.choices,
            progress=progress,
        )
    if arguments.json:
        print(json.dumps(metrics, indent=1))
        return 0
    width = max(32, *map(len, metrics))
    for name, value in metrics.items():
        print(f"{name:{width}} {value:.4f}")
    return 0

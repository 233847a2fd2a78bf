"""`lxscale evaluate`: every objective's metrics of a checkpoint over a data set."""

from __future__ import annotations

import argparse
import json

from cluster.cli.common import CHECKPOINT, add_cache
from shards.arguments import given_path, given_place, whole
from trainer.export import evaluate_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=given_place, help=CHECKPOINT)
    parser.add_argument(
        "--data", type=given_place, required=True, help="folder or URL of a data set"
    )
    parser.add_argument("--blind", action="store_true", help="zero all features")
    parser.add_argument("--batch", type=whole(1), default=256, help="pairs per batch")
    add_cache(parser)
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    parser.add_argument(
        "--predictions", type=given_path, help="write the predicted answers as JSON"
    )
    parser.set_defaults(func=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    metrics = evaluate_checkpoint(
        arguments.checkpoint,
        arguments.data,
        cache=arguments.cache,
        batch_size=arguments.batch,
        blind=arguments.blind,
        predictions=arguments.predictions,
    )
    if arguments.json:
        print(json.dumps(metrics, indent=1))
    else:
        for name, value in metrics.items():
            print(f"{name:32} {value:.4f}")
    if arguments.predictions:
        print(f"predictions: {arguments.predictions}")
    return 0

"""`lxscale predict`: a checkpoint's answers to the questions of a data set, as a file."""

from __future__ import annotations

import argparse

from cluster.cli.common import CHECKPOINT, add_cache
from cluster.cli.progress import shown_progress
from shards.arguments import given_path, given_place, whole
from trainer.predict import predict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=given_place, help=CHECKPOINT)
    add("--data", type=given_place, required=True, help="folder or URL of a data set")
    add("--out", type=given_path, required=True, metavar="FILE",
        help="as the task's evaluation takes it")  # fmt: skip
    add("--batch", type=whole(1), default=256, help="pairs per batch")
    add_cache(parser)
    parser.set_defaults(func=_predict)


def _predict(arguments: argparse.Namespace) -> int:
    with shown_progress() as progress:
        answers = predict(
            arguments.checkpoint,
            arguments.data,
            arguments.out,
            cache=arguments.cache,
            batch_size=arguments.batch,
            progress=progress,
        )
    print(f"{arguments.out}: {answers:,} answers")
    return 0

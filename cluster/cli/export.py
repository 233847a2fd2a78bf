"""`lxscale export`: a checkpoint as a folder for Hugging Face's `from_pretrained`."""

from __future__ import annotations

import argparse

from cluster.cli.common import CHECKPOINT, out_place
from shards.arguments import given_place
from trainer.export import export_huggingface


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=given_place, help=CHECKPOINT)
    parser.add_argument(
        "--out", type=out_place, required=True, metavar="URL", help="folder or s3://"
    )
    parser.set_defaults(func=_export)


def _export(arguments: argparse.Namespace) -> int:
    generation = export_huggingface(arguments.checkpoint, arguments.out)
    print(f"{generation.url} -> {arguments.out}")
    return 0

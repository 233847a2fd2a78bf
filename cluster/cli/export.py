"""`lxscale export`: a checkpoint as a folder for Hugging Face's `from_pretrained`."""

from __future__ import annotations

import argparse
from pathlib import Path

from cluster.cli.common import CHECKPOINT
from trainer.export import export_huggingface


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help=CHECKPOINT)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.set_defaults(func=_export)


def _export(arguments: argparse.Namespace) -> int:
    generation = export_huggingface(arguments.checkpoint, arguments.out)
    print(f"{generation.url} -> {arguments.out}")
    return 0

"""`lxscale score`: a file of predictions against a task's own annotations."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from cluster.cli.streams import say
from shards.arguments import given_path
from trainer.scores.gqa import NEEDS, score_gqa
from trainer.scores.nlvr2 import read_labels, score_nlvr2
from trainer.scores.submission import read_gqa, read_nlvr2, read_vqa
from trainer.scores.vqa import score_vqa


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(dest="task", required=True)
    _add(tasks, "vqa", _vqa, "VQA v2's soft accuracy", "VQA v2's files of annotations")
    gqa = _add(tasks, "gqa", _gqa, "GQA's scores", "GQA's files of questions, with answers")
    gqa.add_argument(
        "--choices",
        nargs="+",
        default=[],
        type=given_path,
        metavar="FILE",
        help="GQA's file of choices, for validity and plausibility",
    )
    _add(tasks, "nlvr2", _nlvr2, "NLVR2's accuracy and consistency", "NLVR2's files of statements")


def _add(
    tasks: Any,
    name: str,
    scores: Callable[[argparse.Namespace], dict[str, float]],
    help_: str,
    annotations: str,
) -> argparse.ArgumentParser:
    parser = tasks.add_parser(name, help=help_)
    add = parser.add_argument
    add("predictions", type=given_path, help="as the task's evaluation takes them")
    add(
        "--annotations",
        nargs="+",
        required=True,
        type=given_path,
        metavar="FILE",
        help=annotations,
    )
    add(
        "--missing",
        choices=("error", "zero"),
        default="error",
        help="what a question without a prediction is: an error, or answered wrong "
        "(default: %(default)s)",
    )
    add("--json", action="store_true", help="print the scores as JSON")
    parser.set_defaults(func=_score, scores=scores)
    return parser


def _score(args: argparse.Namespace) -> int:
    scores = args.scores(args)
    if args.json:
        print(json.dumps(scores, indent=1))
        return 0
    width = max(map(len, scores))
    for name, value in scores.items():
        print(f"{name:{width}} {value:.4f}")
    return 0


def _vqa(args: argparse.Namespace) -> dict[str, float]:
    return score_vqa(read_vqa(args.predictions), args.annotations, missing=args.missing)


def _gqa(args: argparse.Namespace) -> dict[str, float]:
    predictions = read_gqa(args.predictions)
    scores = score_gqa(predictions, args.annotations, args.choices, missing=args.missing)
    for name, needed in NEEDS.items():
        if name not in scores:
            say(f"{name} is left out: it needs {needed}")
    return scores


def _nlvr2(args: argparse.Namespace) -> dict[str, float]:
    labels = read_labels(args.annotations)
    return score_nlvr2(read_nlvr2(args.predictions), labels, missing=args.missing)

"""`lxscale checkpoint …`: the generations of a run, and what can be done with them."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from cluster.cli.common import CHECKPOINT, out_place, verdict
from cluster.cli.progress import shown_progress
from shards.arguments import given_place, whole
from shards.urls import shown
from trainer.checkpoint import inspect
from trainer.checkpoint.inspect import Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="checkpoint_command", required=True)
    for name, add, help_ in (
        ("ls", _add_ls, "list the generations of a run, newest first"),
        ("verify", _add_verify, "read and hash all that generations name"),
        ("rm", _add_rm, "remove generations of a run that no job has"),
        ("export", _add_export, "write one for Hugging Face, or for DeepSpeed"),
    ):
        add(commands.add_parser(name, help=help_))


def _add_ls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=given_place, help="a run's folder or URL")
    parser.add_argument("--json", action="store_true", help="a JSON list")
    parser.set_defaults(func=_ls)


def _ls(args: argparse.Namespace) -> int:
    rows = inspect.listing(args.run)
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return 0
    print(f"{'step':>10} {'attempt':>7}  {'saved':<23} {'workers':>7} {'ZeRO':>4} {'MiB':>10}")
    for row in rows:
        print(_line(row))
    return 0


def _line(row: Row) -> str:
    if row.problem:
        return shown(f"{'damaged':>10}  {row.manifest}: {row.problem}")
    size = (row.bytes or 0) / 2**20
    return (
        f"{row.step:>10} {row.attempt:>7}  {row.saved_at or '-':<23} {row.world_size:>7} "
        f"{row.zero_stage:>4} {size:>10,.1f}  {row.manifest}{'  newest' if row.newest else ''}"
    )


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=given_place, help=CHECKPOINT)
    parser.set_defaults(func=_verify)


def _verify(args: argparse.Namespace) -> int:
    with shown_progress() as progress:
        count, problems = inspect.verify(args.checkpoint, progress)
    for problem in problems:
        print(shown(problem))
    return verdict(args.checkpoint, problems, f"{count} generations, whole")


def _add_rm(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=given_place, help=CHECKPOINT)
    add("--step", type=whole(0), action="append", default=[], help="of the run's; may be repeated")
    add("--force", action="store_true", help="the newest whole one, too")
    parser.set_defaults(func=_rm)


def _rm(args: argparse.Namespace) -> int:
    with shown_progress() as progress:
        removed, step = inspect.remove(args.checkpoint, args.step, args.force, progress)
    for name in removed:
        print(f"removed {name}")
    print(f"the run goes on from step {step}")
    return 0


def _add_export(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=given_place, help=CHECKPOINT)
    formats = ("huggingface", "deepspeed-universal")
    add("--to", choices=formats, default=formats[0], help="by default huggingface")
    add("--out", type=out_place, required=True, metavar="URL", help="folder or s3://")
    parser.set_defaults(func=_export)


def _export(args: argparse.Namespace) -> int:
    # With torch, which the other commands do without.
    if args.to == "huggingface":
        from trainer.export import export_huggingface as export
    else:
        from trainer.universal import export_universal as export
    generation = export(args.checkpoint, args.out)
    print(f"{generation.url} -> {args.out}")
    return 0

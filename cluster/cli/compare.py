"""`lxscale compare`: train and measure the runs of a table, and print it beside the paper's."""

from __future__ import annotations

import argparse

from cluster.cli.streams import say
from cluster.compare import compare, jobs
from cluster.comparison import load_comparison, markdown, with_rows
from shards.arguments import given_path, whole
from shards.store.atomic import written_whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("table", type=given_path, help="YAML file of the table, as configs/paper/scenes.yaml")
    add("--jobs", type=whole(1), default=1, metavar="N", help="runs at one time (default: 1)")
    add("--seeds", type=whole(1), nargs="+", metavar="SEED", help="in place of the table's")
    add("--rows", nargs="+", metavar="NAME", help="of the table; the others are left out")
    add("--out", type=given_path, metavar="FILE", help="write the table there, too")
    add("--dry-run", action="store_true", help="list the runs")
    parser.set_defaults(func=_compare)


def _compare(args: argparse.Namespace) -> int:
    table = load_comparison(args.table)
    if args.seeds:
        table = table.model_copy(update={"seeds": tuple(dict.fromkeys(args.seeds))})
    if args.rows:
        table = with_rows(table, args.rows)
    if args.dry_run:
        for job in jobs(table):
            print(job.name + (f" after {job.after}" if job.after else ""))
        return 0
    text = markdown(table, compare(table, args.jobs, say))
    print(text, end="")
    if args.out:
        with written_whole(args.out) as temporary:
            temporary.write_text(text)
    return 0

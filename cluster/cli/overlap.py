"""`lxscale shards overlap`: images that a training set shares with test sets."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from cluster.cli.progress import shown_progress
from shards.arguments import given_path, given_place
from shards.tools.overlap import overlap
from shards.urls import shown

_SHOWN = 5


def add_overlap(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("url", type=given_place, help="a data set, as the one of pre-training")
    add("others", nargs="+", type=given_place, metavar="TEST", help="those it must not share with")
    add("--vg-images", type=given_path, metavar="FILE",
        help="Visual Genome's image_data.json: which of its images are COCO's")  # fmt: skip
    add("--numbers", choices=("coco", "vg"), help="of which collection bare numbers are")
    add("--json", action="store_true", help="print a report for scripts, with all ids")
    add("--quiet", action="store_true", help="no progress")
    parser.set_defaults(func=_overlap)


def _overlap(args: argparse.Namespace) -> int:
    with shown_progress(args.quiet) as progress:
        found = overlap(
            args.url,
            args.others,
            vg_images=args.vg_images,
            numbers=args.numbers,
            progress=progress,
        )
    if args.json:
        print(shown(json.dumps([asdict(o) for o in found])))
        return 1 if found else 0
    for o in found:
        names = ", ".join(o.images[:_SHOWN]) + (", …" if len(o.images) > _SHOWN else "")
        print(f"{shown(o.other)}: {len(o.images):,} images are in {shown(o.url)}, too: {names}")
    if not found:
        print(f"{shown(args.url)}: no image is in any of the others")
    return 1 if found else 0

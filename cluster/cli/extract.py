"""`lxscale shards extract`: pictures → features that `lxscale shards build` takes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from cluster.cli.progress import shown_progress
from shards.arguments import given_name, given_path, whole
from shards.errors import DataError
from shards.extract.boxes import Boxes, BoxesOf, given, grid
from shards.extract.extract import Describe, Extraction, extract
from shards.extract.folder import plan
from shards.sources.features.grid import EXTRACTOR, LAYOUTS, describe
from shards.sources.regions import Options

if TYPE_CHECKING:
    from shards.extract.network import Network


def add_extract(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("images", type=given_path, metavar="IMAGES", help="folder of pictures")
    add("--out", type=given_path, required=True, metavar="DIR")
    where = parser.add_argument_group("where regions are").add_mutually_exclusive_group()
    where.add_argument(
        "--grid", type=whole(1), metavar="N", help=f"a grid: one of {sorted(LAYOUTS)}"
    )
    where.add_argument("--boxes", metavar="FILE",
        help="those of COCO's instances_*.json, or of other features (a TSV, …)")  # fmt: skip
    what = parser.add_argument_group("what describes them").add_argument
    what("--detector", type=given_name, metavar="NAME",
         help="an object-detection model of Hugging Face's, in a folder or on the hub: its boxes, "
         "unless others are given, and the last map of its backbone")  # fmt: skip
    what("--backbone", type=given_name, metavar="NAME",
         help="a model of Hugging Face's with a map, as ResNet, or patches, as ViT (default: the "
         "pixels)")  # fmt: skip
    what("--revision", type=given_name, metavar="NAME",
         help="of a model on the hub: a branch, tag or commit")  # fmt: skip
    add("--min-boxes", type=whole(1), default=10, help="of a detector's (default: 10)")
    add("--max-boxes", type=whole(1), default=36, help="of a detector's (default: 36)")
    add("--threshold", type=_part, default=0.2, help="of their scores (default: 0.2)")
    add("--batch", type=whole(1), default=8,
        help="pictures at a time, padded to one size, from which features follow, too (default: 8)"
    )  # fmt: skip
    add("--device", help="cpu, cuda, … (default: a GPU where there is one)")
    add("--partition", type=_partition, default=(1, 1), metavar="I/N",
        help="the I-th of N parts of the pictures, for N runs")  # fmt: skip
    add("--retry-failed", action="store_true", help="only what has failed")
    add(
        "--feature-dim", type=whole(1, 1 << 20), default=2048, help="of pixels and of --boxes' file"
    )
    add("--dry-run", action="store_true", help="say how much there is to do")
    add("--json", action="store_true", help="print a report for scripts")
    add("--quiet", action="store_true", help="no progress")
    parser.set_defaults(func=_extract)


def _part(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is no number from 0 to 1")
    return value


def _partition(text: str) -> tuple[int, int]:
    i, slash, n = text.partition("/")
    good = slash and i.isdigit() and n.isdigit() and len(n) < 5
    if not good or not 1 <= int(i) <= int(n):
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not I/N with 1 ≤ I ≤ N, as 2/8")
    return int(i), int(n)


def _extract(args: argparse.Namespace) -> int:
    if not (args.grid or args.boxes or args.detector):
        raise DataError("say where regions are: --grid N, --boxes FILE, or --detector NAME")
    if args.detector and args.backbone:
        raise DataError("give --detector or --backbone: features come from one of them")
    if args.min_boxes > args.max_boxes:
        raise DataError(f"--min-boxes {args.min_boxes} is more than --max-boxes {args.max_boxes}")
    if args.dry_run:
        todo = plan(args.images, args.out, args.partition, args.retry_failed)
        found = {"pictures": todo.left, "there": todo.there, "failed": todo.failed}
        print(json.dumps(found) if args.json else
              f"{todo.left:,} pictures to do, {todo.there:,} are done, {todo.failed:,} have "
              "failed. Nothing was written.")  # fmt: skip
        return 0
    with ExitStack() as stack:
        network = _network(args)
        how = _describe(args, network, stack)
        asked = Extraction(
            args.images,
            args.out,
            _settings(args, network),
            args.partition,
            args.batch,
            args.retry_failed,
        )
        with shown_progress(args.quiet) as progress:
            outcome = extract(asked, how, progress)
    if args.json:
        print(json.dumps({"out": str(args.out), **asdict(outcome)}))
    else:
        print(
            f"{args.out}: {outcome.pictures:,} pictures, {outcome.there:,} were done; "
            f"{outcome.tars:,} tars written; {outcome.failed:,} failed"
            + (" (*.failures.jsonl; --retry-failed)" if outcome.failed else "")
        )
    return 1 if outcome.failed else 0


def _network(args: argparse.Namespace) -> Network | None:
    if not (args.detector or args.backbone):
        return None
    from shards.extract.network import load  # torch takes seconds

    name = args.detector or args.backbone
    return load(name, bool(args.detector), args.device, args.revision)


def _settings(args: argparse.Namespace, network: Network | None) -> dict[str, object]:
    """What the features follow from, the same on every machine."""
    boxes: object = [args.min_boxes, args.max_boxes, args.threshold]
    if args.grid:
        boxes = f"grid {args.grid}"
    elif args.boxes:
        path = Path(args.boxes)
        size = f" ({path.stat().st_size:,} bytes)" if path.is_file() else ""
        boxes = f"{path.name}{size}"
    if network:
        return {"features": network.name, "boxes": boxes}
    return {"features": EXTRACTOR, "boxes": boxes, "feature_dim": args.feature_dim}


def _describe(args: argparse.Namespace, network: Network | None, stack: ExitStack) -> Describe:
    boxes_of: BoxesOf | None = None
    if args.grid:
        boxes_of = grid(args.grid)
    elif args.boxes:
        boxes_of = given(args.boxes, Options(feature_dim=args.feature_dim), stack)

    def how(pictures: Sequence[tuple[str, Image.Image]]) -> list[tuple[Boxes, np.ndarray] | str]:
        seen = network.look([p for _, p in pictures]) if network else [None] * len(pictures)
        out: list[tuple[Boxes, np.ndarray] | str] = []
        features: np.ndarray
        for (name, picture), one in zip(pictures, seen, strict=True):
            try:
                if isinstance(one, str):
                    raise ValueError(one)
                if boxes_of:
                    regions = boxes_of(name, *picture.size)
                else:
                    assert one is not None and one.found is not None
                    regions = one.found.best(args.min_boxes, args.max_boxes, args.threshold)
                if one is not None:
                    features = one.features(regions.boxes)
                else:
                    features = describe(picture, regions.boxes, args.feature_dim)
            except DataError:
                raise
            except ValueError as error:
                out.append(str(error))
                continue
            out.append((regions, features))
        return out

    return how

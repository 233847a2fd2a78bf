"""What several commands share: arguments of one meaning, and the last line of a check."""

from __future__ import annotations

import argparse
import math
import re

CHECKPOINT = "a run's folder or URL, or a checkpoint's manifest"


def add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache", help="folder of the node cache")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Arguments of commands that run workers."""
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--ray-address", help="join this Ray cluster (default: a local one)")
    parser.add_argument(
        "--take-over", action="store_true", help="take the run from a job that is alive"
    )


def positive(text: str) -> float:
    """The type of a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def at_least_one(text: str) -> int:
    """The type of a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def out_place(text: str) -> str:
    """The type of --out: a folder or an s3:// prefix, without slashes at its end."""
    if text.startswith("s3:") and not re.match(r"s3://[^/]", text):
        raise argparse.ArgumentTypeError(f"{text!r} names no bucket: give s3://bucket/prefix")
    scheme = re.match(r"(\w[\w+.-]*)://", text)
    if (scheme and scheme[1] not in ("s3", "file")) or re.match(r"file://[^/]", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no folder, no s3:// and no file:/// URL")
    place = text.removeprefix("file://").strip()
    if not place.strip("/"):
        what = "is the root of all files" if place else "is empty"
        raise argparse.ArgumentTypeError(f"{text!r} {what}: name a folder, or s3://bucket/prefix")
    return text.rstrip("/")


def verdict(place: str, problems: list[str], good: str) -> int:
    """Print how many problems there are, or `good`; the exit status."""
    print(f"{place}: {f'{len(problems)} problems' if problems else good}")
    return 1 if problems else 0

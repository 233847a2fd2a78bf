"""What several commands share: arguments of one meaning, and the last line of a check."""

from __future__ import annotations

import argparse

CHECKPOINT = "a run's folder or URL, or a checkpoint's manifest"


def add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache", help="folder of the node cache")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Arguments of commands that run workers."""
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--ray-address", help="join this Ray cluster (default: a local one)")


def verdict(place: str, problems: list[str], good: str) -> int:
    """Print how many problems there are, or `good`; the exit status."""
    print(f"{place}: {f'{len(problems)} problems' if problems else good}")
    return 1 if problems else 0

"""The command as a user gives it, and what it leaves as a build reads it."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.cli.main import main
from shards.sources.features.tars import FORMAT
from shards.sources.regions import Options, Regions


def run(*arguments: object) -> int:
    return main(["shards", "extract", *map(str, arguments), "--quiet"])


def regions(folder: Path, dim: int) -> dict[str, Regions]:
    """What was extracted; each picture is there once."""
    options, out = Options(feature_dim=dim), {}
    for tar in FORMAT.files(str(folder)):
        with FORMAT.reader(tar, options) as read:
            for entry in FORMAT.entries(tar, options):
                assert not entry.problem
                assert entry.image not in out, "it is there twice"
                out[entry.image] = read(entry)
    return out


def failures(folder: Path) -> dict[str, str]:
    """The pictures that are listed, with the reasons."""
    lines = [x for p in sorted(folder.glob("*.failures.jsonl")) for x in p.open(encoding="utf-8")]
    return {entry["image"]: entry["reason"] for entry in map(json.loads, lines)}

"""`lxscale shards scenes`: drawn pictures with sentences, as inputs of `build`."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict
from pathlib import Path

from cluster.cli.progress import shown_progress
from shards.arguments import given_path, whole
from shards.sources.scenes.picture import FEATURE_DIM
from shards.sources.scenes.write import EXTRACTOR, SceneSettings, Written, write_scenes

_FEWEST = 100  # fewer have no question with all of its answers among the held-out tenth


def add_scenes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    default = SceneSettings()
    add("out", type=given_path, metavar="OUT", help="a folder that is not there, or empty")
    add("--images", type=whole(_FEWEST), default=default.images, metavar="N",
        help="pictures of the training set, with captions and questions; validation and test have "
        "a tenth each (default: %(default)s)")  # fmt: skip
    add("--pairs", type=whole(0), default=default.pairs, metavar="P",
        help="pairs of other pictures, with statements (default: %(default)s)")  # fmt: skip
    add("--questions", type=whole(1, 20), default=default.questions, metavar="Q",
        help="of a picture, at most (default: %(default)s)")  # fmt: skip
    add("--seed", type=whole(0), default=default.seed, help="all follows from it (default: 0)")
    add("--json", action="store_true", help="print a report for scripts")
    add("--quiet", action="store_true", help="no progress")
    parser.set_defaults(func=_scenes)


def _scenes(args: argparse.Namespace) -> int:
    settings = SceneSettings(args.images, args.pairs, args.questions, args.seed)
    with shown_progress(args.quiet) as progress:
        written = write_scenes(args.out, settings, progress)
    commands = [_build_command(args.out, name) for name in written.counts]
    if args.json:
        told = {"out": str(args.out), **asdict(written), "feature_dim": FEATURE_DIM}
        print(json.dumps(told | {"commands": commands}))
        return 0
    print(f"{args.out}: " + ("written" if written.fresh else "was there already, as asked for"))
    for line in _lines(written):
        print(line)
    print("to make data sets of it:")
    for command in commands:
        print(f"  {command}")
    return 0


def _lines(written: Written) -> list[str]:
    out = []
    for name, counts in written.counts.items():
        line = f"  {name:12s} " + ", ".join(f"{n:,} {what}" for what, n in counts.items())
        if prior := written.prior.get(name):
            number = sum(p.questions for p in prior.values())
            right, chance = (
                sum(p.questions * getattr(p, what) for p in prior.values()) / max(number, 1)
                for what in ("accuracy", "chance")
            )
            line += f"; of the text alone {right:.1%} (chance {chance:.1%})"
        out.append(line)
    return out


def _build_command(out: Path, name: str) -> str:
    """What makes a data set of a folder, beside OUT: of words that all of them share, and answers
    that those of questions share; those of statements are true and false alone."""
    files = (
        ["statements.json"] if name.startswith("pairs-") else ["captions.jsonl", "questions.jsonl"]
    )
    words = ["lxscale", "shards", "build", "--features", str(out / name / "features.tsv")]
    words += ["--sentences", *(str(out / name / file) for file in files)]
    shards = out.with_name(f"{out.name}-shards")
    answers = shards / "pairs-train" if name.startswith("pairs-") else out / "answers.json"
    words += [] if name == "pairs-train" else ["--answers", str(answers)]
    words += ["--vocab", str(out / "vocab.txt")]
    words += ["--feature-dim", str(FEATURE_DIM), "--extractor", EXTRACTOR]
    return shlex.join([*words, "--out", str(shards / name)])

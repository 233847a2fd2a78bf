"""The paper's relations, small: an hour on two cores. python benchmarks/paper.py [--help]

Draws scenes, writes easy-VQA, builds their data sets under data/ where they are not there yet, then
trains and measures the tables configs/paper/scenes.yaml and configs/paper/easy-vqa.yaml. What is
done is not done again. `make paper` runs it; results with seeds: docs/paper.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from protocol import machine

DATA, TABLES = Path("data"), Path("configs/paper")
IMAGES, PAIRS, FEW_IMAGES, FEW_EASY = 8000, 3000, 500, 100
WIDTH = "110"  # of the features of scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at one time (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), help="folder of the tables")
    given = parser.parse_args()
    began = time.monotonic()
    scenes()
    easy_vqa()
    built = time.monotonic()
    for name in ("scenes", "easy-vqa"):
        table = given.out / f"{name}.md"
        lxscale("compare", TABLES / f"{name}.yaml", "--jobs", given.jobs, "--out", table)
    minutes = (built - began) / 60, (time.monotonic() - built) / 60
    print(f"{machine()}; data {minutes[0]:.0f} min, training {minutes[1]:.0f} min")


def lxscale(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "cluster.cli", *map(str, arguments)], check=True)


def missing(folder: Path) -> bool:
    return not (folder / "manifest.json").exists()


def scenes() -> None:
    """Data sets of drawn scenes; `few`: the questions about the first few pictures."""
    folder, sources = DATA / "scenes", DATA / "scenes" / "sources"
    lxscale("shards", "scenes", sources, "--images", IMAGES, "--pairs", PAIRS, "--quiet")
    for split in ("train", "valid", "test"):
        for pairs, names in (("", ("captions.jsonl", "questions.jsonl")),
                             ("pairs-", ("statements.json",))):  # fmt: skip
            place, out = sources / f"{pairs}{split}", folder / f"{pairs}{split}"
            if missing(out):
                answers = sources / "answers.json" if not pairs else folder / "pairs-train"
                table = [] if out == folder / "pairs-train" else ["--answers", answers]
                lxscale("shards", "build", "--quiet", "--features", place / "features.tsv",
                        "--sentences", *(place / n for n in names), *table,
                        "--vocab", sources / "vocab.txt", "--feature-dim", WIDTH,
                        "--extractor", "scenes", "--out", out)  # fmt: skip
    if missing(folder / "few"):
        lxscale("shards", "subset", folder / "train", "--out", folder / "few",
                "--limit", FEW_IMAGES, "--quiet")  # fmt: skip


def easy_vqa() -> None:
    """easy-VQA as the demo has it; `few`: the questions about the first few pictures."""
    from cluster.cli.demo import build_data

    folder = DATA / "easy_vqa"
    build_data(folder)
    if missing(folder / "few"):
        lxscale("shards", "subset", folder / "train", "--out", folder / "few",
                "--limit", FEW_EASY, "--quiet")  # fmt: skip


if __name__ == "__main__":
    main()

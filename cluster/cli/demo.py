"""`lxscale demo`: real pictures and questions to a trained LXMERT, and what it learned."""

from __future__ import annotations

import argparse
import time
from importlib.resources import files
from pathlib import Path

from cluster.cli.common import add_run
from cluster.cli.progress import shown_progress
from cluster.launch import launch
from shards.convert.convert import convert
from shards.convert.inputs import FeatureInput, Inputs, SentenceInput
from shards.errors import DataError
from shards.format.answers import load_answers
from shards.format.build import BuildSettings
from shards.format.manifest import load_manifest
from shards.format.record import Report
from shards.sources.easy_vqa import write_easy_vqa
from shards.sources.features.grid import EXTRACTOR
from trainer.config import RunConfig, load_config
from trainer.curves import curves_url
from trainer.loop import TrainResult
from trainer.predict import evaluate_checkpoint
from trainer.setup import run_url

# A grid of 1 + 9 overlapping boxes is enough for pictures of 64 x 64 with one shape each.
BOXES = "10"
# `--full` goes on with the same run to this many epochs.
FULL_EPOCHS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help="train on to at least 99 %%")
    add_run(parser)
    parser.set_defaults(func=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    """Build, train, evaluate with and without sight, and print a summary."""
    began = time.monotonic()
    with_full = [f"train.epochs={FULL_EPOCHS}"] if arguments.full else []
    config = load_config(str(files("configs") / "demo.yaml"), [*with_full, *arguments.overrides])
    build_data(Path(config.data.specs()[0].url).parent)
    built = time.monotonic()
    result = launch(config, ray_address=arguments.ray_address, take_over=arguments.take_over)
    if result.stopped:
        return 75
    trained = time.monotonic()
    url = run_url(config)
    test = str(config.data.validation)
    seeing = evaluate_checkpoint(url, test)
    blind = evaluate_checkpoint(url, test, blind=True)
    print(
        summary(
            config,
            seeing["accuracy/qa"],
            blind["accuracy/qa"],
            result,
            (built - began, trained - built, time.monotonic() - trained),
        )
    )
    return 0


def build_data(folder: Path) -> None:
    """Shards of easy-VQA's training and test sets in folder/train and folder/test, where they are
    not there yet."""
    missing = [split for split in ("train", "test") if not _is_built(folder / split)]
    written = write_easy_vqa(folder / "sources") if missing else None
    for split in missing:
        assert written is not None
        report = Report()
        settings = BuildSettings(
            f"easy-vqa-{split}",
            EXTRACTOR,
            vocab=None if split == "train" else folder / "train",
            answers=load_answers(written.answers),
            images_per_shard=500,
        )
        with shown_progress() as progress:
            inputs = Inputs(
                (FeatureInput(str(written.images[split]), "grid", settings={"boxes": BOXES}),),
                (SentenceInput((written.sentences[split],)),),
            )
            convert(inputs, folder / split, settings, report=report, progress=progress)


def _is_built(folder: Path) -> bool:
    try:
        load_manifest(str(folder))
    except DataError:
        return False
    return True


def summary(
    config: RunConfig,
    seeing: float,
    blind: float,
    result: TrainResult,
    seconds: tuple[float, float, float],
) -> str:
    """What the demo prints at its end."""
    url = run_url(config)
    # A run that was complete already trained nothing now.
    speed = f"{result.pairs / result.seconds:,.0f} pairs/s, " if result.pairs else ""
    return f"""
easy-VQA, 9,673 held-out questions
  accuracy                {seeing:7.2%}
  the same model, blind   {blind:7.2%}   (features zeroed: what the questions alone give away)
training   {speed}{config.cluster.workers} workers, \
step {result.step}
time       data {seconds[0]:.0f} s, training {seconds[1]:.0f} s, evaluation {seconds[2]:.0f} s
run        {url}
curves     tensorboard --logdir {curves_url(config)}
resume     the same command goes on from the last checkpoint; for longer: lxscale demo --full
evaluate   lxscale evaluate {url} --data {config.data.validation}
"""

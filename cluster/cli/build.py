"""`lxscale shards build` and `lxscale shards formats`: users' files → a data set."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cluster.cli.common import add_sentences, out_place, sentence_inputs
from cluster.cli.progress import shown_progress
from cluster.cli.streams import say
from shards.arguments import given_name, given_path, given_place, size, whole
from shards.convert.convert import Append, convert, forecast
from shards.convert.inputs import FeatureInput, Inputs
from shards.convert.pool import Workers, in_processes
from shards.convert.recipe import inputs_of, load_recipe
from shards.errors import DataError, explained
from shards.format.answers import load_answers
from shards.format.build import BuildSettings
from shards.format.info import info
from shards.format.manifest import given_file
from shards.format.pretrained import pretrained_vocab
from shards.format.record import Report
from shards.inspect.summary import Settings as InspectSettings
from shards.inspect.summary import inspect
from shards.progress import Progress
from shards.sources import features, sentences
from shards.sources.regions import Options
from shards.store import objects
from shards.store.atomic import written_whole


def add_build(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = parser.add_argument_group("what it is made of").add_argument
    what("--features", nargs="+", type=given_place, metavar="PLACE", default=[],
         help="files, folders or URLs of features, or of pictures")  # fmt: skip
    what("--features-format", metavar="NAME", type=given_name,
         help="see `lxscale shards formats` (default: each place's is detected)")  # fmt: skip
    what("--feature-option", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
         type=_option, help="of the format")  # fmt: skip
    what("--numbers", choices=("coco", "vg"),
         help="whose images bare numbers in the features stand for")  # fmt: skip
    add_sentences(parser)
    what("--vg-images", type=given_path, metavar="JSON",
         help="Visual Genome's image_data.json: which of its images are COCO's")  # fmt: skip
    what("--recipe", type=given_path, metavar="YAML",
         help="in place of these, for data sets below --out: see docs/shards.md")  # fmt: skip
    add("--out", type=out_place, required=True, metavar="URL", help="folder or s3:// prefix")
    words = parser.add_argument_group("words").add_argument
    words("--answers", type=given_path, metavar="JSON",
          help="answer table, or a data set that has it (default: from the data)")  # fmt: skip
    words("--min-answer-count", type=whole(1), default=1,
          help="sentences that an answer needs for it")  # fmt: skip
    vocab = parser.add_mutually_exclusive_group().add_argument
    vocab("--vocab", type=given_path, metavar="TXT",
          help="vocab.txt, or a data set that has it (default: train one)")  # fmt: skip
    vocab("--tokenizer", metavar="FOLDER", help="or a name: for Hugging Face's AutoTokenizer")
    words("--vocab-size", type=whole(1), default=30522, help="most tokens of a trained one")
    words("--max-tokens", type=whole(3, 1 << 16), default=20,
          help="with [CLS] and [SEP] (default: %(default)s)")  # fmt: skip
    add("--name", help="name of the data set (default: the last part of --out)")
    add("--extractor", help="what made the features (default: as the format says)")
    add("--feature-dim", type=whole(1, 1 << 20), default=2048)
    add("--feature-type", choices=("fp16", "fp32", "uint8"),
        help="how features are stored; uint8: with a scale a box (default: fp16)")  # fmt: skip
    add("--shard-mb", type=size(1 << 20), default="128",
        help="size of a shard (default: %(default)s MiB)")  # fmt: skip
    add("--images-per-shard", type=whole(1), help="a shard ends at so many, too")
    how = parser.add_argument_group("how").add_argument
    how("--workers", type=whole(1), help="processes (default: one a core)")
    how("--ray-address", help="make the shards on this Ray cluster")
    how("--staging", type=given_path, metavar="DIR", help="room for what is under way")
    how("--skip-bad", action="store_true", help="leave bad records out and report them")
    add("--overwrite", action="store_true", help="replace a data set at --out")
    add("--append", action="store_true", help="add new images to the data set at --out")
    add("--retry-failed", action="store_true",
        help="add those images to the data set at --out that it lacks")  # fmt: skip
    add("--dry-run", action="store_true", help="say what would be built, its size and time")
    add("--report", type=given_path, metavar="FILE",
        help="write what was left out and why, and what is in the data set, as JSON")  # fmt: skip
    add("--json", action="store_true", help="print a report for scripts")
    add("--quiet", action="store_true", help="no progress")
    parser.set_defaults(func=_build)


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not NAME=VALUE")
    return name, value


def _inputs(args: argparse.Namespace) -> Inputs:
    settings = dict(args.feature_option)
    return Inputs(
        features=tuple(
            FeatureInput(place, args.features_format, args.numbers, None, settings)
            for place in args.features
        ),
        sentences=sentence_inputs(args),
        vg_images=args.vg_images,
    )


def _build(args: argparse.Namespace) -> int:
    _check(args)
    if not args.recipe:
        return _one(args, _inputs(args), args.out, _settings(args, args.out))
    recipe = load_recipe(args.recipe)
    if recipe.answers and not args.answers:
        args.answers = recipe.path(recipe.answers)
    if recipe.vocab and not (args.vocab or args.tokenizer):
        args.vocab = recipe.path(recipe.vocab)
    first = None
    for name in recipe.data_sets:
        inputs, out = inputs_of(recipe, name), objects.join(args.out, name)
        args.features = [f.place for f in inputs.features]
        settings = _settings(args, out)
        if first and not args.dry_run:  # the words of all are those of the first
            vocab, answers = (given_file(first, which) for which in ("vocab", "answers"))
            settings = replace(settings, vocab=vocab, answers=load_answers(answers))
        _one(args, inputs, out, settings, name)
        first = first or out
    return 0


def _check(args: argparse.Namespace) -> None:
    if bool(args.recipe) == bool(args.features):
        raise DataError("give --features, or a --recipe in place of them")
    if args.recipe and (args.sentences or args.append or args.retry_failed):
        raise DataError("a --recipe names the sentences, and builds anew: leave the other out")
    if args.feature_type and (args.append or args.retry_failed):
        raise DataError("--append keeps the --feature-type of the data set: leave it out")
    if args.dry_run and (args.append or args.retry_failed):
        raise DataError("--dry-run is of a new data set: leave --append and --retry-failed out")
    if args.overwrite and (args.append or args.retry_failed):
        raise DataError("--overwrite replaces the data set that --append would add to")


def _settings(args: argparse.Namespace, out: str) -> BuildSettings:
    extractors = {
        features.feature_format(place, args.features_format).extractor for place in args.features
    }
    if args.extractor is None and len(extractors) > 1:
        raise DataError(
            f"the features are of several extractors ({', '.join(sorted(extractors))}), which are "
            "no substitutes for each other: say with --extractor what they are"
        )
    return BuildSettings(
        name=args.name or os.path.basename(os.path.abspath(out)),
        extractor=args.extractor or extractors.pop(),
        vocab=args.vocab if args.tokenizer is None else pretrained_vocab(args.tokenizer),
        vocab_size=args.vocab_size,
        answers=load_answers(given_file(args.answers, "answers")) if args.answers else None,
        min_answer_count=args.min_answer_count,
        shard_bytes=args.shard_mb,
        images_per_shard=args.images_per_shard,
        max_tokens=args.max_tokens,
        feature_type=args.feature_type or "fp16",
        overwrite=args.overwrite,
        skip_bad=args.skip_bad,
    )


def _one(
    args: argparse.Namespace, inputs: Inputs, out: str, settings: BuildSettings, name: str = ""
) -> int:
    """Build one data set; name: of those of a recipe."""
    report, options = Report(), Options(feature_dim=args.feature_dim)
    append: Append | None = None
    if args.append or args.retry_failed:
        append = "missing" if args.retry_failed else "new"
    try:
        with shown_progress(args.quiet) as progress:
            if args.dry_run:
                found = forecast(
                    inputs, settings, options=options, staging=args.staging, report=report,
                    progress=progress,
                )  # fmt: skip
            else:
                manifest = convert(
                    inputs,
                    out,
                    settings,
                    options=options,
                    append=append,
                    workers=_workers(args),
                    staging=args.staging,
                    report=report,
                    progress=progress,
                )
    finally:  # of a build that fails, too: what was left out may be why
        if not args.json:
            for line in report.lines():
                say(f"left out: {line}")
            for note in report.notes:
                say(note)
    left_out: dict[str, Any] = {
        "left_out": report.counts,
        "examples": report.examples,
        "notes": report.notes,
    }
    if args.report and not args.dry_run:
        with shown_progress(args.quiet) as progress:
            file = args.report.with_name(f"{name}-{args.report.name}") if name else args.report
            _write_report(file, out, left_out, progress)
    if args.dry_run:
        workers = args.workers or len(os.sched_getaffinity(0))
        if args.json:
            print(json.dumps({"out": out, **asdict(found), **left_out}))
        else:
            print(_forecast_text(out, found, workers))
    elif args.json:
        counts = asdict(manifest.counts) | {"shards": len(manifest.shards)}
        print(json.dumps({"out": out, "fingerprint": manifest.fingerprint, **counts, **left_out}))
    else:
        print(info(out))
    return 0


def _write_report(path: Path, out: str, left_out: dict[str, Any], progress: Progress) -> None:
    """What was built, and what was left out of it."""
    summary, _ = inspect(out, InspectSettings(), progress=progress)
    entry = {"out": out, **left_out, "data_set": summary.document()}
    with explained(path), written_whole(path) as temporary:
        temporary.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")


def _forecast_text(out: str, found: Any, workers: int) -> str:
    per_set = ", ".join(f"{n:,} {source}" for source, n in found.pairs_per_source.items())
    return (
        f"{out}: {found.images:,} images, {found.pairs:,} pairs ({per_set}) in {found.shards:,} "
        f"shards of {found.bytes / 1e9:.2f} GB; about {found.seconds / workers / 60:.1f} minutes "
        f"with {workers} processes. Nothing was written."
    )


def _workers(args: argparse.Namespace) -> Workers:
    if args.ray_address:
        from cluster.convert_on_ray import on_ray

        return on_ray(args.ray_address, args.workers)
    return in_processes(args.workers)


# --- formats ------------------------------------------------------------------------------------


def add_formats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="one of them: its options")
    parser.set_defaults(func=_formats)


def _formats(args: argparse.Namespace) -> int:
    if args.name:
        for name, help_ in features.feature_format("", args.name).settings.items():
            print(f"  {name:16s} {help_}")
        return 0
    print("features (--features, --features-format):")
    for name, form in features.FORMATS.items():
        print(f"  {name:12s} {form.help}")
    print("sentences (--sentences FORMAT:FILE):")
    for name, text in sentences.FORMATS.items():
        print(f"  {name:12s} {text.help}")
    print("or the path of a module that has a FORMAT of your own")
    return 0

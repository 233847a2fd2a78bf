"""`lxscale shards merge | split | subset | push | pull | index | migrate`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cluster.cli.common import out_place, ranges
from cluster.cli.progress import shown_progress
from cluster.cli.streams import say
from shards.arguments import given_name, given_path, given_place, size, whole
from shards.errors import DataError
from shards.format.manifest import Manifest
from shards.format.record import Report
from shards.tools.filters import Filter, read_ids
from shards.tools.index import Indexing, index
from shards.tools.merge import Joined, merge, merge_plan
from shards.tools.migrate import migrate
from shards.tools.rewriting import Rewriting
from shards.tools.subset import (
    Amount,
    Choice,
    Dealing,
    split,
    split_amounts,
    subset,
    subset_amount,
)
from shards.tools.transfer import JOBS, transfer
from shards.urls import shown


def _add_out(parser: argparse.ArgumentParser) -> None:
    """Where a result goes, and how it is told."""
    add = parser.add_argument
    add("--out", type=out_place, required=True, metavar="URL", help="folder or s3:// prefix")
    _add_rest(parser)


def _add_rest(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--overwrite", action="store_true", help="replace a data set that is there")
    add("--staging", type=given_path, metavar="DIR", help="room for a shard that is under way")
    add("--json", action="store_true", help="print a report for scripts")
    add("--quiet", action="store_true", help="no progress")


def _add_dry_run(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--dry-run", action="store_true", help=what)


def _add_shards(parser: argparse.ArgumentParser) -> None:
    """How records are written."""
    add = parser.add_argument
    add("--shard-mb", type=size(1 << 20), default="128",
        help="size of a shard (default: %(default)s MiB)")  # fmt: skip
    add("--images-per-shard", type=whole(1), help="a shard ends at so many, too")


def _rewriting(args: argparse.Namespace, out: str, name: str | None = None) -> Rewriting:
    return Rewriting(name or _name(out), args.shard_mb, args.images_per_shard)


def _name(out: str) -> str:
    """The name of a data set that is given none."""
    return os.path.basename(out.rstrip("/")) or "data"


def _made(out: str, manifest: Manifest) -> dict[str, Any]:
    """What is told of a data set that has been written."""
    shards = manifest.shards
    return {
        "out": out,
        "name": manifest.name,
        "fingerprint": manifest.fingerprint,
        **asdict(manifest.counts),
        "shards": len(shards),
        "bytes": int(shards.size.sum() + shards.table_size.sum()),
    }


def _line(told: dict[str, Any]) -> str:
    return (
        f"{told['out']}: {told['images']:,} images, {told['pairs']:,} pairs in {told['shards']:,} "
        f"shards of {told['bytes'] / 1e6:,.1f} MB"
    )


def _tell(args: argparse.Namespace, told: Any, lines: Sequence[str]) -> int:
    if args.json:
        print(shown(json.dumps(told)))
    else:
        for line in lines:
            print(shown(line))
    return 0


def _say_left_out(args: argparse.Namespace, report: Report) -> dict[str, Any]:
    if not args.json:
        for line in report.lines():
            say(line)
    return {"left_out": report.counts, "examples": report.examples}


# --- merge --------------------------------------------------------------------------------------


def add_merge(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "url", nargs="+", type=given_place, help="data sets; the first one's answers keep their ids"
    )
    _add_out(parser)
    add("--name", type=given_name, help="of the result (default: the last part of --out)")
    add("--vocab", type=given_path, metavar="TXT",
        help="vocab.txt, or a data set that has it (default: the first one's)")  # fmt: skip
    add("--allow-extractors", action="store_true",
        help="merge features of different extractors, which are not interchangeable")  # fmt: skip
    _add_dry_run(parser, "say whether they fit together and what they would make")
    parser.set_defaults(func=_merge)


def _merge(args: argparse.Namespace) -> int:
    if args.dry_run:
        joined = merge_plan(
            args.url, vocab=args.vocab, allow_extractors=args.allow_extractors, staging=args.staging
        )
        told = _joined(args, joined)
        copied = sum(joined.copied)
        return _tell(args, told, [
            f"{_line(told)}; {joined.new_answers:,} answers come to the first one's",
            f"tables of {copied} of {len(args.url)} are copied, the others are made anew; whether "
            "an image comes twice is seen when they are merged. Nothing was written.",
        ])  # fmt: skip
    with shown_progress(args.quiet) as progress:
        made = merge(
            args.url,
            args.out,
            args.name or _name(args.out),
            vocab=args.vocab,
            allow_extractors=args.allow_extractors,
            overwrite=args.overwrite,
            staging=args.staging,
            progress=progress,
        )
    told = _made(args.out, made)
    return _tell(args, told, [_line(told)])


def _joined(args: argparse.Namespace, joined: Joined) -> dict[str, Any]:
    return {
        "out": args.out,
        **asdict(joined.counts),
        "shards": joined.shards,
        "bytes": joined.bytes,
        "answers": len(joined.answers),
        "new_answers": joined.new_answers,
        "tables_copied": dict(zip(args.url, joined.copied, strict=True)),
    }


# --- subset, split ------------------------------------------------------------------------------


def add_subset(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("url", type=given_place)
    _add_out(parser)
    keep = parser.add_argument_group("what is kept").add_argument
    keep("--images", type=given_path, metavar="FILE", help="only these images, ids one a line")
    keep("--exclude", type=given_path, metavar="FILE", help="without these, likewise")
    keep("--sources", type=given_name, metavar="A,B",
         help="sentences of these sets, and images that have some")  # fmt: skip
    keep("--split", type=given_name, help="images of this split, where records name one")
    some = parser.add_mutually_exclusive_group().add_argument
    some("--sample", type=whole(1), metavar="N", help="so many images, drawn at random")
    some("--limit", type=whole(1), metavar="N", help="the first so many")
    add("--seed", type=whole(0), default=0, help="of --sample's draw (default: 0)")
    add("--name", type=given_name, help="of the result (default: the last part of --out)")
    _add_shards(parser)
    _add_dry_run(parser, "say what would be written; the tars are read for it")
    parser.set_defaults(func=_subset)


def _choice(args: argparse.Namespace) -> Choice:
    sources = None
    if args.sources is not None:
        sources = frozenset(s.strip() for s in args.sources.split(",")) - {""}
        if not sources:
            raise DataError(f"--sources {args.sources!r:.80} names no set: give them as vqa,gqa")
    keep = Filter(
        images=read_ids(args.images) if args.images else None,
        exclude=read_ids(args.exclude) if args.exclude else frozenset(),
        sources=sources,
        split=args.split,
    )
    return Choice(keep, args.sample, args.seed, args.limit)


def _subset(args: argparse.Namespace) -> int:
    choice, report = _choice(args), Report()
    with shown_progress(args.quiet) as progress:
        if args.dry_run:
            amount = subset_amount(
                args.url, choice, staging=args.staging, report=report, progress=progress
            )
            told = {"out": args.out, **asdict(amount)}
            lines = [f"{_amount(args.out, amount)}. Nothing was written."]
        else:
            made = subset(
                args.url,
                args.out,
                choice,
                _rewriting(args, args.out, args.name),
                overwrite=args.overwrite,
                staging=args.staging,
                report=report,
                progress=progress,
            )
            told = _made(args.out, made)
            lines = [_line(told)]
    return _tell(args, told | _say_left_out(args, report), lines)


def _amount(out: str, amount: Amount) -> str:
    return (
        f"{out}: {amount.images:,} images, {amount.pairs:,} pairs of about "
        f"{amount.bytes / 1e6:,.1f} MB"
    )


def add_split(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("url", type=given_place)
    add("--out", type=out_place, action="append", required=True, metavar="URL",
        help="a part's folder or s3:// prefix; one for each")  # fmt: skip
    _add_rest(parser)
    how = parser.add_mutually_exclusive_group(required=True).add_argument
    how("--by", nargs="+", type=float, metavar="SHARE",
        help="shares of the parts, as 0.9 0.1: an image's part follows from its id")  # fmt: skip
    how("--images", type=given_path, metavar="FILE",
        help="the first part has these images, ids one a line, the second all others")  # fmt: skip
    add("--seed", type=whole(0), default=0, help="another one deals otherwise (default: 0)")
    _add_shards(parser)
    _add_dry_run(parser, "say what the parts would have; the tars are read for it")
    parser.set_defaults(func=_split)


def _split(args: argparse.Namespace) -> int:
    report = Report()
    images = read_ids(args.images) if args.images else None
    dealing = Dealing(tuple(args.by or ()), args.seed, images)
    with shown_progress(args.quiet) as progress:
        if args.dry_run:
            amounts = split_amounts(
                args.url, args.out, dealing, staging=args.staging, progress=progress
            )
            pairs = list(zip(args.out, amounts, strict=True))
            told = [{"out": out, **asdict(amount)} for out, amount in pairs]
            lines = [*(_amount(*pair) for pair in pairs), "Nothing was written."]
        else:
            made = split(
                args.url,
                args.out,
                dealing,
                [_rewriting(args, out) for out in args.out],
                overwrite=args.overwrite,
                staging=args.staging,
                report=report,
                progress=progress,
            )
            told = [_made(out, m) for out, m in zip(args.out, made, strict=True)]
            lines = [_line(part) for part in told]
    return _tell(args, {"parts": told} | _say_left_out(args, report), lines)


# --- push, pull ---------------------------------------------------------------------------------


def add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", type=given_place)
    parser.add_argument("out", type=out_place, help="s3:// prefix, or a folder")
    _add_transfer(parser)
    parser.set_defaults(shards=None, name=None)


def add_pull(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", type=given_place)
    parser.add_argument("out", type=out_place, help="folder, or s3:// prefix")
    parser.add_argument("--shards", type=ranges, metavar="A-B,C", help="only these, from 0")
    parser.add_argument("--name", type=given_name, help="of a data set of some shards")
    _add_transfer(parser)


def _add_transfer(parser: argparse.ArgumentParser) -> None:
    _add_rest(parser)
    parser.add_argument("--jobs", type=whole(1, 256), default=JOBS,
                        help="files at a time (default: %(default)s)")  # fmt: skip
    _add_dry_run(parser, "say what would be copied")
    parser.set_defaults(func=_transfer)


def _transfer(args: argparse.Namespace) -> int:
    if args.name and not args.shards:
        raise DataError("--name is for --shards: a whole data set keeps its name")
    with shown_progress(args.quiet) as progress:
        done = transfer(
            args.url,
            args.out,
            shards=args.shards,
            name=args.name,
            jobs=args.jobs,
            overwrite=args.overwrite,
            staging=args.staging,
            dry_run=args.dry_run,
            progress=progress,
        )
    told = _made(args.out, done.manifest)
    told |= {"files_copied": done.files, "bytes_copied": done.bytes, "files_there": done.there}
    what = "would be copied" if args.dry_run else "copied"
    line = (
        f"{_line(told)}; {what}: {done.files:,} files of {done.bytes / 1e6:,.1f} MB, "
        f"{done.there:,} were there"
    )
    return _tell(args, told, [line])


# --- index, migrate -----------------------------------------------------------------------------


def add_index(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.description = (
        "Write a manifest for WebDataset tars of others, which stay as they are. A sample needs "
        'json (image, width, height, and sentences of {"text", "source"}), boxes.f32 or boxes.npy '
        "(n x 4, f32, fractions), features.f16 or features.npy (n x width, f16), and labels.bin "
        "where others have it. Other tars are read by `lxscale shards build`."
    )
    add("url", type=out_place, help="the folder or s3:// prefix that has the tars")
    _add_rest(parser)
    add("--name", type=given_name, help="of the data set (default: the last part of the URL)")
    add("--extractor", type=given_name, default="unknown", help="what made the features")
    words = parser.add_argument_group("words").add_argument
    words("--answers", type=given_path, metavar="JSON",
          help="answer table, or a data set that has it (default: from the data)")  # fmt: skip
    words("--min-answer-count", type=whole(1), default=1,
          help="sentences that an answer needs for it")  # fmt: skip
    words("--vocab", type=given_path, metavar="TXT",
          help="vocab.txt, or a data set that has it (default: train one)")  # fmt: skip
    words("--vocab-size", type=whole(1), default=30522, help="most tokens of a trained one")
    words("--max-tokens", type=whole(3, 1 << 16), default=20,
          help="with [CLS] and [SEP] (default: %(default)s)")  # fmt: skip
    add("--object-classes", type=whole(1), default=1600, help="range of labels.bin's objects")
    add("--attribute-classes", type=whole(1), default=400, help="and of their attributes")
    parser.set_defaults(func=_index)


def _index(args: argparse.Namespace) -> int:
    report = Report()
    how = Indexing(
        name=args.name or _name(args.url),
        extractor=args.extractor,
        vocab=args.vocab,
        vocab_size=args.vocab_size,
        answers=args.answers,
        min_answer_count=args.min_answer_count,
        max_tokens=args.max_tokens,
        num_object_classes=args.object_classes,
        num_attribute_classes=args.attribute_classes,
    )
    with shown_progress(args.quiet) as progress:
        made = index(
            args.url,
            how,
            overwrite=args.overwrite,
            staging=args.staging,
            report=report,
            progress=progress,
        )
    told = _made(args.url, made)
    return _tell(args, told | _say_left_out(args, report), [_line(told)])


def add_migrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", type=given_place)
    _add_out(parser)
    parser.set_defaults(func=_migrate)


def _migrate(args: argparse.Namespace) -> int:
    with shown_progress(args.quiet) as progress:
        made = migrate(
            args.url, args.out, overwrite=args.overwrite, staging=args.staging, progress=progress
        )
    if made is None:
        told = {"out": None, "url": args.url}
        line = f"{args.url} is of the present format and layout: nothing is to be done"
        return _tell(args, told, [line])
    told = _made(args.out, made)
    return _tell(args, told, [_line(told)])

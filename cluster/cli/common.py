"""What several commands share: arguments of one meaning, and the last line of a check."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from shards.arguments import given_name, given_path, given_place
from shards.convert.inputs import SentenceInput
from shards.sources.sentences import FORMATS
from shards.urls import shown

CHECKPOINT = "a run's folder or URL, or a checkpoint's manifest"


def add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache", type=given_path, help="folder of the node cache")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Arguments of commands that run workers."""
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--ray-address", help="join this Ray cluster (default: a local one)")
    add_take_over(parser)


def add_take_over(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--take-over", action="store_true", help="take the run from a job that is alive"
    )


def add_sentences(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Files of sentences, for `sentence_inputs`."""
    add = parser.add_argument
    default = "" if required else " (default: those in the features)"
    add("--sentences", nargs="+", default=[], required=required, metavar="[FORMAT:]FILE",
        help=f"files of sentences; see `lxscale shards formats`{default}")  # fmt: skip
    add("--source", type=given_name, help="set of the sentences that name none")


def sentence_inputs(args: argparse.Namespace) -> tuple[SentenceInput, ...]:
    """What --sentences names. Files of one format may belong together, as questions and their
    annotations do."""
    groups: dict[str | None, list[Path]] = {}
    for text in args.sentences:
        form, colon, path = text.partition(":")
        named = colon and not Path(text).exists() and (form in FORMATS or "." in form)
        groups.setdefault(form if named else None, []).append(given_path(path if named else text))
    return tuple(SentenceInput(tuple(f), form, args.source) for form, f in groups.items())


RUN = "a run's URL or folder"


def add_job_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ray-address",
        metavar="URL",
        help="of the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, or "
        "http://127.0.0.1:8265)",
    )


def add_submission(parser: argparse.ArgumentParser) -> None:
    """How jobs are submitted."""
    add_job_server(parser)
    parser.add_argument(
        "--python", default="python", type=given_name, help="the one of the head, with lxscale"
    )
    parser.add_argument(
        "--with-credentials",
        action="store_true",
        help="AWS credentials go along, where all who may ask the job server see them (default: "
        "the nodes have their own)",
    )


def out_place(text: str) -> str:
    """The type of --out: a folder or an s3:// prefix, without slashes at its end."""
    if text.startswith("s3:") and not re.match(r"s3://[^/]", text):
        raise argparse.ArgumentTypeError(f"{text!r} names no bucket: give s3://bucket/prefix")
    text = given_place(text)
    scheme = re.match(r"(\w[\w+.-]*)://", text)
    if (scheme and scheme[1] not in ("s3", "file")) or re.match(r"file://[^/]", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no folder, no s3:// and no file:/// URL")
    name = text.removeprefix("file://").strip()
    if not name.strip("/"):
        what = "is the root of all files" if name else "is empty"
        raise argparse.ArgumentTypeError(f"{text!r} {what}: name a folder, or s3://bucket/prefix")
    return text.rstrip("/")


_MOST = 10**7  # shards of a range, which are listed one by one


def ranges(text: str) -> list[int]:
    """The type of --shards: numbers and ranges of them, as 10-20,25."""
    out: list[int] = []
    for part in text.split(","):
        if not (match := re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip())):
            raise argparse.ArgumentTypeError(f"{text!r:.80} is no list as 10-20,25")
        first, last = int(match[1]), int(match[2] or match[1])
        if last - first >= _MOST:
            raise argparse.ArgumentTypeError(f"{part.strip()!r} is more shards than there are")
        if last < first:
            raise argparse.ArgumentTypeError(f"{part.strip()!r} ends before it begins")
        out += range(first, last + 1)
    return out


def verdict(url: str, problems: list[str], good: str) -> int:
    """Print how many problems there are, or `good`; the exit status."""
    print(f"{shown(url)}: {f'{len(problems)} problems' if problems else good}")
    return 1 if problems else 0

"""Users' files → a data set.

The plan says which part has which images; parts are made anywhere, in any order, each at its final
place (part.py); then vocabulary, answer table and manifest follow, and the manifest commits it all.
The shards lie in a folder that is named after all that their bytes follow from, and after what was
at the place before. So the same command, given again, finds what an earlier attempt has finished,
on another machine, too; and whichever finishes first commits, as the files are the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from shards.convert.append import Existing, check_alike, existing, keys
from shards.convert.inputs import Inputs
from shards.convert.part import Part, PartSettings, Receipt, read_records, receipt_url
from shards.convert.plan import Plan, take_census
from shards.convert.planning import make_plan
from shards.convert.pool import RunParts, Workers, in_processes
from shards.convert.words import Words, make_words
from shards.errors import DataError
from shards.format.build import ANSWERS, VOCAB, BuildSettings, check_settings, vote, write_words
from shards.format.features import Rounding
from shards.format.manifest import Counts, Manifest, Schema, with_pages
from shards.format.publish import commit, commit_point
from shards.format.record import ImageRecord, Report
from shards.format.shard_list import ShardInfo, ShardList
from shards.format.staging import bring, staging_folder
from shards.progress import Progress, no_progress
from shards.sources.regions import Options
from shards.store import objects

log = logging.getLogger("lxscale")

VERSION = 1  # raise it with anything that gives the same inputs other bytes
_VOTERS = 100  # records whose layouts are compared first, where bad ones are left out
_TIMED = 16  # records that a dry run converts
_MOST_OBJECTS = 1 << 16

Append = Literal["new", "missing"]


@dataclass(frozen=True)
class Forecast:
    """What a build would make."""

    images: int
    pairs: int
    pairs_per_source: dict[str, int]
    shards: int
    bytes: int
    """About."""
    seconds: float
    """About, with one process."""


def convert(
    inputs: Inputs,
    out_url: str | Path,
    settings: BuildSettings,
    *,
    options: Options | None = None,
    append: Append | None = None,
    workers: Workers | None = None,
    staging: str | Path | None = None,
    report: Report | None = None,
    progress: Progress = no_progress,
) -> Manifest:
    """Write a data set of users' files to `out_url` (a folder or s3:// prefix); its manifest.

    append: add the records to the data set there, as shards of their own, with its vocabulary,
    answers, sets and type of features: `new`: DataError for an image that it has; `missing`: those
    are passed over.
    workers: who makes the shards (default: in a process a core). staging: room for the plan and
    the shards under way (default: the output folder, or the system's temporary folder). report:
    collects what was left out. The same inputs and settings give the same bytes, however many
    processes made them and however often they were killed.
    Raises DataError naming file, record or place. Shards that are whole by then stay, for the same
    command to go on with; `lxscale shards clean` removes them.
    """
    out, report = str(out_url), report or Report()
    check_settings(settings)
    base = existing(out) if append else None
    if base:
        check_alike(base, settings)
        settings = replace(settings, feature_type=base.manifest.schema.feature_type)
    before = base.tag if base else commit_point(out, settings.overwrite)
    with (workers or in_processes())() as run, staging_folder(out, staging) as folder:
        with make_plan(
            inputs,
            replace(options or Options(), room=folder),
            folder,
            shard_bytes=settings.shard_bytes,
            feature_type=settings.feature_type,
            images_per_shard=settings.images_per_shard,
            skip_bad=settings.skip_bad,
            report=report,
            progress=progress,
            present=keys(base, folder, progress) if base else (),
            pass_over=append == "missing",
        ) as plan:
            if base and not plan.parts:
                return base.manifest  # it has all of these images
            words = make_words(plan, settings, base, report, progress)
            schema = _schema(plan, settings, base, len(words.tokens))
            parts = _part_settings(out, plan, settings, schema, words, before, base, folder)
            receipts = list(_made(plan, parts, run, progress))
        errors = Rounding()
        for receipt in receipts:
            receipt.add_to(report)
            errors.add(receipt.errors)
        if errors.values:
            report.notes.append(errors.line())
        return _commit(out, folder, parts, receipts, words, settings, before, base, progress)


def records(
    inputs: Inputs,
    *,
    options: Options | None = None,
    skip_bad: bool = False,
    report: Report | None = None,
    progress: Progress = no_progress,
) -> Iterator[ImageRecord]:
    """The image records of users' files, in order, read in this process: for other loops, and as
    `convert` takes them. Raises DataError as that."""
    report = report or Report()
    with (
        tempfile.TemporaryDirectory() as folder,
        make_plan(
            inputs,
            options or Options(),
            Path(folder),
            shard_bytes=1,
            feature_type="fp16",
            images_per_shard=None,
            skip_bad=skip_bad,
            report=report,
            progress=progress,
        ) as plan,
    ):
        yield from read_records(dict(enumerate(plan.files)), plan.first(), None, skip_bad, report)


def forecast(
    inputs: Inputs,
    settings: BuildSettings,
    *,
    options: Options,
    staging: str | Path | None = None,
    report: Report,
    progress: Progress = no_progress,
) -> Forecast:
    """What `convert` would make of the inputs: they are listed whole, and a few records are
    converted. Nothing but the plan is written, to a temporary folder."""
    with (
        tempfile.TemporaryDirectory(dir=staging) as folder,
        make_plan(
            inputs,
            replace(options, room=Path(folder)),
            Path(folder),
            shard_bytes=settings.shard_bytes,
            feature_type=settings.feature_type,
            images_per_shard=settings.images_per_shard,
            skip_bad=settings.skip_bad,
            report=report,
            progress=progress,
        ) as plan,
    ):
        every = take_census(plan).sentences
        few = list(islice(plan.first(), _TIMED))
        began = time.perf_counter()
        for record in read_records(
            dict(enumerate(plan.files)), few, None, settings.skip_bad, Report()
        ):
            hashlib.sha256(record.features.astype(np.float16).tobytes()).digest()
        seconds = (time.perf_counter() - began) / max(len(few), 1)
        return Forecast(
            images=plan.images,
            pairs=sum(every.values()),
            pairs_per_source=dict(sorted(every.items())),
            shards=plan.parts,
            bytes=plan.bytes() + plan.parts * tarfile.RECORDSIZE,
            seconds=seconds * plan.images,
        )


# --- before and after the parts ------------------------------------------------------------------


def _schema(plan: Plan, settings: BuildSettings, base: Existing | None, vocab_size: int) -> Schema:
    """That of the data set that is added to; else of the first record, or, where bad ones are left
    out, of most of the first good ones."""
    if base:
        return replace(base.manifest.schema, max_objects=_MOST_OBJECTS)
    first: list[ImageRecord] = []
    report = Report()
    batch = list(islice(plan.first(), 10 * _VOTERS if settings.skip_bad else 1))
    files, kind = dict(enumerate(plan.files)), settings.feature_type
    for record in read_records(files, batch, None, settings.skip_bad, report, kind):
        first.append(record)
        if len(first) == (_VOTERS if settings.skip_bad else 1):
            break
    if not first:
        raise DataError(f"no record is good: {'; '.join(report.lines())[:500]}")
    return replace(vote(first, settings), vocab_size=vocab_size)


def _part_settings(
    out: str,
    plan: Plan,
    settings: BuildSettings,
    schema: Schema,
    words: Words,
    before: str | None,
    base: Existing | None,
    folder: Path,
) -> PartSettings:
    decides = [
        VERSION,
        plan.digest,
        dataclasses.asdict(schema),
        words.tokens,
        words.answers,
        words.sources,
        before,
    ]
    digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    # Never eight digits, as of a date.
    build = f"build-{'abcdef'[int(digest[0], 16) % 6]}{digest[1:8]}"
    return PartSettings(
        place=base.place if base else objects.join(out, build),
        stem=f"shard-{digest[:8]}-" if base else "shard-",
        digest=digest,
        schema=schema,
        tokens=words.tokens,
        sources=words.sources,
        answers=words.answers,
        skip_bad=settings.skip_bad,
        room=folder,
    )


def _made(plan: Plan, parts: PartSettings, run: RunParts, progress: Progress) -> Iterator[Receipt]:
    sizes, done, whole, total = plan.part_sizes(), 0, 0, plan.images
    try:
        for receipt in run(parts, plan_parts(plan)):
            done, whole = done + sizes[receipt.part], whole + 1
            progress("images written", done, total)
            yield receipt
    except BaseException:
        if whole:
            log.warning(
                "%d of %d shards are whole, in %s: the same command goes on with them, and "
                "`lxscale shards clean` removes them",
                whole,
                plan.parts,
                parts.place,
            )
        raise


def plan_parts(plan: Plan) -> Iterator[Part]:
    """The parts of a plan, in order."""
    for number in range(plan.parts):
        images = plan.part(number)
        used = sorted({file for image in images for file in image.files})
        yield Part(number, images, {file: plan.files[file] for file in used})


def _commit(
    out: str,
    folder: Path,
    parts: PartSettings,
    receipts: list[Receipt],
    words: Words,
    settings: BuildSettings,
    before: str | None,
    base: Existing | None,
    progress: Progress,
) -> Manifest:
    """Vocabulary, answers and manifest; then the receipts are of no more use."""
    made = [r.shard for r in receipts if r.shard]
    if not made:
        raise DataError(
            "every record was left out: see what is said of them, and correct the files"
        )
    most = max(r.max_objects for r in receipts)
    if base:
        files, infos = [], [*base.manifest.shards, *made]
        manifest = replace(
            base.manifest,
            schema=replace(parts.schema, max_objects=max(most, base.manifest.schema.max_objects)),
            counts=_counts(infos, words),
            shards=ShardList.of(infos, words.sources),
            pages=(),
        )
    else:
        files, infos = [VOCAB, ANSWERS], made
        vocab, answers = write_words(folder, words.tokens, words.answers)
        manifest = Manifest(
            name=settings.name,
            extractor=settings.extractor,
            schema=replace(parts.schema, max_objects=most),
            sources=tuple(words.sources),
            question_sources=tuple(s for s in words.sources if s in words.question_sources),
            vocab=vocab,
            answers=answers,
            counts=_counts(infos, words),
            shards=ShardList.of(infos, words.sources),
            folder=parts.place.rpartition("/")[2],
        )
    manifest = with_pages(manifest, folder, f"shards-{parts.digest[:8]}-" if base else "shards-")
    for name in (*files, *(page.file for page in manifest.pages)):
        bring(folder / name, objects.join(parts.place, name))
    try:
        commit(out, manifest, before)
    finally:  # where another one has won, too: it is of no use for anybody then
        for number, receipt in enumerate(receipts, 1):
            objects.delete(receipt_url(parts, receipt.part))
            progress("receipts removed", number, len(receipts))
    return manifest


def _counts(infos: Sequence[ShardInfo], words: Words) -> Counts:
    totals: Counter[str] = Counter()
    for info in infos:
        totals.update(info.pairs_per_source)
    return Counts(
        sum(i.images for i in infos),
        sum(i.pairs for i in infos),
        {source: totals[source] for source in words.sources},
    )

"""Making the plan of a build: every image and sentence of the inputs, listed, joined and checked.

A row an image and a row for each group of sentences, in a file about as large as the sentences
themselves. What a build could only find after hours of conversion (an image that is there twice,
sentences without features) is found here, before any array is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards.convert import couples
from shards.convert.inputs import FeatureInput, Inputs, SentenceInput
from shards.convert.plan import FeatureFile, Plan
from shards.errors import DataError
from shards.format.features import NUMPY, FeatureType, stored_width
from shards.format.record import Report, Sentence, record_key
from shards.progress import Progress
from shards.sources.features import feature_format
from shards.sources.image_ids import image_id
from shards.sources.regions import Entry, FeatureFormat, Options
from shards.sources.sentences import SentenceFormat, sentence_format
from shards.sources.vg_images import NO_VG_IMAGES, VgImages, load_vg_images
from shards.store import objects

_TABLES = """
create table text (image text not null, split text, body text not null);
create table image (
    number integer primary key, name text not null, id text not null, file integer not null,
    position text not null, place text not null, version text not null, objects integer not null,
    split text, of_vg integer not null, second text,
    bytes integer not null default 0, part integer
);
"""
_INDEXES = """
create index text_of on text (image);
create index image_of on image (id);
"""
_OBJECTS = 36  # of an image whose file does not say how many: the size of its record is estimated
_SHOWN = 5


@contextmanager
def make_plan(
    inputs: Inputs,
    options: Options,
    folder: Path,
    *,
    shard_bytes: int,
    feature_type: FeatureType,
    images_per_shard: int | None,
    skip_bad: bool,
    report: Report,
    progress: Progress,
    present: Iterable[str] = (),
    pass_over: bool = False,
) -> Iterator[Plan]:
    """The plan of a build, in a file in `folder` that is gone after the block.

    present: keys of images that the data set has already; they are passed over, or an error.
    DataError for what cannot be read, images that are there twice, sentences without features;
    with skip_bad these are left out and reported.
    """
    path = folder / "plan.sqlite"
    path.unlink(missing_ok=True)
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.executescript("pragma journal_mode = off; pragma synchronous = off;")
        database.executescript(_TABLES + couples.TABLE)
        plan = Plan(database)
        try:
            database.execute("begin")
            vg = load_vg_images(inputs.vg_images) if inputs.vg_images else NO_VG_IMAGES
            making = _Making(plan, database, inputs, options, vg, skip_bad, report, progress)
            making.read_sentences()
            making.list_images()
            database.executescript(_INDEXES)
            making.leave_out()
            making.pass_over(present, pass_over)
            if not pass_over:
                making.check_any()
            making.cut(shard_bytes, feature_type, images_per_shard)
            yield plan
        except sqlite3.Error as error:
            raise DataError(
                f"cannot write the plan of the build in {folder}: {error}; give a folder with room "
                "with --staging"
            ) from None
        finally:
            path.unlink(missing_ok=True)


@dataclass
class _Making:
    """A plan under way."""

    plan: Plan
    database: sqlite3.Connection
    inputs: Inputs
    options: Options
    vg: VgImages
    skip_bad: bool
    report: Report
    progress: Progress

    def read_sentences(self) -> None:
        count = 0
        for given in self.inputs.sentences:
            for form, files in sentence_formats(given):
                for text in form.read(files, given.source or form.source, self.report):
                    image = self.vg.resolve(text.image)
                    self._add_text(image, text.split or given.split, text.sentences)
                    if text.pictures:
                        couples.add(self.database, image, *map(self.vg.resolve, text.pictures))
                    count += len(text.sentences)
                    if count % 1000 < len(text.sentences):
                        self.progress("sentences read", count, None)
        if count:
            self.progress("sentences read", count, count)

    def _add_text(self, image: str, split: str | None, sentences: Sequence[Sentence]) -> None:
        try:
            self.database.execute(
                "insert into text values (?, ?, ?)", (image, split, _packed(sentences))
            )
        except UnicodeEncodeError:
            raise DataError(
                f"image {image!a:.120} has text that is not valid Unicode: correct its source"
            ) from None

    def list_images(self) -> None:
        count = 0
        for given in self.inputs.features:
            form = feature_format(given.place, given.format)
            _check_settings(form, given)
            options = Options(
                self.options.feature_dim,
                self.options.object_classes,
                self.options.attribute_classes,
                self.options.room,
                given.settings,
            )
            for url in form.files(given.place):
                file = len(self.plan.files)
                self.plan.files.append(FeatureFile(url, form, options))
                for entry in form.entries(url, options):
                    count += self._add_image(file, url, entry, given)
                    if count % 1000 == 0:
                        self.progress("images listed", count, None)
        self.progress("images listed", count, count)

    def _add_image(self, file: int, url: str, entry: Entry, given: FeatureInput) -> int:
        if entry.problem:
            where = f"{url}, {entry.where}" if entry.where else url
            problem = f"{where}: {entry.problem}"
            if not self.skip_bad:
                raise DataError(problem)
            self.report.add("bad records", problem)
            return 0
        if entry.empty_sentences:
            self.report.add("empty sentences", f"{url}, {entry.where}", entry.empty_sentences)
        named = image_id(entry.image, given.numbers)
        image = self.vg.resolve(named)
        split = entry.split or given.split
        self.database.execute(
            "insert into image (name, id, file, position, place, version, objects, split, of_vg) "
            "values (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                entry.image,
                image,
                file,
                entry.position,
                entry.where,
                entry.version,
                entry.objects,
                split,
                image != named,
            ),
        )
        if entry.sentences:
            self._add_text(image, split, entry.sentences)
        return 1

    # --- what is left out -----------------------------------------------------------------------

    def leave_out(self) -> None:
        """Images that are excluded or have no sentences, and what is wrong as a whole."""
        for why, ids in self.inputs.exclude.items():
            self._exclude(why, {self.vg.resolve(image) for image in ids})
        two = couples.are_there(self.database)
        if self.inputs.only is not None and not two:
            self._only(self.inputs.only)
        self._twice()
        if two:
            single = couples.join(self.database, self.skip_bad)
            self._drop("images without sentences", f"{single} and {couples.ALONE}")
            self.database.execute(f"delete from image where {single}")
        if self.inputs.only is not None and two:
            self._only(self.inputs.only)
        self._without_features()
        self._drop("images without sentences", "id not in (select image from text)")

    def _only(self, only: frozenset[str]) -> None:
        self.database.execute("create temp table only_ (id text primary key)")
        self.database.executemany(
            "insert or ignore into only_ values (?)",
            ((self.vg.resolve(i),) for i in only),
        )
        self._drop("images that are not asked for", "id not in (select id from only_)")
        self.database.execute("delete from text where image not in (select id from only_)")

    def pass_over(self, present: Iterable[str], allowed: bool) -> None:
        """Leave images out whose keys are present, or refuse them."""
        self.database.execute("create temp table present (key text primary key)")
        self.database.executemany(
            "insert or ignore into present values (?)", ((key,) for key in present)
        )
        self.database.create_function("record_key", 1, record_key, deterministic=True)
        there = "record_key(name) in (select key from present)"
        if not allowed and (name := self.plan.one(f"select name from image where {there}")):
            raise DataError(
                f"the data set has image {name!r:.120} already: give new images alone, or pass "
                "over those that it has with --retry-failed"
            )
        self._drop("images that the data set has already", there)

    def check_any(self) -> None:
        if not self.plan.one("select count(*) from image"):
            raise DataError(
                "there is no image to build from: none of the features has a sentence, or all are "
                "left out; check that both are of the same images (bare numbers as names need "
                "--numbers coco or vg)"
            )

    def _exclude(self, why: str, ids: set[str]) -> None:
        for image in ids:
            found = self.database.execute("delete from image where id = ?", (image,)).rowcount
            texts = self.database.execute("delete from text where image = ?", (image,)).rowcount
            couples.remove(self.database, image)
            if found or texts:
                self.report.add(f"images left out: {why}", image)

    def _drop(self, reason: str, where: str) -> None:
        found = self.plan.one(f"select count(*) from image where {where}")
        if found:
            rows = self.database.execute(f"select name from image where {where} limit {_SHOWN}")
            names = [name for (name,) in rows]
            self.report.add(reason, ", ".join(names), found)
            self.database.execute(f"delete from image where {where}")

    def _twice(self) -> None:
        rows = self.database.execute(
            "select a.number, a.name, a.file, a.place, b.file, b.place, b.name, "
            "a.of_vg or b.of_vg from image a "
            "join (select id, min(number) first from image group by id having count(*) > 1) d "
            "on a.id = d.id and a.number > d.first join image b on b.number = d.first "
            "order by a.number"
        ).fetchall()
        for number, name, file, place, other, first, named, of_vg in rows:
            problem = (
                f"{self.plan.files[file].url}, {place}: image {name!r:.120} is there already "
                f"({self.plan.files[other].url}, {first}"
                f"{'' if name == named else f', as {named!r:.120}'})"
            )
            if of_vg:  # as the features of both collections have it
                self.report.add("images of Visual Genome and of COCO", problem)
            elif not self.skip_bad:
                raise DataError(
                    f"{problem}: give each image once, or leave further ones out with --skip-bad"
                )
            else:
                self.report.add("images that are there twice", problem)
            self.database.execute("delete from image where number = ?", (number,))

    def _without_features(self) -> None:
        missing = "image not in (select id from image)"
        count = self.plan.one(f"select count(distinct image) from text where {missing}")
        if not count:
            return
        rows = self.database.execute(
            f"select image from text where {missing} group by image order by min(rowid) limit 5"
        )
        names = ", ".join(name for (name,) in rows)
        if not self.skip_bad:
            raise DataError(
                f"{count:,} images have sentences, but no features (first: {names}): name all "
                "feature files, or leave such sentences out with --skip-bad"
            )
        self.report.add("images with sentences but without features", names, count)
        self.database.execute(f"delete from text where {missing}")

    # --- parts ----------------------------------------------------------------------------------

    def cut(
        self, shard_bytes: int, feature_type: FeatureType, images_per_shard: int | None
    ) -> None:
        """Deal the images to parts, a shard each; a part is full as soon as its records are about
        as large as a shard is to be."""
        digest = hashlib.sha256()
        for file in self.plan.files:
            digest.update(_identity(file).encode())
        row_bytes = np.dtype(NUMPY[feature_type]).itemsize
        row_bytes *= stored_width(feature_type, self.options.feature_dim)
        part = size = images = 0
        rows = self.database.execute(
            "select number, name, file, position, version, objects, split, second, "
            "(select group_concat(body || coalesce(split, ''), char(10)) from "
            "(select body, split from text where image = id order by rowid)) "
            "from image order by number"
        )
        updates = []
        for number, *row, second, body in rows:
            row += [second] if second else []
            digest.update(json.dumps([*row, body], separators=(",", ":")).encode())
            estimate = _estimate(row[4], row_bytes, len(body.encode()))
            updates.append((part, estimate, number))
            size, images = size + estimate, images + 1
            if size >= shard_bytes or images == images_per_shard:
                part, size, images = part + 1, 0, 0
            if len(updates) == 10_000:
                self._place(updates)
        self._place(updates)
        self.plan.parts = part + (images > 0)
        self.database.execute("create index image_part on image (part)")
        self.plan.digest = digest.hexdigest()

    def _place(self, updates: list[tuple[int, int, int]]) -> None:
        self.database.executemany("update image set part = ?, bytes = ? where number = ?", updates)
        updates.clear()


def _estimate(count: int, row_bytes: int, text: int) -> int:
    """Bytes of a record in its tar: four members of a header and half a block of padding."""
    boxes_and_labels = 4 * 4 + 4 * 4
    return (count or _OBJECTS) * (row_bytes + boxes_and_labels) + text + 4 * (512 + 256)


def sentence_formats(
    given: SentenceInput,
) -> Iterator[tuple[SentenceFormat, list[Path]]]:
    """The files of an input by format, in the order in which formats come first."""
    groups: dict[str, list[Path]] = {}
    if len({path.resolve() for path in given.files}) < len(given.files):
        names = ", ".join(map(str, given.files))
        raise DataError(f"a file is named twice, and its sentences would be, too: {names:.500}")
    for path in given.files:
        form = sentence_format(path, given.format)
        groups.setdefault(given.format or form.name, []).append(path)
    for name, files in groups.items():
        yield sentence_format(files[0], name), files


def _check_settings(form: FeatureFormat, given: FeatureInput) -> None:
    if unknown := sorted(set(given.settings) - set(form.settings)):
        known = ", ".join(form.settings) or "no options"
        raise DataError(
            f"--feature-option {unknown[0]:.40}: the format {form.name} of {given.place} has "
            f"{known}"
        )


def _identity(file: FeatureFile) -> str:
    """What says that a file is the one of before: its name, size and time."""
    path = objects.local_path(file.url)
    options = [file.format.name, file.options.feature_dim, sorted(file.options.settings.items())]
    if path is None:
        found = objects.look_up(file.url)
        return json.dumps([file.url, found.size, found.modified, *options])
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return json.dumps([str(path.resolve()), stat.st_size, stat.st_mtime_ns, *options])


def _packed(sentences: Sequence[Sentence]) -> str:
    rows = [[s.text, s.source, s.answers and dict(s.answers), s.id, s.kind] for s in sentences]
    return json.dumps(rows, ensure_ascii=False, separators=(",", ":"))

"""A recipe: one YAML of which files data sets are made of, and which images stay out.

    features:                                     which files hold features
      - {place: train2014_obj36.tsv, split: train}
      - {place: val2014_obj36.tsv, split: val}
      - {place: vg_gqa_obj36.tsv, numbers: vg}
    sentences:                                    which hold sentences; what belongs together in one
      - {files: [captions_train2014.json, captions_val2014.json]}
      - {files: [questions.json, annotations.json], format: vqa}
    vg_images: image_data.json                    which images of Visual Genome are COCO's
    lists:                                        images by what they are for
      minival: {features: val2014_obj36.tsv, first: 5000}
      vqa-test: {sentences: [test2015_questions.json]}
      mine: {ids: [ids.txt]}
    data_sets:                                    what is built, below --out
      train: {exclude: [minival, vqa-test]}
      minival: {only: minival}
    answers: all_ans.json                         as --answers, --vocab of a build
    vocab: vocab.txt

Paths are relative to the recipe. `first: N` takes the first N images of a place of features; `ids`
are texts with an id a line. The first data set of a recipe makes the vocabulary and the answer
table where none is named; the others take its own.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from shards.convert.inputs import FeatureInput, Inputs, SentenceInput
from shards.errors import DataError
from shards.format.record import Report
from shards.sources.features import feature_format
from shards.sources.image_ids import Collection, image_id
from shards.sources.regions import Options
from shards.sources.sentences import sentence_format


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Features(_Strict):
    place: str
    format: str | None = None
    numbers: Collection | None = None
    split: str | None = None
    options: dict[str, str] = {}


class _Sentences(_Strict):
    files: list[str]
    format: str | None = None
    source: str | None = None
    split: str | None = None


class _List(_Strict):
    features: str | None = None
    first: int | None = None
    numbers: Collection | None = None
    sentences: list[str] = []
    format: str | None = None
    ids: list[str] = []


class _DataSet(_Strict):
    exclude: list[str] = []
    only: str | None = None


class Recipe(_Strict):
    """A parsed recipe; paths as it has them."""

    features: list[_Features]
    sentences: list[_Sentences] = []
    vg_images: str | None = None
    lists: dict[str, _List] = {}
    data_sets: dict[str, _DataSet]
    answers: str | None = None
    vocab: str | None = None
    folder: Path
    """Of the recipe."""

    def path(self, given: str) -> Path:
        return self.folder / Path(given).expanduser()


def load_recipe(path: Path) -> Recipe:
    """DataError naming the file and the key that is wrong, or the list that is not there."""
    try:
        document: Any = yaml.safe_load(path.read_text())
        if not isinstance(document, dict):
            raise DataError(f"{path} is no recipe: see the head of shards/convert/recipe.py")
        recipe = Recipe(**document, folder=path.parent)
    except OSError as error:
        raise DataError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no YAML: {error}") from None
    except (ValidationError, TypeError) as error:
        problem = str(error)
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise DataError(f"{path}: {problem}") from None
    for name, data_set in recipe.data_sets.items():
        if not name or name.startswith(".") or "/" in name:
            raise DataError(f"{path}: the data set {name!r:.80} is no name of a folder")
        for used in (*data_set.exclude, *([data_set.only] if data_set.only else [])):
            if used not in recipe.lists:
                raise DataError(f"{path}: data_sets.{name} names the list {used!r:.80}, not there")
    return recipe


def inputs_of(recipe: Recipe, name: str) -> Inputs:
    """The inputs of one of a recipe's data sets."""
    wanted = recipe.data_sets[name]
    lists = {used: _ids(recipe, recipe.lists[used], used) for used in wanted.exclude}
    only = None if wanted.only is None else _ids(recipe, recipe.lists[wanted.only], wanted.only)
    return Inputs(
        features=tuple(
            FeatureInput(
                str(recipe.path(f.place)) if "://" not in f.place else f.place,
                f.format,
                f.numbers,
                f.split,
                f.options,
            )
            for f in recipe.features
        ),
        sentences=tuple(
            SentenceInput(tuple(recipe.path(p) for p in s.files), s.format, s.source, s.split)
            for s in recipe.sentences
        ),
        vg_images=recipe.path(recipe.vg_images) if recipe.vg_images else None,
        exclude=lists,
        only=only,
    )


def _ids(recipe: Recipe, given: _List, name: str) -> frozenset[str]:
    """The images of a list. DataError where it names none."""
    found: set[str] = set()
    if given.features:
        place = str(recipe.path(given.features))
        form = feature_format(place, None)
        entries = (e for url in form.files(place) for e in form.entries(url, Options()))
        found.update(image_id(e.image, given.numbers) for e in islice(entries, given.first))
    for file in given.sentences:
        path = recipe.path(file)
        form_of = sentence_format(path, given.format)
        for text in form_of.read([path], form_of.source, Report()):
            found.update((text.image, *(text.pictures or ())))
    for file in given.ids:
        try:
            lines = recipe.path(file).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read the list {recipe.path(file)}: {error}") from None
        found.update(image_id(line.strip(), given.numbers) for line in lines if line.strip())
    if not found:
        raise DataError(f"the list {name!r:.80} of the recipe has no image: name its files")
    return frozenset(found)

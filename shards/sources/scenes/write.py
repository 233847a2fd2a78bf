"""The files of scenes: all splits, in a folder that appears when it is whole.

    scenes.json                     settings, counts, priors; sizes of the files below
    vocab.txt, answers.json         every word and answer that there is, whatever the settings
    objects.txt, attributes.txt     names of labels, a line each
    train/ valid/ test/             pictures with captions and questions
        pictures/train-000012.png
        features.tsv                a row a picture, as train-000012
        scenes.jsonl                what is on it: {"image", "things"}
        captions.jsonl
        questions.jsonl
    pairs-train/ -valid/ -test/     other pictures, with statements over two of them
        pictures/train-3-0-img0.png, features.tsv, scenes.jsonl
        statements.json             NLVR2's lines

A picture and its sentences follow from (seed, split, number) and, as questions are balanced over a
file, from those before. Memory grows with none
of them.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, TextIO

from shards.errors import DataError
from shards.format.tokenizer import SPECIAL
from shards.progress import Progress, no_progress
from shards.sources.scenes.picture import ATTRIBUTES, OBJECTS, png, see, tsv_row
from shards.sources.scenes.prior import Prior, language_prior
from shards.sources.scenes.scene import COLOURS, DIRECTIONS, SHAPES, SIZES, Scene, plural
from shards.sources.scenes.sentences import (
    COUNTS,
    NUMBERS,
    YES_NO,
    Balance,
    Question,
    captions,
    countable,
    draw_asked,
    question_pool,
    some_of,
)
from shards.sources.scenes.statements import FORMS, PAIRS, draw_set, text_of
from shards.store.folders import owned_folder

VERSION = 1  # raise it with anything that gives the same settings other bytes
SPLITS = ("train", "valid", "test")
EXTRACTOR = "scenes"
SETTINGS = "scenes.json"
ANSWERS = (*YES_NO, *COUNTS, *COLOURS, *SHAPES, *SIZES, "true", "false")

_STAGING = ".lxscale-scenes-"
_HELD_OUT = 10  # valid and test are each this part of train
_TELL = 50  # pictures between two words of progress


@dataclass(frozen=True)
class SceneSettings:
    """What the files follow from; sizes are of train, and of valid and test a tenth each."""

    images: int = 10_000
    """Pictures with captions and questions."""
    pairs: int = 2_000
    """Pairs of other pictures with statements, in sets of four; 0: none."""
    questions: int = 5
    """Of a picture, at most: those are left out that would unbalance answers."""
    seed: int = 0


@dataclass(frozen=True)
class Written:
    """What is in the folder."""

    fresh: bool
    """It was not there before."""
    counts: dict[str, dict[str, int]]
    """Folder (train, pairs-train, …) -> images, captions, questions, statements."""
    prior: dict[str, dict[str, Prior]]
    """Folder of held-out sentences -> kind -> what is told by the sentences alone, after those of
    the folder of train."""


def parts(settings: SceneSettings) -> dict[str, int]:
    """Folder -> how many pictures, or pairs of them, it is to have."""
    held_out = dict.fromkeys(SPLITS[1:], max(1, settings.images // _HELD_OUT))
    sizes = {"train": settings.images, **held_out}
    if settings.pairs:
        sets = dict.fromkeys(SPLITS, max(1, settings.pairs // _HELD_OUT))
        sets["train"] = settings.pairs
        sizes |= {f"pairs-{split}": -(-n // PAIRS) * PAIRS for split, n in sets.items()}
    return sizes


def write_scenes(
    out: str | Path, settings: SceneSettings, progress: Progress = no_progress
) -> Written:
    """Write all files into the folder `out`, which is not there or is empty. Where it holds them
    already, nothing is done.

    DataError where it holds anything else, lacks a file of them, or cannot be written; `out` is
    then as it was.
    """
    out = Path(out).resolve()
    if found := _there(out, settings):
        return found
    try:
        with owned_folder(out.parent, _STAGING) as room:
            folder = room / "scenes"
            folder.mkdir()
            written = _write(folder, settings, progress)
            os.rename(folder, out)
    except OSError as error:
        raise DataError(
            f"cannot write {out}: {error.strerror or error}: give a folder with room that you may "
            "write to"
        ) from error
    return written


def _there(out: Path, settings: SceneSettings) -> Written | None:
    """What an earlier run has written; None where there is nothing."""
    try:
        names = os.listdir(out)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"cannot use {out}: {error.strerror}; name another folder") from None
    if not names:
        return None
    another = "name another folder, or remove it"
    if SETTINGS not in names:
        raise DataError(f"{out} is not empty, and holds no scenes: {another}")
    try:
        found = json.loads((out / SETTINGS).read_bytes())
        known = {"version": found["version"], **found["settings"]}
        sizes: dict[str, int] = dict(found["files"])
        prior = {f: {k: Prior(**p) for k, p in of.items()} for f, of in found["prior"].items()}
        written = Written(False, found["counts"], prior)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"cannot read {out / SETTINGS} ({error!r:.80}): {another}") from None
    wanted = {"version": VERSION, **asdict(settings)}
    if known != wanted:
        others = ", ".join(f"{k} is {known.get(k)}" for k, v in wanted.items() if known.get(k) != v)
        raise DataError(f"{out} holds scenes of other settings ({others}): {another}")
    for name, size in sizes.items():
        path = out / name
        if not path.is_file() or path.stat().st_size != size:
            raise DataError(f"{path} is not as it was written: remove {out}, and it is made again")
    return written


def _write(folder: Path, settings: SceneSettings, progress: Progress) -> Written:
    sizes = parts(settings)
    total = sum(n * (2 if name.startswith("pairs-") else 1) for name, n in sizes.items())
    done = 0

    def told() -> None:
        nonlocal done
        done += 1
        if done % _TELL == 0 or done == total:
            progress("pictures", done, total)

    counts: dict[str, dict[str, int]] = {}
    pool = question_pool()
    for name, n in sizes.items():
        with _Part(folder / name, told) as part:
            split = name.removeprefix("pairs-")
            if name == split:
                asked = _write_split(part, split, n, settings, pool)
                # Train comes first, and the others ask nothing else.
                pool = asked if split == "train" else pool
            else:
                _write_pairs(part, split, n, settings.seed)
        counts[name] = dict(part.counts)
    lists = {
        "vocab.txt": "".join(f"{token}\n" for token in vocabulary()),
        "answers.json": json.dumps(list(ANSWERS)) + "\n",
        "objects.txt": "".join(f"{name}\n" for name in OBJECTS),
        "attributes.txt": "".join(f"{name}\n" for name in ATTRIBUTES),
    }
    for file, text in lists.items():
        (folder / file).write_text(text, encoding="utf-8")
    prior: dict[str, dict[str, Prior]] = {}
    for prefix, file in (("", "questions.jsonl"), ("pairs-", "statements.json")):
        for held_out in (f"{prefix}{split}" for split in SPLITS[1:]):
            if held_out in sizes:
                learned = folder / f"{prefix}train" / file
                prior[held_out] = language_prior(learned, folder / held_out / file)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".png")
    document = {
        "version": VERSION,
        "settings": asdict(settings),
        "counts": counts,
        "prior": {f: {k: asdict(p) for k, p in of.items()} for f, of in prior.items()},
        "files": {str(p.relative_to(folder)): p.stat().st_size for p in files},
    }
    (folder / SETTINGS).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return Written(True, counts, prior)


class _Part:
    """The files of a folder, open until the block ends."""

    def __init__(self, folder: Path, told: Callable[[], None]) -> None:
        self.folder, self.told = folder, told
        self.counts: Counter[str] = Counter()
        self._stack = ExitStack()
        (folder / "pictures").mkdir(parents=True)

    def __enter__(self) -> _Part:
        self._features = self.open("features.tsv")
        self._scenes = self.open("scenes.jsonl")
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def open(self, name: str) -> TextIO:
        path = self.folder / name
        return self._stack.enter_context(open(path, "w", encoding="utf-8", newline="\n"))

    def add(self, rng: Random, image: str, scene: Scene) -> None:
        """A picture, with all but its sentences."""
        seen = see(rng, scene)
        (self.folder / "pictures" / f"{image}.png").write_bytes(png(seen.picture))
        self._features.write(tsv_row(image, seen))
        _line(self._scenes, {"image": image, "things": [vars(thing) for thing in scene]})
        self.counts["images"] += 1
        self.told()


def _line(file: TextIO, entry: dict[str, Any]) -> None:
    file.write(json.dumps(entry) + "\n")


def _rng(seed: int, *words: object) -> Random:
    return Random("/".join(map(str, ("scenes", seed, *words))))


def _write_split(
    part: _Part, split: str, images: int, settings: SceneSettings, pool: Sequence[Question]
) -> list[Question]:
    """Write pictures with captions and questions of the pool; the questions that were asked."""
    rng = _rng(settings.seed, "questions")
    balance = Balance(some_of(pool, rng, images * settings.questions))
    asked_path = part.folder / "asked.jsonl"
    told = part.open("captions.jsonl")
    with open(asked_path, "w", encoding="utf-8", newline="\n") as every:
        for number in range(images):
            rng = _rng(settings.seed, split, number)
            scene, asked = draw_asked(rng, balance, settings.questions)
            image = f"{split}-{number:06d}"
            part.add(rng, image, scene)
            for text in captions(rng, scene):
                _line(told, _sentence(split, image, text, "scenes_cap"))
                part.counts["captions"] += 1
            for k, a in enumerate(asked):
                question = balance.pool[a.question]
                entry = _sentence(split, image, question.text, "scenes_qa")
                entry |= {"answers": {a.answer: 1.0}, "id": f"{image}-{k}", "kind": question.kind}
                every.write(f"{a.question} {a.round} {json.dumps(entry)}\n")
    # Which rounds are complete is known now.
    with open(asked_path, encoding="utf-8") as lines:
        kept = part.open("questions.jsonl")
        for line in lines:
            place, round_, entry_text = line.split(" ", 2)
            if balance.stays(int(place), int(round_)):
                kept.write(entry_text)
                part.counts["questions"] += 1
    asked_path.unlink()
    return [q for q, rounds in zip(balance.pool, balance.rounds, strict=True) if rounds]


def _sentence(split: str, image: str, text: str, source: str) -> dict[str, Any]:
    return {"image": image, "sentence": text, "source": source, "split": split}


def _write_pairs(part: _Part, split: str, pairs: int, seed: int) -> None:
    statements = part.open("statements.json")
    for number in range(pairs // PAIRS):
        rng = _rng(seed, "pairs", split, number)
        drawn = draw_set(rng)
        for p, (pair, labels) in enumerate(zip(drawn.pairs, drawn.labels, strict=True)):
            name = f"{split}-{number}-{p}"
            for side, scene in enumerate(pair):
                part.add(rng, f"{name}-img{side}", scene)
            for s, (text, label) in enumerate(zip(drawn.sentences, labels, strict=True)):
                entry = {"identifier": f"{name}-{s}", "sentence": text, "label": str(label)}
                _line(statements, entry)
                part.counts["statements"] += 1


def vocabulary() -> list[str]:
    """The tokens of a vocab.txt: the special ones, then every word and sign of every sentence that
    there can be, by the alphabet."""
    words = {word for text in _all_texts() for word in re.findall(r"\w+|[^\w\s]", text)}
    return [*SPECIAL, *sorted(words)]


def _all_texts() -> Iterator[str]:
    """Sentences with all words between them."""
    yield from (question.text for question in question_pool())
    yield from (text_of(form, what) for form in FORMS for what in countable())
    yield from (*NUMBERS, *SIZES, *COLOURS, *SHAPES, *map(plural, SHAPES), *DIRECTIONS)
    yield "a, an and shapes, of them"  # of captions

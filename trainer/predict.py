"""A checkpoint over a data set, on this machine: its metrics, and files of predictions."""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from shards.dataset import Dataset, open_dataset
from shards.errors import DataError
from shards.progress import Progress, no_progress
from shards.store.atomic import written_whole
from trainer import setup
from trainer.checkpoint.generations import Generation
from trainer.evaluate import (
    Answered,
    Evaluation,
    Forward,
    answer_questions,
    evaluate,
    questions,
    without_gradient,
)
from trainer.kinds import answer_type, kind_of
from trainer.model import load_checkpoint
from trainer.scores.nlvr2 import score_nlvr2
from trainer.tasks import TASKS
from trainer.tasks.base import Task

PARTIAL = ".partial"
"""End of the name of what a file of predictions is collected in."""


@dataclass(frozen=True)
class _Asked:
    """A checkpoint's model, and what it is asked."""

    task: Task
    generation: Generation
    forward: Forward
    evaluation: Evaluation

    @property
    def objective(self) -> str:
        """The one whose predictions are answers."""
        return next(iter(self.task.objectives)) if self.task.fine_tunes else "qa"


def evaluate_checkpoint(
    path: str,
    data_url: str,
    *,
    cache: str | None = None,
    batch_size: int = 256,
    blind: bool = False,
    annotations: Sequence[Path] = (),
    choices: Sequence[Path] = (),
    progress: Progress = no_progress,
) -> dict[str, float]:
    """The metrics of a checkpoint over a data set: of pre-training every objective's; of a task its
    accuracy, overall and by kind of question, type of answer and number of objects; and the
    official ones beside where the task's own files are given (annotations, and GQA's choices).

    Raises ConfigError when the data set is another task's, or has another vocabulary or answer
    table than the model was trained with; DataError for files that are not the data set's.
    """
    asked = _ask(path, data_url, cache, batch_size, blind)
    behaviour, given = Behaviour(), dict[Any, str]()
    count = _counted(asked.evaluation.data, progress)

    def answered(found: list[Answered], pairs: int) -> None:
        behaviour.add(found)
        if annotations:
            given.update((_id(a), a.answer) for a in found)
        if asked.task.images == 2:
            statements.update((str(_id(a)), (a.answer, a.answers)) for a in found)
        count(pairs)

    statements = dict[str, tuple[str, Any]]()
    if annotations and asked.task.judge is None:
        raise DataError("files of annotations go with a fine-tuned run: pre-training has no task's")
    evaluation = replace(asked.evaluation, answered=answered)
    metrics = evaluate(asked.forward, evaluation)
    if asked.task.fine_tunes:
        metrics = {name.replace(f"/{asked.objective}", ""): v for name, v in metrics.items()}
    metrics |= behaviour.metrics()
    labels = {i: max(a, key=a.get) for i, (_, a) in statements.items() if a}
    if labels and len(labels) == len(statements):
        metrics |= score_nlvr2({i: a for i, (a, _) in statements.items()}, labels)
    if annotations and asked.task.judge:
        metrics |= asked.task.judge.score(given, annotations, choices)
    return metrics


def predict(
    path: str,
    data_url: str,
    out: Path,
    *,
    cache: str | None = None,
    batch_size: int = 256,
    progress: Progress = no_progress,
) -> int:
    """Write a checkpoint's answers to all questions of a data set: of a task the file that its
    evaluation takes, in the order of the question ids; of pre-training a JSON list with question,
    image and answer. Returns how many there are.

    What is answered is kept in `out` with the end `.partial`, from which a call that was cut goes
    on. Raises as `evaluate_checkpoint`, DataError for questions without an id or with another's.
    """
    asked = _ask(path, data_url, cache, batch_size, blind=False)
    data = asked.evaluation.data
    meta = {
        "checkpoint": asked.generation.url,
        "data": data.manifest.fingerprint,
        "batch": str(batch_size),
    }
    count = _counted(data, progress)
    with _Journal(out.with_name(out.name + PARTIAL), meta).opened() as journal:
        count(journal.done)

        def answered(found: list[Answered], pairs: int) -> None:
            journal.add([(_key(a, asked.task), a) for a in found], pairs)
            count(pairs)

        done = replace(asked.evaluation, answered=answered, done=journal.done)
        answer_questions(asked.forward, done, asked.objective)
        judge = asked.task.judge
        if judge:
            judge.write(out, ((key, row["answer"]) for key, row in journal.rows()))
        else:
            _write_list(out, (row for _, row in journal.rows()))
        answers = journal.answers
    out.with_name(out.name + PARTIAL).unlink()
    return answers


def _ask(path: str, data_url: str, cache: str | None, batch_size: int, blind: bool) -> _Asked:
    model, config, generation = load_checkpoint(path)
    data = open_dataset(data_url, cache or config.data.cache)
    manifest = generation.manifest
    setup.check_records(config, data)
    setup.check_same_tables(data, manifest.vocab_sha256, manifest.answers_sha256)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    task = TASKS[config.task]
    objectives = frozenset(task.objectives)
    if not task.fine_tunes:
        objectives = frozenset(setup.resolve_objectives(config, data))
    evaluation = Evaluation(
        data,
        setup.batch_settings(config, data, setup.order_version([generation])),
        objectives,
        batch_size,
        blind,
    )
    forward = without_gradient(model, device, config.objectives.losses())
    return _Asked(task, generation, forward, evaluation)


def _counted(data: Dataset, progress: Progress) -> Any:
    """Tells the progress how many questions are answered, of how many."""
    total, done = questions(data).streams[0].pairs, 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress("questions answered", done, total)

    return count


# --- behaviour ----------------------------------------------------------------------------------


class Behaviour:
    """Mean scores by kind of question, by type of answer and by number of objects."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, found: Iterable[Answered]) -> None:
        for a in found:
            kind = kind_of(a.kind, a.question)
            for name in (
                f"kind/{kind}",
                f"answer/{answer_type(a.answers) or 'none'}",
                f"objects/{_binned(a.objects)}",
            ):
                self._sums[name][0] += a.score
                self._sums[name][1] += 1

    def metrics(self, most: int = 30) -> dict[str, float]:
        """Of each of the three the groups with most questions."""
        out: dict[str, float] = {}
        for what in ("kind", "answer", "objects"):
            groups = {n: v for n, v in self._sums.items() if n.partition("/")[0] == what}
            if len(groups) < 2:
                continue  # of one group it is the accuracy of all
            kept = sorted(groups, key=lambda n: -groups[n][1])[:most]
            ordered = [n for n in groups if n in kept]
            ordered.sort(
                key=lambda n: int(n.split("/")[1].split("-")[0]) if what == "objects" else 0
            )
            out |= {f"accuracy/{n}": groups[n][0] / groups[n][1] for n in ordered}
        return out


def _binned(objects: int) -> str:
    """Numbers of objects: each up to 10, then tens."""
    if objects <= 10:
        return str(objects)
    first = (objects - 1) // 10 * 10 + 1
    return f"{first}-{first + 9}"


# --- predictions --------------------------------------------------------------------------------


def _id(found: Answered) -> str | int:
    if found.id is None:
        raise DataError(
            f"the question {found.question!r:.60} of image {found.image!r:.60} has no id: build "
            "the data set from the task's own files"
        )
    return found.id


def _key(found: Answered, task: Task) -> str | int | None:
    return _id(found) if task.judge else None


def _write_list(out: Path, rows: Iterable[dict[str, Any]]) -> None:
    with written_whole(out) as temporary, open(temporary, "w") as f:
        before = "[\n"
        for row in rows:
            f.write(before + json.dumps({k: v for k, v in row.items() if v is not None}))
            before = ",\n"
        f.write("\n]\n" if before == ",\n" else "[]\n")


class _Journal:
    """What is answered, in an SQLite file: memory does not grow with it, and a call that is cut
    loses a batch."""

    def __init__(self, path: Path, meta: dict[str, str]) -> None:
        self._path, self._meta = path, meta
        self.done = 0
        """Pairs that were asked."""

    @contextmanager
    def opened(self) -> Iterator[_Journal]:
        """DataError where the file is another checkpoint's or data set's, or cannot be written."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self._path, isolation_level=None)) as self._database:
                self._begin()
                yield self
        except (sqlite3.Error, OSError) as error:
            raise DataError(
                f"cannot keep predictions in {self._path}: {error}; remove it where it is damaged, "
                "or name another place for them"
            ) from None

    def _begin(self) -> None:
        run = self._database.execute
        run("create table if not exists meta (key text primary key, value text)")
        run("create table if not exists answer (number integer primary key, id unique, row text)")
        before = dict(run("select key, value from meta").fetchall())
        self.done = int(before.pop("done", 0))
        if before and before != self._meta:
            other = next(key for key in self._meta if before.get(key) != self._meta[key])
            raise DataError(
                f"{self._path} has predictions of another {other} ({before.get(other)}, now "
                f"{self._meta[other]}): remove it, or name another file"
            )
        for key, value in self._meta.items():
            run("insert or replace into meta values (?, ?)", (key, value))

    def add(self, found: Sequence[tuple[str | int | None, Answered]], pairs: int) -> None:
        """A batch of so many pairs, whole or not at all."""
        run = self._database.execute
        run("begin")
        for key, a in found:
            try:
                run("insert into answer (id, row) values (?, ?)", (key, json.dumps(_row(a))))
            except sqlite3.IntegrityError:
                run("rollback")
                raise DataError(
                    f"the question id {key!r:.60} comes twice in the data set: build it from files "
                    "of one split"
                ) from None
        self.done += pairs
        run("insert or replace into meta values ('done', ?)", (str(self.done),))
        run("commit")

    @property
    def answers(self) -> int:
        return int(self._database.execute("select count(*) from answer").fetchone()[0])

    def rows(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """In the order of the ids; without ids, as they came."""
        for key, row in self._database.execute("select id, row from answer order by id, number"):
            yield key, json.loads(row)


def _row(found: Answered) -> dict[str, Any]:
    return {
        "question_id": found.id,
        "image": found.image,
        "question": found.question,
        "answer": found.answer,
    }

"""A checkpoint over a data set, on this machine: its metrics, and files of predictions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from shards.dataset import Dataset, open_dataset
from shards.errors import DataError
from shards.progress import Progress, no_progress
from shards.store import objects
from trainer import setup
from trainer.behaviour import Behaviour
from trainer.checkpoint.generations import Generation
from trainer.errors import ConfigError
from trainer.evaluate import (
    Answered,
    Evaluation,
    Forward,
    answer_questions,
    evaluate,
    questions,
    without_gradient,
)
from trainer.model import load_checkpoint
from trainer.partial import Key, Partial, QuestionsError
from trainer.scores.submission import write_list
from trainer.tasks import TASKS
from trainer.tasks.base import Judge, Task


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
    official ones beside where the task's own files are given (annotations, and GQA's choices), over
    those of their questions that the data set has. Memory does not grow with the data, but for the
    answers by id that NLVR2's consistency and official metrics take.

    Raises ConfigError when the data set is another task's, or has another vocabulary or answer
    table than the model was trained with; DataError for files that are not the data set's.
    """
    asked = _ask(path, data_url, cache, batch_size, blind)
    _check_files(asked.task, annotations, choices)
    behaviour, given, labels = Behaviour(), dict[Any, str](), dict[Any, str]()
    count = _counted(asked.evaluation.data, progress)
    judge = asked.task.judge
    together = judge.together if judge else None

    def answered(found: list[Answered], pairs: int) -> None:
        behaviour.add(found)
        for a in found if annotations or together else []:
            key = _id(a)
            if key in given:
                raise QuestionsError(
                    f"the question id {key!r:.60} comes twice in {data_url}: build it from files "
                    "of one split"
                )
            given[key] = a.answer
            if a.answers and together:
                labels[key] = max(a.answers, key=lambda answer: (a.answers or {})[answer])
        count(pairs)

    metrics = evaluate(asked.forward, replace(asked.evaluation, answered=answered))
    if asked.task.fine_tunes:
        metrics = {n.replace(f"/{asked.objective}", "", 1): v for n, v in metrics.items()}
    metrics |= behaviour.metrics()
    if together:
        metrics |= together({i: a for i, a in given.items() if i in labels}, labels)
    if annotations and judge:
        metrics |= judge.score(given, annotations, choices)
    return metrics


def _check_files(task: Task, annotations: Sequence[Path], choices: Sequence[Path]) -> None:
    """ConfigError or DataError where a file is of no use, before anything is computed."""
    if annotations and task.judge is None:
        raise ConfigError("--annotations go with a fine-tuned run: pre-training has no task's")
    if choices and not (annotations and task.judge and task.judge.takes_choices):
        raise ConfigError("--choices are GQA's, and go with its --annotations")
    for path in (*annotations, *choices):
        try:
            open(path, "rb").close()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None


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
    evaluation takes, in the order of the question ids; of pre-training, for the questions with an
    answer in the table, a JSON list with question, image and answer. Returns how many there are.

    What is answered is kept in `out` with the end `.partial`, from which a call that was cut goes
    on. Raises as `evaluate_checkpoint`, DataError for questions without an id or with another's.
    """
    if out.is_dir():
        raise DataError(f"{out} is a folder: name a file for the predictions")
    asked = _ask(path, data_url, cache, batch_size, blind=False)
    data, judge = asked.evaluation.data, asked.task.judge
    meta = {
        # By what it holds: a run that was trained anew gives its checkpoints the same names.
        "checkpoint": hashlib.sha256(objects.read_bytes(asked.generation.url)).hexdigest(),
        "data set": data.manifest.fingerprint,
        "batch size": str(batch_size),
    }
    every = replace(asked.evaluation, every_sentence=judge is not None)
    count = _counted(data, progress, every.every_sentence)
    with Partial(out, meta).opened() as partial:
        count(partial.done)

        def answered(found: list[Answered], pairs: int) -> None:
            # Of a task's data set what has no id is no question: a caption beside them.
            told = [a for a in found if a.id is not None or judge is None]
            partial.add([(_key(a, judge), _row(a)) for a in told], pairs)
            count(pairs)

        task = replace(every, answered=answered, done=partial.done)
        answer_questions(asked.forward, task, asked.objective)
        answers = partial.answers
        if judge and not answers:
            raise QuestionsError(
                f"no sentence of {data_url} has an id: build it from the task's own files"
            )
        if judge:
            judge.write(out, ((key, row["answer"]) for key, row in partial.rows()))
        else:
            write_list(out, (row for _, row in partial.rows()))
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


def _counted(data: Dataset, progress: Progress, every_sentence: bool = False) -> Any:
    """Tells the progress how many questions are answered, of how many."""
    total, done = 0, 0

    def count(more: int) -> None:
        nonlocal done, total
        # A data set without questions has none to count, and objectives that need none.
        total = total or questions(data, every_sentence=every_sentence).streams[0].pairs
        done += more
        progress("questions answered", done, total)

    return count


# --- predictions --------------------------------------------------------------------------------


def _id(found: Answered) -> str | int:
    if found.id is None:
        raise QuestionsError(
            f"the question {found.question!r:.60} of image {found.image!r:.60} has no id: build "
            "the data set from the task's own files"
        )
    return found.id


def _key(found: Answered, judge: Judge | None) -> Key:
    """QuestionsError where the id is of a type that the task's files have not."""
    if judge is None:
        return None
    key = _id(found)
    if not isinstance(key, judge.ids):
        raise QuestionsError(
            f"the question id {key!r:.60} is no text, as the task's ids are: build the data set "
            "from its own files"
        )
    return key


def _row(found: Answered) -> dict[str, Any]:
    row = {
        "question_id": found.id,
        "image": found.image,
        "question": found.question,
        "answer": found.answer,
    }
    return {name: value for name, value in row.items() if value is not None}

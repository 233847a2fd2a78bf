"""The easy-VQA data set (PyPI package `easy-vqa`): 5,000 pictures of 64 × 64 with one shape each,
48,248 questions, 13 answers; MIT licence."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from shards.errors import DataError


@dataclass(frozen=True)
class EasyVqa:
    """Inputs of two builds of a grid of regions, by split (`train`, `test`). The test set is
    to be built with the vocabulary of the training set; both share the answers."""

    images: dict[str, Path]
    """Folders of pictures, which stay where the package has them."""

    sentences: dict[str, Path]
    answers: Path


def write_easy_vqa(folder: str | Path) -> EasyVqa:
    """Write train.json, test.json and answers.json into `folder`, for the format `pictures`.

    The source of all sentences is `easy_vqa`; a question's id is its place in the package's list.
    Raises DataError naming the `demo` extra when the package is absent.
    """
    try:
        import easy_vqa
    except ImportError:
        raise DataError(
            "the easy-VQA data set is not installed: pip install 'lxscale[demo]'"
        ) from None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sets = {
        "train": (easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()),
        "test": (easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()),
    }
    found = EasyVqa({}, {}, folder / "answers.json")
    for split, (questions, paths) in sets.items():
        sentences: dict[int, list[dict[str, object]]] = {}
        for i, (text, answer, image) in enumerate(zip(*questions, strict=True)):
            sentence = {"text": text, "source": "easy_vqa", "id": i, "answers": {answer: 1.0}}
            sentences.setdefault(image, []).append(sentence)
        entries = [
            {"image": Path(paths[image]).name, "split": split, "sentences": sentences[image]}
            for image in sorted(sentences)
        ]
        found.images[split] = Path(next(iter(paths.values()))).parent
        found.sentences[split] = folder / f"{split}.json"
        _write(found.sentences[split], entries)
    _write(found.answers, sorted(easy_vqa.get_answers()))
    return found


def _write(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")

"""Data sets that the tests of this folder look at, and `lxscale shards inspect` and `dump`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from cluster.cli.inspect import add_dump, add_inspect
from shards.format.build import BuildSettings, build
from shards.format.record import ImageRecord, Labels, Picture, Sentence

WORDS = ["red", "green", "blue", "circle", "line", "left", "right", "above"]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
MAX_TOKENS = 8
CLASSES = 12


def made_records(n: int, seed: int = 0) -> list[ImageRecord]:
    """Sentences of words of the vocabulary, so that a word is a token."""
    rng = np.random.default_rng(seed)
    records = []
    for i in range(n):
        objects = int(rng.integers(1, 6))

        def words() -> str:
            return " ".join(rng.choice(WORDS, size=int(rng.integers(1, 10))))

        sentences = [Sentence(words(), "coco_cap") for _ in range(int(rng.integers(0, 4)))]
        for _ in range(int(rng.integers(1, 3))):
            answers = [
                None,
                {},
                {"yes": 1.0},
                {"yes": 0.3, "no": 0.9, "rare": 1.0},
                {"never": 0.5, "yes": 0.5},
                {"rare": 1.0},
            ]
            sentences.append(Sentence(words(), "vqa", answers[int(rng.integers(len(answers)))]))
        features = rng.normal(size=(objects, 8)).astype(np.float16)
        features[rng.random(features.shape) < 0.3] = 0
        records.append(
            ImageRecord(
                image=f"img_{i:06d}",
                width=int(rng.integers(100, 640)),
                height=480,
                boxes=np.sort(rng.random((objects, 2, 2)), axis=1)
                .reshape(objects, 4)
                .astype(np.float32),
                features=features,
                sentences=tuple(sentences),
                labels=Labels(
                    rng.integers(0, CLASSES, objects).astype(np.int32),
                    rng.random(objects, dtype=np.float32),
                    rng.integers(0, CLASSES, objects).astype(np.int32),
                    rng.random(objects, dtype=np.float32),
                ),
                split=["train", "val", None][i % 3],
            )
        )
    return records


def paired_records(n: int) -> list[ImageRecord]:
    """Records of two images of other sizes, each as one of `made_records`."""
    single, out = made_records(2 * n), []
    for i, (a, b) in enumerate(zip(single[::2], single[1::2], strict=True)):
        assert a.labels and b.labels
        both = zip(vars(a.labels).values(), vars(b.labels).values(), strict=True)
        out.append(
            replace(
                a,
                image=f"dev-{i}-0",
                boxes=np.concatenate([a.boxes, b.boxes]),
                features=np.concatenate([a.features, b.features]),
                labels=Labels(*map(np.concatenate, both)),
                sides=np.repeat(np.arange(2, dtype=np.uint8), [len(a.boxes), len(b.boxes)]),
                pictures=(
                    Picture(f"dev-{i}-0-img0", a.width, a.height),
                    Picture(f"dev-{i}-0-img1", 1000 + i, 30),
                ),
            )
        )
    return out


def build_set(
    records: list[ImageRecord], folder: Path, images_per_shard: int = 5, name: str = "made"
) -> Path:
    settings = BuildSettings(
        name,
        "random",
        vocab=VOCAB,
        answers=["yes", "no", "never", "unused"],
        images_per_shard=images_per_shard,
        max_tokens=MAX_TOKENS,
        num_object_classes=CLASSES,
        num_attribute_classes=CLASSES,
        skip_bad=True,
    )
    build(records, folder, settings)
    return folder


def command(name: str, *arguments: str | Path) -> int:
    """`lxscale shards NAME …`, without what is around every command."""
    parser = argparse.ArgumentParser()
    {"inspect": add_inspect, "dump": add_dump}[name](parser)
    args = parser.parse_args([*map(str, arguments), "--quiet"])
    status: int = args.func(args)
    return status

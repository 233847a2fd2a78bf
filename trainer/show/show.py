"""From a checkpoint and a data set to a page that shows what the model does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from shards.dataset import open_dataset
from shards.format.table import Table
from shards.inspect.html import as_json, check_pictures, data_element, frame, page_file
from shards.inspect.names import load_names
from shards.inspect.records import OpenSet, open_set
from shards.progress import Progress, no_progress
from shards.urls import shown
from trainer import setup
from trainer.checkpoint.generations import Generation
from trainer.config import RunConfig
from trainer.errors import ConfigError
from trainer.model import load_checkpoint
from trainer.show.choose import Chosen, draw_pairs, named_pairs, with_tables
from trainer.show.look import Viewer, heads_of, layers_of
from trainer.show.make import Maker
from trainer.show.page import Vocabulary, attention_bytes

MOST_BYTES = 256 << 20
"""Of attention in a page, in base64: what browsers open without trouble."""


@dataclass(frozen=True)
class Settings:
    """What is shown, and where."""

    path: Path
    """Of the page; what is there is replaced."""
    images: int = 20
    """Image records that are drawn; 0 for all."""
    sentences: int = 5
    """Of each of these at most; 0 for all."""
    pairs: tuple[str, ...] = ()
    """In place of what is drawn: see `named_pairs`."""
    seed: int = 0
    """Of the draw."""
    pictures: Path | None = None
    """Folder of the pictures, by image id; without, the layout of boxes is drawn."""
    objects: Path | None = None
    """Names of object labels, one a line."""
    attributes: Path | None = None


@dataclass(frozen=True)
class Page:
    """A page that was written."""

    path: Path
    size: int
    """In bytes."""
    records: int
    pairs: int
    pictures: int
    """That are in it."""
    unreadable: int
    """Files that have an image's name and are no picture."""


def show(
    run: str,
    url: str,
    settings: Settings,
    cache: str | Path | None = None,
    progress: Progress = no_progress,
) -> Page:
    """Write the page of pairs of the data set at `url`, as the model of a checkpoint sees them.

    Memory: the model and one record with its sentences. Raises ConfigError where the data set has
    another vocabulary, answer table or feature width than the model, or records of one image where
    its task is about two, or the reverse, and where the page would be too large; DataError naming
    what is missing, damaged, or cannot be written. The page's file is then as it was before.
    """
    check_pictures(settings.pictures)
    model, config, generation = load_checkpoint(run)
    cache = cache or config.data.cache
    _check_data(url, cache, config, generation)
    data = open_set(url, cache)
    vocabulary = Vocabulary(
        data.tokens,
        data.answers,
        load_names(settings.objects, settings.attributes, data.manifest.schema),
    )
    chosen = (
        named_pairs(data, settings.pairs, progress)
        if settings.pairs
        else draw_pairs(data, settings.images, settings.sentences, settings.seed)
    )
    _check_size(data, config, chosen)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    schema, sizes = data.manifest.schema, config.model
    labels = schema.labels and (schema.num_object_classes, schema.num_attribute_classes) == (
        sizes.num_object_classes,
        sizes.num_attribute_classes,
    )
    trained = generation.manifest.objectives
    heads = heads_of(model, trained, answers=bool(data.answers), labels=labels)
    mask_id = data.tokens.index("[MASK]")
    viewer = Viewer(model.to(device).eval(), layers_of(config.model), heads, mask_id)
    maker = Maker(data, viewer, vocabulary, settings.pictures)
    size, examples = 0, []
    assert __package__
    title = f"{config.run.name} on {data.manifest.name}"
    head, tail = frame(__package__, title, ("attention.js", "page.js"))
    with page_file(settings.path) as f:
        size += f.write(head.encode())
        progress("images shown", 0, len(chosen))
        for i, (table, pairs) in enumerate(with_tables(data, chosen)):
            block, rows = maker.image(i, table, pairs)
            size += f.write(data_element("image", block).encode())
            examples += rows
            progress("images shown", i + 1, len(chosen))
        document = {
            "run": config.run.name,
            "checkpoint": generation.name,
            "step": generation.step,
            "objectives": sorted(trained),
            "data": data.manifest.name,
            "url": shown(url),
            "of": [data.manifest.images, data.manifest.pairs],
            "heads": asdict(heads),
            "attention_heads": config.model.num_heads,
            "layers": [{**asdict(x), "of_image": x.of_image} for x in viewer.layers],
            "examples": [asdict(example) for example in examples],
        }
        size += f.write(data_element("index", as_json(document)).encode())
        size += f.write(tail.encode())
    return Page(settings.path, size, len(chosen), len(examples), maker.pictures, maker.unreadable)


def _check_data(
    url: str, cache: str | Path | None, config: RunConfig, generation: Generation
) -> None:
    """ConfigError unless a data set is such as the model can read and answer."""
    data, trained = open_dataset(url, cache, text="window"), generation.manifest
    setup.check_records(config, data)
    setup.check_same_tables(data, trained.vocab_sha256, trained.answers_sha256)
    schema = data.manifest.schema
    for thing, has, takes, good in (
        ("features", schema.feature_dim, config.model.feature_dim,
         schema.feature_dim == config.model.feature_dim),
        ("sentences", schema.max_tokens, config.model.max_positions,
         schema.max_tokens <= config.model.max_positions),
    ):  # fmt: skip
        if not good:
            raise ConfigError(
                f"{data.url} has {thing} of {has}, the model takes {takes}: show a data set that "
                "is built as the training set"
            )


def _each(data: OpenSet, table: Table, index: int) -> list[int]:
    """About how many objects each picture of a record has: of two, only tars tell."""
    objects = int(table.image_objects[index])
    return [objects // 2, objects - objects // 2] if data.manifest.schema.sides else [objects]


def _check_size(data: OpenSet, config: RunConfig, chosen: Sequence[Chosen]) -> None:
    """ConfigError where the page would be too large for a browser."""
    total = pairs = 0
    for table, image in with_tables(data, chosen):
        rows = int(table.image_sentences[image.index]) + np.asarray(image.sentences)
        tokens = (table.token_start[rows + 1] - table.token_start[rows] + 2).tolist()
        total += attention_bytes(config.model, _each(data, table, image.index), tokens)
        pairs += len(tokens)
    if (size := total * 4 // 3) > MOST_BYTES:
        fit = pairs * MOST_BYTES // size
        raise ConfigError(
            f"{pairs:,} pairs at {size / pairs / 1e3:,.0f} KB of attention each are a page of "
            f"{size / 1e6:,.0f} MB, above {MOST_BYTES / 1e6:,.0f}: show about {fit:,} of them "
            "(--images, --sentences, --pairs)"
        )

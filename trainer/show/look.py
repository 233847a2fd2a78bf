"""What a model makes of the sentences of an image, or of two: attention, answers, what it fills
in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.config import ModelConfig
from model.errors import ModelError
from model.objectives import OBJECTIVES
from shards.order.draws import U64, draw, uniform
from shards.order.keys import Purpose

Side = Literal["words", "objects"]
Top = tuple[tuple[int, float], ...]
"""The likeliest classes with their probabilities, likeliest first."""

_MASKED = 0.15  # of words and of objects, at least one of each
_ANSWERS, _WORDS, _LABELS = 5, 3, 3  # of the likeliest that are kept
_SENTENCES = 32  # of a forward


@dataclass(frozen=True)
class Layer:
    """One attention of the model."""

    name: str
    """With its number among its like, from 1."""
    cross: int
    """Number of its cross-modality layer, from 1; 0: it is of an encoder of one modality."""
    asks: Side
    """What looks."""
    asked: Side
    """What is looked at."""

    @property
    def of_image(self) -> bool:
        """Whether its weights depend on the image alone."""
        return self.cross == 0 and self.asks == "objects"


def layers_of(config: ModelConfig) -> list[Layer]:
    """The attentions of a model, in the order of `TrunkOutput.attentions`."""
    words: Side = "words"
    objects: Side = "objects"
    found = [
        Layer(f"language self {i + 1}", 0, words, words) for i in range(config.language_layers)
    ]
    found += [
        Layer(f"object self {i + 1}", 0, objects, objects) for i in range(config.object_layers)
    ]
    for i in range(1, config.cross_layers + 1):
        found += [
            Layer(f"cross {i}: language → vision", i, words, objects),
            Layer(f"cross {i}: vision → language", i, objects, words),
            Layer(f"cross {i}: language self", i, words, words),
            Layer(f"cross {i}: vision self", i, objects, objects),
        ]
    return found


@dataclass(frozen=True)
class Heads:
    """Which heads of a model there are, trained, with something in the data for them to say."""

    answers: bool
    soft: bool
    """Whether each answer has a probability of its own, as in fine-tuning to scores, in place of
    all having one together."""
    matching: bool
    words: bool
    objects: bool


def heads_of(model: nn.Module, trained: Mapping[str, float], answers: bool, labels: bool) -> Heads:
    """The heads of a model whose run had these objectives. answers, labels: whether the data set
    has a table of answers, and labels of the model's classes.

    A model that was trained with none of pre-training's objectives is taken to have trained the
    heads that it has.
    """
    tuned = not trained.keys() & OBJECTIVES.keys()
    modules = {name for name, _ in model.named_modules()}
    pairs = "pair_head" in modules

    def there(head: str, *objectives: str) -> bool:
        return head in modules and (tuned or any(o in trained for o in objectives))

    return Heads(
        answers=answers and (pairs or there("answer_head", "qa")),
        soft=tuned and not pairs,
        matching=there("cls.seq_relationship", "matching"),
        words=there("cls.predictions", "masked_lm"),
        objects=labels and there("obj_predict_head", "masked_object", "masked_attribute"),
    )


@dataclass(frozen=True)
class Sight:
    """An image, or two, with sentences: what a model is given."""

    sentences: Sequence[NDArray[np.int64]]
    """Ids of each, with [CLS] and [SEP]."""
    features: NDArray[np.floating]
    """(O, D)."""
    boxes: NDArray[np.floating]
    """(O, 4)."""
    images: Sequence[slice]
    """The objects of each image. The model sees a sentence with the one after the other."""


@dataclass(frozen=True)
class Masks:
    """What of a pair is masked: rising places, of words and of objects."""

    words: tuple[int, ...]
    objects: tuple[int, ...]


@dataclass(frozen=True)
class Filled:
    """What a model fills in where a pair is masked."""

    masks: Masks
    words: tuple[Top, ...] | None
    """Of each masked word; None without that head. Likewise below."""
    objects: tuple[Top, ...] | None
    attributes: tuple[Top, ...] | None


@dataclass(frozen=True)
class Seen:
    """What a model makes of a pair."""

    attentions: tuple[tuple[NDArray[np.float32], ...], ...]
    """(heads, queries, keys) of each layer, as it sees each of the images."""
    answers: Top | None
    """None without that head. Likewise below."""
    matching: float | None
    """Probability that sentence and image belong together."""
    filled: Filled


def draw_masks(key: U64, words: int, objects: int) -> Masks:
    """Masks of a pair of `words` words beside [CLS] and [SEP], and `objects` objects. key: the
    pair's, one element."""

    def places(count: int, purpose: Purpose, first: int) -> tuple[int, ...]:
        if not count:  # a text of which no word is left
            return ()
        value = uniform(draw(draw(key, purpose), np.arange(count)))
        chosen = np.flatnonzero((value < _MASKED) | (value == value.min()))
        return tuple((chosen + first).tolist())

    return Masks(places(words, Purpose.TOKEN, 1), places(objects, Purpose.OBJECT, 0))


@dataclass(frozen=True)
class Viewer:
    """A model that is looked into."""

    model: nn.Module
    """In evaluation mode, on any device."""
    layers: Sequence[Layer]
    heads: Heads
    mask_id: int
    """Of [MASK] in the vocabulary."""


@torch.inference_mode()
def look(viewer: Viewer, sight: Sight, masks: Sequence[Masks]) -> Iterator[Seen]:
    """What a model makes of each sentence with what it is about; once as it is, and, by a model
    that fills in, once masked (words by [MASK], objects by a feature of zeros). ModelError where it
    gives what is not finite."""
    for begin in range(0, len(sight.sentences), _SENTENCES):
        some = slice(begin, begin + _SENTENCES)
        part = replace(sight, sentences=sight.sentences[some])
        yield from _look(viewer, part, masks[some])


def _look(viewer: Viewer, sight: Sight, masks: Sequence[Masks]) -> Iterator[Seen]:
    model, heads, given = viewer.model, viewer.heads, _given(viewer, sight)
    passes = [
        given.forward(model, objects.start, objects.stop, attention=True)
        for objects in sight.images
    ]
    pooled = torch.cat([out.pooled for out in passes], 1)
    if not bool(torch.isfinite(pooled).all()):
        raise ModelError("what the model gives is not finite: take an earlier checkpoint")
    answers = None
    if heads.answers:
        head = "answer_head" if len(passes) == 1 else "pair_head"
        answers = _tops(model, head, pooled, _ANSWERS, heads.soft)
    matching = None
    if heads.matching:
        matched = model.get_submodule("cls.seq_relationship")(pooled)
        matching = matched.float().softmax(-1)[:, 1].tolist()
    filled = _fill(viewer, given, masks)
    for i, sentence in enumerate(sight.sentences):
        yield Seen(
            tuple(
                tuple(
                    _cut(weights[i], layer, len(sentence), objects.stop - objects.start)
                    for weights, layer in zip(out.attentions, viewer.layers, strict=True)
                )
                for out, objects in zip(passes, sight.images, strict=True)
            ),
            None if answers is None else answers[i],
            None if matching is None else matching[i],
            filled[i],
        )


@dataclass(frozen=True)
class _Given:
    """Sentences (M, L) with objects, on the model's device."""

    ids: Tensor
    real: Tensor
    """bool (M, L): not padding."""
    features: Tensor
    """(M, O, D)."""
    boxes: Tensor

    def forward(self, model: nn.Module, first: int, end: int, attention: bool = False) -> Any:
        """What the trunk makes of them with the objects from `first` to `end`."""
        trunk, some = model.get_submodule("lxmert"), slice(first, end)
        features, boxes = self.features[:, some], self.boxes[:, some]
        return trunk(self.ids, self.real, features, boxes, return_attention=attention)


def _given(viewer: Viewer, sight: Sight) -> _Given:
    count, longest = len(sight.sentences), max(map(len, sight.sentences))
    device = next(viewer.model.parameters()).device
    ids = torch.zeros(count, longest, dtype=torch.long)
    real = torch.zeros(count, longest, dtype=torch.bool)
    for i, sentence in enumerate(sight.sentences):
        ids[i, : len(sentence)] = torch.from_numpy(sentence)
        real[i, : len(sentence)] = True
    features, boxes = (
        torch.from_numpy(x.astype(np.float32)).repeat(count, 1, 1)
        for x in (sight.features, sight.boxes)
    )
    return _Given(ids.to(device), real.to(device), features.to(device), boxes.to(device))


def _fill(viewer: Viewer, given: _Given, masks: Sequence[Masks]) -> list[Filled]:
    """What the model fills in. A model that sees two images has been trained on no masks."""
    model, heads = viewer.model, viewer.heads
    if not (heads.words or heads.objects):
        return [Filled(mask, None, None, None) for mask in masks]
    ids, features = given.ids.clone(), given.features.clone()
    for i, mask in enumerate(masks):
        ids[i, list(mask.words)] = viewer.mask_id
        features[i, list(mask.objects)] = 0
    masked = replace(given, ids=ids, features=features).forward(model, 0, features.shape[1])
    found = []
    for i, mask in enumerate(masks):
        words, vision = masked.language[i, list(mask.words)], masked.vision[i, list(mask.objects)]
        objects, attributes = _labels(model, vision) if heads.objects else (None, None)
        said = _tops(model, "cls.predictions", words, _WORDS) if heads.words else None
        found.append(Filled(mask, said, objects, attributes))
    return found


def _labels(model: nn.Module, vision: Tensor) -> tuple[tuple[Top, ...], tuple[Top, ...]]:
    """Object and attribute classes of vectors (objects, H)."""
    hidden = model.get_submodule("obj_predict_head.transform")(vision)
    objects, attributes = (
        _tops(model, f"obj_predict_head.decoder_dict.{name}", hidden, _LABELS)
        for name in ("obj", "attr")
    )
    return objects, attributes


def _cut(weights: Tensor, layer: Layer, words: int, objects: int) -> NDArray[np.float32]:
    """The weights of one pair without padding."""
    sizes: dict[Side, int] = {"words": words, "objects": objects}
    found: Any = weights[:, : sizes[layer.asks], : sizes[layer.asked]].float().cpu().numpy()
    return np.asarray(found, dtype=np.float32)


def _tops(
    model: nn.Module, head: str, hidden: Tensor, most: int, soft: bool = False
) -> tuple[Top, ...]:
    """The likeliest classes that a head gives to vectors (n, H). soft: see `Heads`."""
    logits = model.get_submodule(head)(hidden).float()
    chance = logits.sigmoid() if soft else logits.softmax(-1)
    value, index = chance.topk(min(most, chance.shape[-1]))
    rows = zip(index.tolist(), value.tolist(), strict=True)
    return tuple(tuple(zip(*row, strict=True)) for row in rows)

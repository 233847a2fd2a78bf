"""Pairs -> model.Batch: gather, then draw masks, mismatched sentences and answers.

Every draw is a pure function of (seed, epoch, pair, purpose), so a pair gets the same masks, the
same other sentence and the same answer at any world size, in any process, after any restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from model.batch import Batch
from shards.dataset import Dataset
from shards.errors import DataError
from shards.format.features import NUMPY
from shards.format.index import ranges
from shards.format.tokenizer import load_tokenizer
from shards.order.draws import I64, U64, below, chance, draw, halves, uniform
from shards.order.keys import VERSION, Purpose, pair_keys, view_keys
from shards.order.sampler import Plan, Sampler
from trainer.data.sentences import Pairs, sentences_of, shards_of_text
from trainer.data.shared_batches import Empty, fresh_memory

# Columns of labels -> fields of a batch.
_LABELS = {
    "object_id": "object_label",
    "object_conf": "object_conf",
    "attribute_id": "attribute_label",
    "attribute_conf": "attribute_conf",
}
# Of the masked words and objects: 80 % masked or zeroed, 10 % replaced, 10 % kept (LXMERT sec. 3.1)
_MASKED, _REPLACED = 0.8, 0.9


@dataclass(frozen=True)
class BatchSettings:
    """What a batch depends on beside the data and the plan."""

    seed: int
    """Of all draws."""
    token_mask: float
    """Probability that a word is masked."""
    object_mask: float
    """Probability that an object is masked."""
    cls_id: int
    """Ids of the vocabulary."""
    sep_id: int
    mask_id: int
    vocab_size: int
    order: int = VERSION
    """Version of the order (shards/order/keys.py)."""
    questions: bool = False
    """Whether batches have the scores of all answers to every pair's sentence, for fine-tuning."""


def settings_of(
    data: Dataset,
    seed: int,
    token_mask: float,
    object_mask: float,
    order: int = VERSION,
    questions: bool = False,
) -> BatchSettings:
    """The settings with a data set's vocabulary. DataError where that lacks what they need."""
    vocab = load_tokenizer(data.file(data.manifest.vocab))

    def token_id(token: str) -> int:
        found = vocab.token_to_id(token)
        if found is None:
            raise DataError(f"the vocabulary of {data.url} has no {token}: rebuild the data set")
        return found

    return BatchSettings(
        seed=seed,
        token_mask=token_mask,
        object_mask=object_mask,
        cls_id=token_id("[CLS]"),
        sep_id=token_id("[SEP]"),
        mask_id=token_id("[MASK]"),
        vocab_size=data.manifest.schema.vocab_size,
        order=order,
        questions=questions,
    )


@dataclass(frozen=True)
class ObjectMasks:
    """Flat positions in (pairs * objects): masked, and of these zeroed and replaced."""

    position: I64
    zero: I64
    swap: I64
    donor_image: I64
    """Of each replaced object: where its features come from."""
    donor_shard: I64
    donor_object: I64


@dataclass(frozen=True)
class Drawn:
    """A batch before anything of a tar is read."""

    batch: Batch
    """Whose features, boxes and labels are missing: they have no columns."""
    plan: Plan
    """Of its pairs, in its order."""
    data: Dataset
    """With an index that has the batch's shards."""
    images: I64
    """Rows of the distinct images in that index."""
    shards: I64
    """Where they are."""
    masks: ObjectMasks


def make_batch(
    data: Dataset,
    sampler: Sampler,
    plan: Plan,
    settings: BatchSettings,
    empty: Empty = fresh_memory,
    skipped: Sequence[int] = (),
) -> Batch:
    """The batch of a plan's pairs, on the CPU; `empty` gives the memory of the features.
    skipped: shards that cannot be had; the plan has no pairs of them."""
    drawn = draw_batch(data, sampler, plan, settings, skipped)
    data = drawn.data
    masks, objects = drawn.masks, drawn.batch.features.shape[1]
    schema = data.manifest.schema
    features = empty((len(drawn.images), objects, schema.stored_width), NUMPY[schema.feature_type])
    found = data.gather_images(drawn.images, drawn.shards, features.numpy())
    boxes, sides = found.pop("boxes"), found.pop("sides", None)
    first = None
    if sides is not None:
        held = drawn.batch.num_objects
        first = held - _tensor(sides.sum(1, dtype=np.int64))
    swapped = data.gather_objects(masks.donor_image, masks.donor_shard, masks.donor_object)
    return replace(
        drawn.batch,
        features=features,
        boxes=_tensor(boxes),
        swap_features=_tensor(swapped),
        first_objects=first,
        **{_LABELS[name]: _tensor(values) for name, values in found.items()},
    )


def draw_batch(
    data: Dataset,
    sampler: Sampler,
    plan: Plan,
    settings: BatchSettings,
    skipped: Sequence[int] = (),
) -> Drawn:
    """All that is drawn for a plan's pairs, and their words; no tar is needed for it. The batch
    has them by their objects' and their sentence's lengths."""
    if not plan.masks:
        settings = replace(settings, token_mask=0.0, object_mask=0.0)
    data = data.over(shards_of_text(data, sampler, plan, skipped))
    m = data.index
    pair = data.rows_of(sampler.streams, plan)
    image = data.image_of(pair)
    key = pair_keys(settings.order, settings.seed, plan.epoch, data.pair_ids(pair))
    sentence = sentences_of(data, sampler, plan, Pairs(pair, image, key), skipped)
    # Equal lengths beside each other, for attention without padding (model/attention.py).
    length = m.token_start[sentence + 1] - m.token_start[sentence]
    order = np.lexsort((length, m.image_objects[image]))
    plan, pair, image, key, sentence = (
        plan.take(order),
        pair[order],
        image[order],
        key[order],
        sentence[order],
    )
    matched = ~plan.mismatched
    tokens, token_start, lm_position, lm_target = _tokens(data, sentence, key, settings)
    distinct, first, image_index = np.unique(image, return_index=True, return_inverse=True)
    objects = int(m.image_objects[distinct].max(initial=1))
    of_view, view, view_pair = key, None, None
    if sampler.settings.share_vision > 1:
        of_view = _view_keys(data, sampler, plan, image, settings)
        view, view_pair = _views(image, of_view)
    masks = _objects(data, plan, image, objects, of_view, settings)
    answer_pair, answer_target = _answers(data, pair, matched, key)
    batch = Batch(
        tokens=_tensor(tokens),
        token_start=_tensor(token_start),
        features=torch.empty((len(distinct), objects, 0), dtype=torch.float16),
        boxes=torch.empty((len(distinct), objects, 0)),
        num_objects=_tensor(m.image_objects[distinct].astype(np.int64)),
        image_index=_tensor(image_index.astype(np.int64)),
        lm_position=_tensor(lm_position),
        lm_target=_tensor(lm_target),
        object_position=_tensor(masks.position),
        zero_position=_tensor(masks.zero),
        swap_position=_tensor(masks.swap),
        swap_features=torch.empty((len(masks.swap), 0), dtype=torch.float16),
        matched=_tensor(matched.astype(np.int64)),
        answer_pair=_tensor(answer_pair),
        answer_target=_tensor(answer_target),
        pair_id=_tensor(data.pair_ids(pair)),
        sentence_id=_tensor(data.pair_ids(sentence)),
        source=_tensor(m.source[pair].astype(np.int64)),
        offset=_tensor(plan.offset),
        dataset=_tensor(plan.dataset),
        view=None if view is None else _tensor(view),
        view_pair=None if view_pair is None else _tensor(view_pair),
        **(_questions(data, pair) if settings.questions else {}),
    )
    return Drawn(batch, plan, data, distinct, plan.shard[first], masks)


def _tensor(array: NDArray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _tokens(
    data: Dataset, sentence: I64, key: U64, settings: BatchSettings
) -> tuple[I64, I64, I64, I64]:
    """Packed ids with [CLS] and [SEP], starts, and the masked positions with their targets."""
    m = data.index
    length = m.token_start[sentence + 1] - m.token_start[sentence]
    words = m.tokens[ranges(m.token_start[sentence], length)].astype(np.int64)
    start = np.concatenate([[0], np.cumsum(length + 2)]).astype(np.int64)
    at = ranges(start[:-1] + 1, length)
    word = ranges(np.zeros_like(length), length)
    bits = draw(np.repeat(draw(key, Purpose.TOKEN), length), word)
    masked = np.flatnonzero(chance(bits, settings.token_mask))
    # The same draw says what a masked word becomes: its place in [0, p) is uniform too.
    fate = uniform(bits[masked]) / max(settings.token_mask, 1e-12)
    shown, target = words.copy(), words[masked]
    other = below(draw(bits[masked], Purpose.TOKEN_ID), settings.vocab_size)
    shown[masked] = np.where(
        fate < _MASKED, settings.mask_id, np.where(fate < _REPLACED, other, target)
    )
    tokens = np.empty(start[-1], dtype=np.int64)
    tokens[start[:-1]] = settings.cls_id
    tokens[start[1:] - 1] = settings.sep_id
    tokens[at] = shown
    return tokens, start, at[masked], target


def _objects(
    data: Dataset, plan: Plan, image: I64, objects: int, key: U64, settings: BatchSettings
) -> ObjectMasks:
    """Masked objects. The donor of a replaced RoI is an object of another image of the same shard
    (the shard is at hand wherever the pair is); in a shard of one image it is zeroed instead."""
    m = data.index
    couples = np.arange((objects + 1) // 2)
    bits = halves(draw(draw(key, Purpose.OBJECT)[:, None], couples[None, :]))[:, :objects].reshape(
        -1
    )
    position = np.flatnonzero(chance(bits, settings.object_mask))
    row, column = np.divmod(position, objects)
    real = column < m.image_objects[image[row]]
    position, row, column = position[real], row[real], column[real]
    fate = uniform(bits[position]) / max(settings.object_mask, 1e-12)
    shard = plan.shard[row]
    place = m.place_of(shard)
    first, size = m.shard_image[place], m.shard_image[place + 1] - m.shard_image[place]
    alone = size < 2
    zero = (fate < _MASKED) | (alone & (fate < _REPLACED))
    swap = (fate >= _MASKED) & (fate < _REPLACED) & ~alone

    row, column, first, size = row[swap], column[swap], first[swap], size[swap]
    donor = first + below(draw(key[row], Purpose.DONOR, column), size - 1)
    donor += donor >= image[row]
    which = below(
        draw(key[row], Purpose.DONOR_OBJECT, column), m.image_objects[donor].astype(np.int64)
    )
    return ObjectMasks(position, position[zero], position[swap], donor, shard[swap], which)


def _view_keys(
    data: Dataset, sampler: Sampler, plan: Plan, image: I64, settings: BatchSettings
) -> U64:
    """The key of each pair's view, which does not depend on what else is in the batch."""
    in_shard = image - data.index.shard_image[data.index.place_of(plan.shard)]
    stream = np.asarray([s.key for s in sampler.streams])[plan.stream]
    group = plan.index // sampler.settings.share_vision
    return view_keys(settings.seed, plan.epoch, stream, plan.shard, in_shard, group)


def _views(image: I64, key: U64) -> tuple[I64, I64]:
    """The view of each pair, numbered as they come, and the first pair of each."""
    both = np.stack([image, key.view(np.int64)])
    _, first, which = np.unique(both, axis=1, return_index=True, return_inverse=True)
    order = np.argsort(first)
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    return number[which.reshape(-1)], first[order]


def _questions(data: Dataset, pair: I64) -> dict[str, torch.Tensor]:
    """Every pair as a question, with the scores of all its answers in the table."""
    m = data.index
    length = m.answer_start[pair + 1] - m.answer_start[pair]
    flat = ranges(m.answer_start[pair], length)
    number = np.arange(len(pair))
    return {
        "question_pair": _tensor(number),
        "question_answered": _tensor(np.repeat(number, length)),
        "question_answer": _tensor(m.answer_id[flat].astype(np.int64)),
        "question_score": _tensor(m.answer_score[flat]),
    }


def _answers(data: Dataset, pair: I64, matched: NDArray[np.bool_], key: U64) -> tuple[I64, I64]:
    """Matched pairs with an answer in the table, and one answer each, drawn by its score."""
    m = data.index
    begin, end = m.answer_start[pair], m.answer_start[pair + 1]
    rows = np.flatnonzero(matched & (end > begin))
    length = end[rows] - begin[rows]
    flat = ranges(begin[rows], length)
    # Fixed point, so that sums are exact and a draw does not depend on the rest of the batch.
    score = np.rint(np.maximum(m.answer_score[flat], 0.0) * 2.0**20).astype(np.int64)
    cumulative = np.concatenate([[0], np.cumsum(score)])
    ends = np.cumsum(length)
    before, total = cumulative[ends - length], cumulative[ends] - cumulative[ends - length]
    rows_with = total > 0
    rows, before, total = rows[rows_with], before[rows_with], total[rows_with]
    # Invert each row's cumulative distribution at one uniform draw.
    target = before + below(draw(key[rows], Purpose.ANSWER), total)
    chosen = np.searchsorted(cumulative, target, side="right") - 1
    return rows.astype(np.int64), m.answer_id[flat[chosen]].astype(np.int64)

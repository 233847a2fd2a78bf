"""Where our model meets odd input, and where it departs from Hugging Face's on purpose."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.batch import Batch
from model.errors import ModelError
from model.objectives.base import LossSettings
from tests.model.test_model import (
    ALL,
    close,
    empty_batch,
    make_batch,
    make_model,
    padded,
    reference,
    trunk_arguments,
)


def unmasked(batch: Batch, **changes: torch.Tensor) -> Batch:
    none = torch.zeros(0, dtype=torch.int64)
    return replace(
        batch,
        object_position=none,
        zero_position=none,
        swap_position=none,
        swap_features=batch.swap_features[:0],
        **changes,
    )


@pytest.mark.parametrize("scope", ["masked", "all"])
def test_an_image_without_objects_trains(scope: str) -> None:
    model = make_model().eval()
    batch = unmasked(make_batch(), num_objects=torch.tensor([0, 5, 5]))
    out = model(batch, settings=LossSettings(scope))
    total = sum(out.loss_sum.values())
    total.backward()
    assert torch.isfinite(total)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    # Its place is seen but is no target: 6 pairs, 2 of each image.
    assert out.count["masked_object"] == (0 if scope == "masked" else 4 * 5)
    with torch.no_grad():
        shown = model.lxmert(*trunk_arguments(batch), return_attention=True)
    assert all(torch.isfinite(w).all() for w in shown.attentions)


def test_a_sentence_alone_is_as_in_a_padded_batch() -> None:
    model = make_model().eval()
    batch = unmasked(make_batch())
    assert len(set(batch.token_start.diff().tolist())) > 1
    with torch.no_grad():
        together = model.encode(batch, LossSettings("all"))
        for i in range(batch.pairs):
            begin, end = batch.token_start[i : i + 2].tolist()
            words = (batch.lm_position >= begin) & (batch.lm_position < end)
            alone = model.encode(
                replace(
                    batch,
                    tokens=batch.tokens[begin:end],
                    token_start=torch.tensor([0, end - begin]),
                    image_index=batch.image_index[i : i + 1],
                    lm_position=batch.lm_position[words] - begin,
                ),
                LossSettings("all"),
            )
            close(alone.pooled[0], together.pooled[i])
            close(alone.words, together.words[words])
            close(alone.objects, together.objects[5 * i : 5 * i + 5])


def test_attention_weights_are_hugging_faces() -> None:
    """Theirs of a cross layer are language->vision only; ours have all four attentions."""
    model, batch = make_model().eval(), make_batch(ragged=True)
    with torch.no_grad():
        ours = model.lxmert(*trunk_arguments(batch), return_attention=True).attentions
        theirs = reference(model).lxmert(**padded(batch), output_attentions=True)
    for a, b in zip(
        ours[:4] + ours[4::4],
        theirs.language_attentions + theirs.vision_attentions + theirs.cross_encoder_attentions,
        strict=True,
    ):
        queries = a.sum(-1) > 0.5  # theirs of padded queries are of no use to anyone
        close(a[queries], b[queries])
        assert queries.any()


def test_gradients_agree_with_hugging_face_but_for_the_rows_it_freezes() -> None:
    """Theirs, and the original, give padding_idx=0 to all three embeddings: position 0, segment 0
    and token 0 get no gradient from the embedding there. Here position and segment 0 are learnt."""
    model = make_model().eval().double()
    theirs = reference(make_model()).double()
    batch = make_batch()
    batch = replace(batch, tokens=batch.tokens.clamp(min=1))
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in padded(batch).items()}
    model.encode(batch).pooled.square().sum().backward()
    theirs.lxmert(**inputs).pooled_output.square().sum().backward()
    gradients = {n: p.grad for n, p in theirs.lxmert.named_parameters()}
    for name, p in model.lxmert.named_parameters():
        if gradients[name] is None:  # the vision half of the last cross layer
            assert p.grad is None or not p.grad.any(), name
            continue
        start = 0
        if name.startswith(("embeddings.position", "embeddings.token_type")):
            assert p.grad[0].any() and not gradients[name][0].any()
            start = 1
        torch.testing.assert_close(p.grad[start:], gradients[name][start:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batch", [make_batch(), empty_batch()], ids=["pairs", "empty"])
def test_losses_of_a_bf16_model_are_fp32(batch: Batch) -> None:
    model = make_model().bfloat16()
    out = model(batch)
    assert {v.dtype for v in out.loss_sum.values()} == {torch.float32}
    sum(out.loss_sum.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_objectives_that_are_none_are_refused() -> None:
    model, batch = make_model(), make_batch()
    with pytest.raises(ModelError, match="mlm is not an objective: choose from masked_attribute"):
        model(batch, frozenset({"mlm", "qa"}))
    with pytest.raises(ModelError, match="no objective is active"):
        model(batch, frozenset())
    bare = replace(
        batch, object_label=None, object_conf=None, attribute_label=None, attribute_conf=None
    )
    with pytest.raises(ModelError, match="no labels for masked_object"):
        model(bare)
    model(bare, ALL - {"masked_object", "masked_attribute"})

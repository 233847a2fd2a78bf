"""Packed rows: attention over true lengths, dropout, and what a batch takes of operations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import attention
from model.attention import _grouped, _nested
from model.batch import Batch
from model.dropout import add_dropout, dropout
from model.errors import ModelError
from model.flops import training_flops
from model.joined import joined_linear
from model.objectives.base import LossSettings
from model.packing import Rows
from tests.model.test_model import ALL, CONFIG, make_batch, make_model, trunk_arguments


def rows(*lengths: int) -> Rows:
    return Rows(torch.tensor(lengths), sum(lengths), max(lengths))


def one_by_one(qkv: torch.Tensor, sides: list[tuple[Rows, Rows]]) -> torch.Tensor:
    """Attention of each sequence by itself."""
    q, k, v = (x.transpose(0, 1) for x in qkv.unbind(1))
    starts = [0, sides[0][0].total][: len(sides)]
    out = []
    for (here, there), i, j in zip(sides, starts, starts[::-1], strict=True):
        for n, c in zip(here.lengths, there.lengths, strict=True):
            score = q[:, i : i + n] @ k[:, j : j + c].transpose(-1, -2) / q.shape[-1] ** 0.5
            out.append((score.softmax(-1) @ v[:, j : j + c]).transpose(0, 1))
            i, j = i + n, j + c
    return torch.cat(out)


SELF, OTHER = rows(3, 3, 5, 2), rows(4, 4, 4, 2)


@pytest.mark.parametrize("kernel", [_grouped, _nested], ids=["grouped", "nested"])
@pytest.mark.parametrize(
    "sides", [[(SELF, SELF)], [(SELF, OTHER), (OTHER, SELF)]], ids=["self", "cross"]
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_attention_is_that_of_each_sequence_by_itself(
    kernel: object, sides: list[tuple[Rows, Rows]]
) -> None:
    """The nested one is what GPUs take; here by torch's own reference of it."""
    assert callable(kernel)
    total = sum(side.total for side, _ in sides)
    g = torch.Generator().manual_seed(1)
    qkv = torch.randn(total, 3, 2, 8, generator=g, requires_grad=True)
    grad = torch.randn(total, 2, 8, generator=g)
    found, expected = kernel(qkv, sides, 0.0), one_by_one(qkv, sides)
    torch.testing.assert_close(found, expected)
    (ours,), (theirs,) = (torch.autograd.grad(x, qkv, grad) for x in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_gradients_of_attention_with_dropout() -> None:
    sides = [(rows(2, 2, 3, 0), rows(2, 2, 0, 1)), (rows(2, 2, 0, 1), rows(2, 2, 3, 0))]
    g = torch.Generator().manual_seed(2)
    qkv = torch.randn(12, 3, 2, 4, dtype=torch.float64, generator=g, requires_grad=True)

    def drawn(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return _grouped(x, sides, 0.4)

    assert not torch.equal(drawn(qkv), _grouped(qkv, sides, 0.0))
    assert torch.autograd.gradcheck(drawn, (qkv,))


@pytest.mark.parametrize("beside", [False, True], ids=["apart", "beside each other"])
def test_a_joined_product_is_that_of_each_layer(beside: bool) -> None:
    layers = [torch.nn.Linear(6, size).double() for size in (4, 4, 4)]
    if beside:  # as ZeRO's flat buffers have them
        for name in ("weight", "bias"):
            parts = [getattr(layer, name) for layer in layers]
            flat = torch.cat([p.detach().flatten() for p in parts])
            for part, piece in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
                part.data = piece.view(part.shape)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, 12, dtype=torch.float64)
    inputs = [x, *(p for layer in layers for p in layer.parameters())]
    found = joined_linear(x, layers)
    expected = torch.cat([layer(x) for layer in layers], dim=1)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(3)
    x = torch.ones(1000, 1001, requires_grad=True)
    found = dropout(x, p)
    (grad,) = torch.autograd.grad(found.sum(), x)
    found = found.detach()
    share = float((found == 0).float().mean())
    # Five standard deviations of a million draws.
    assert share == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5 + 2**-16)
    assert set(found.unique().tolist()) == {0.0, float(found.max())}
    assert float(found.max()) == pytest.approx(1 / (1 - p), rel=1e-4)
    assert torch.equal(grad, found)
    # No place is dropped by the draw of another.
    dropped = (found == 0).float()
    for lag in (1, 2, 3, 4, 1001):
        both = float((dropped.flatten()[lag:] * dropped.flatten()[:-lag]).mean())
        assert both == pytest.approx(p * p, abs=2e-3), lag
    torch.manual_seed(3)
    torch.testing.assert_close(add_dropout(x, torch.full_like(x, 2.0), p), 2 + found)
    assert dropout(x, 0.0) is x


@pytest.mark.parametrize(("scope", "ragged"), [("masked", False), ("all", True)])
def test_operations_are_those_that_torch_counts(scope: str, ragged: bool) -> None:
    model, batch, settings = make_model(), make_batch(9, ragged=ragged), LossSettings(scope)
    for active in (ALL, frozenset({"qa"})):
        with FlopCounterMode(display=False) as counted:
            out = model(batch, active, settings)
            torch.stack([*out.loss_sum.values()]).sum().backward()
        assert training_flops(CONFIG, batch, active, settings) == counted.get_total_flops(), active


def test_the_order_of_pairs_changes_nothing() -> None:
    """Neighbours of equal lengths are taken at once; others are as right."""
    model, batch = make_model().eval(), make_batch(ragged=True)
    with torch.no_grad():
        before = model(batch).loss_sum
        order = torch.tensor([4, 1, 5, 0, 3, 2])
        after = model(permuted(batch, order)).loss_sum
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-5)


def permuted(batch: Batch, order: torch.Tensor) -> Batch:
    """The same pairs in another order."""
    length, width = batch.token_start.diff(), batch.features.shape[1]
    new = torch.empty_like(order)
    new[order] = torch.arange(len(order))
    start = torch.cat([torch.zeros(1, dtype=torch.int64), length[order].cumsum(0)])
    of = torch.repeat_interleave(torch.arange(len(length)), length)
    moved = start[new[of]] + torch.arange(len(of)) - batch.token_start[of]
    tokens = torch.empty_like(batch.tokens)
    tokens[moved] = batch.tokens

    def objects(position: torch.Tensor) -> torch.Tensor:
        return new[position // width] * width + position % width

    return replace(
        batch,
        tokens=tokens,
        token_start=start,
        image_index=batch.image_index[order],
        lm_position=moved[batch.lm_position],
        object_position=objects(batch.object_position),
        zero_position=objects(batch.zero_position),
        swap_position=objects(batch.swap_position),
        matched=batch.matched[order],
        answer_pair=new[batch.answer_pair],
        **{n: getattr(batch, n)[order] for n in ("pair_id", "sentence_id", "source", "offset")},
    )


@pytest.mark.parametrize("scope", ["masked", "all"])
def test_a_step_asks_a_device_for_nothing(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of the meta device has no values: to wait for one is an error there, and on a GPU
    a pause. Of the step only the one kernel is left out that is not for this device."""

    def kernel(qkv: torch.Tensor, sides: list[tuple[Rows, Rows]], p: float) -> torch.Tensor:
        assert sum(len(side.end) + len(context.end) for side, context in sides)
        return qkv.sum(1)

    monkeypatch.setattr(attention, "_nested", kernel)
    model, batch = make_model().to("meta"), make_batch(ragged=True).to("meta")
    out = model(batch, settings=LossSettings(scope))
    torch.stack([*out.loss_sum.values()]).sum().backward()
    assert out.count == make_model()(make_batch(ragged=True), settings=LossSettings(scope)).count
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


def test_padding_that_is_not_last_is_refused() -> None:
    """Where it is counts as a word's place: what a sentence is would change in silence."""
    model, batch = make_model().eval(), make_batch(ragged=True)
    ids, shown, features, boxes, seen = trunk_arguments(batch)
    with pytest.raises(ModelError, match="put the padding last"):
        model.lxmert(ids, shown.flip(1), features, boxes, seen)
    with pytest.raises(ModelError, match="put the padding last"):
        model.lxmert(ids, shown, features, boxes, seen.flip(1))

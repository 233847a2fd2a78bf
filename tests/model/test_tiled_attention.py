"""The kernels for GPUs, interpreted on the CPU, beside the attention of the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor

from model import attention
from model.attention import _grouped
from model.batch import Batch
from model.lxmert import compile_layers
from model.packing import Rows
from model.tiled_attention import fits, tiled
from tests.model.test_model import make_batch, make_model

HEADS, SIZE = 2, 16


def rows(*lengths: int) -> Rows:
    return Rows(torch.tensor(lengths), sum(lengths), max(lengths))


def drawn(parts: list[Rows]) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(sum(p.total for p in parts), 3, HEADS, SIZE, requires_grad=True)


@pytest.mark.parametrize(
    "parts",
    [[rows(3, 7, 12)], [rows(3, 7, 12), rows(36, 9, 20)], [rows(1), rows(70)], [rows(17, 128)]],
    ids=["self", "cross", "one row", "longest"],
)
def test_it_is_the_attention_of_the_cpu(parts: list[Rows]) -> None:
    sides = [(a, b) for a, b in zip(parts, parts[::-1], strict=True)]
    x = drawn(parts)
    y = x.detach().clone().requires_grad_()
    found, expected = tiled(x, parts, 0.0), _grouped(y, sides, 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gradient = torch.randn_like(found)
    found.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)


def kept(x: Tensor, part: Rows, p: float, seed: int) -> Tensor:
    """What dropout multiplies each weight by, (R, HEADS, SIZE) for sequences of up to SIZE rows:
    with the rows of a unit matrix as values, weights are seen as they are."""
    x = x.detach().clone()
    x[:, 2] = torch.eye(SIZE)[part.place][:, None]
    torch.manual_seed(seed)
    return (tiled(x, [part], p) / tiled(x, [part], 0.0)).nan_to_num()


def test_dropout_drops_its_share_and_scales_the_rest() -> None:
    part = rows(*[SIZE] * 40)
    found = kept(drawn([part]), part, 0.3, seed=1)
    assert float((found > 0).float().mean()) == pytest.approx(0.7, abs=0.01)
    torch.testing.assert_close(found[found > 0].mean(), torch.tensor(1 / 0.7), rtol=1e-4, atol=0)
    assert torch.equal(found, kept(drawn([part]), part, 0.3, seed=1))
    assert not torch.equal(found, kept(drawn([part]), part, 0.3, seed=2))
    sequences = found.unflatten(0, (40, SIZE))
    assert not torch.equal(sequences[0], sequences[1])
    assert not torch.equal(sequences[:, :, 0], sequences[:, :, 1])


def test_the_backward_drops_what_the_forward_did() -> None:
    part = rows(16, 9)
    x = drawn([part])
    factor = kept(x, part, 0.3, seed=3)
    y = x.detach().clone().requires_grad_()
    torch.manual_seed(3)
    found = tiled(x, [part], 0.3)
    expected = []
    for begin, end in ((0, 16), (16, 25)):
        q, k, v = y[begin:end].permute(1, 2, 0, 3)
        weights = (q @ k.transpose(-1, -2) * SIZE**-0.5).softmax(-1)
        own = factor[begin:end].transpose(0, 1)[..., : end - begin]
        expected.append((weights * own @ v).transpose(0, 1))
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)
    gradient = torch.randn_like(found)
    found.backward(gradient)
    torch.cat(expected).backward(gradient)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)


def test_what_is_dropped_does_not_depend_on_the_tile() -> None:
    """Another, longer sequence in the batch makes all tiles larger."""
    small, large = rows(16, 9), rows(16, 9, 40)
    x = drawn([large])
    first = kept(x[:25], small, 0.5, seed=4)
    x = x.detach().clone()
    x[:, 2] = torch.eye(SIZE)[large.place.clamp(max=SIZE - 1)][:, None]
    torch.manual_seed(4)
    second = (tiled(x, [large], 0.5) / tiled(x, [large], 0.0)).nan_to_num()
    assert torch.equal(first > 0, second[:25] > 0)


def test_what_does_not_fit_is_left_to_other_kernels() -> None:
    assert fits([rows(128), rows(3)], 64)
    assert not fits([rows(129), rows(3)], 64)
    assert not fits([rows(3)], 24)


# --- the compiled model ---------------------------------------------------------------------------


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def attend(qkv: Tensor, sides: list[tuple[Rows, Rows]], p: float) -> Tensor:
        return tiled(qkv, [side for side, _ in sides], p)

    monkeypatch.setattr(attention, "_attend", attend)
    yield
    torch._dynamo.reset()


def test_compiled_layers_are_the_layers(as_on_a_gpu: None) -> None:
    """Of every shape of batch, by code that is made once for all layers of a kind."""
    model = make_model().eval()
    batches = [make_batch(pairs, ragged=True) for pairs in (6, 4)]

    def gradients(batch: Batch) -> dict[str, Tensor]:
        model.zero_grad()
        out = model(batch)
        torch.stack(list(out.loss_sum.values())).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = [gradients(batch) for batch in batches]
    compile_layers(model, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for batch, each in zip(batches, expected, strict=True):
        found = gradients(batch)
        assert found.keys() == each.keys()
        for name, gradient in each.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    # Two embeddings, a layer, a cross layer, and the last of these, which is pruned.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 5

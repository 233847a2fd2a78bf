"""The model on a GPU beside itself on the CPU. Needs torch and pydantic alone, and a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from model.batch import Batch
from model.config import ModelConfig
from model.lxmert import Lxmert, compile_layers, init_weights
from step_batches import make_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def small(dropout: float = 0.0) -> Lxmert:
    config = ModelConfig(
        hidden_size=128,
        num_heads=2,
        intermediate_size=256,
        language_layers=2,
        object_layers=2,
        cross_layers=2,
        dropout=dropout,
        attention_dropout=dropout,
    )
    model = Lxmert(config)
    init_weights(model, 0)
    return model.train()


def gradients(model: Lxmert, batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """Every objective's loss, and every parameter's gradient, in fp64 on the CPU."""
    model.to(device)
    model.zero_grad()
    torch.manual_seed(0)
    out = model(batch.to(device))
    torch.stack([s / max(out.count[n], 1) for n, s in out.loss_sum.items()]).sum().backward()
    found = {f"loss {n}": s for n, s in out.loss_sum.items()}
    found |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: t.detach().cpu().double() for n, t in found.items()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest relative distance of what both have, of what is not nearly zero."""
    assert a.keys() == b.keys()
    top = max(float(t.norm()) for n, t in b.items() if not n.startswith("loss"))
    return max(float((a[n] - t).norm() / t.norm().clamp(min=1e-3 * top)) for n, t in b.items())


def ragged(pairs: int, objects: int = 36) -> Batch:
    """Images of different numbers of objects, `objects` at most."""
    from dataclasses import replace

    batch = make_batch(ModelConfig(), pairs, 1)
    wide = [getattr(batch, n) for n in ("features", "boxes")]
    wide = [w.repeat_interleave(-(-objects // 36), 1)[:, :objects] for w in wide]
    labels = {
        n: getattr(batch, n).repeat_interleave(-(-objects // 36), 1)[:, :objects]
        for n in ("object_label", "object_conf", "attribute_label", "attribute_conf")
    }
    count = torch.linspace(10, objects, len(wide[0])).long()
    keep = torch.arange(10)[None, :] + objects * torch.arange(pairs)[:, None]
    position = keep[:, ::4].flatten()
    return replace(
        batch,
        features=wide[0].contiguous(),
        boxes=wide[1].contiguous(),
        num_objects=count,
        object_position=position,
        zero_position=position[::2],
        swap_position=position[1::8],
        swap_features=torch.rand(len(position[1::8]), 2048).half(),
        **labels,
    )


@pytest.mark.parametrize("objects", [36, 100, 160], ids=str)
def test_it_is_the_cpus_model(objects: int) -> None:
    """In fp32; the last has sequences that are too long for a tile."""
    batch = ragged(12, objects)
    expected = gradients(small(), batch, CPU)
    assert distance(gradients(small(), batch, GPU), expected) < 1e-4


def test_compiled_is_eager() -> None:
    model = small()
    batches = [ragged(12), ragged(7)]
    expected = [gradients(model, batch, GPU) for batch in batches]
    compile_layers(model)
    for batch, each in zip(batches, expected, strict=True):
        assert distance(gradients(model, batch, GPU), each) < 1e-4


@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_is_near_fp32(compiled: bool) -> None:
    batch, model = ragged(12), small()
    expected = gradients(model, batch, CPU)
    if compiled:
        compile_layers(model)
    assert distance(gradients(model.bfloat16(), batch, GPU), expected) < 0.1


@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_is_drawn_from_the_seed(compiled: bool) -> None:
    batch, model = ragged(12), small(dropout=0.1)
    if compiled:
        compile_layers(model)
    gradients(model, batch, GPU)
    first, second = (gradients(model, batch, GPU) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first if n.startswith("loss"))
    assert distance(first, gradients(small(), batch, CPU)) > 1e-3


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_waits_for_the_gpu(compiled: bool) -> None:
    batch, model = ragged(12).to(GPU), small(dropout=0.1).to(GPU)
    if compiled:
        compile_layers(model)
    for mode in ("default", "error"):
        try:
            torch.cuda.set_sync_debug_mode(mode)
            out = model(batch)
            torch.stack(list(out.loss_sum.values())).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

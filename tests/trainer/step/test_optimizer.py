"""The optimizers against their formulas, and the schedule against the recipe."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from trainer.sections import OptimizerSection
from trainer.step.optimizer import BertAdam, build_optimizer, learning_rate, parameter_groups


def test_bert_adam_is_adam_without_bias_correction() -> None:
    rng = np.random.default_rng(0)
    w = rng.normal(size=5)
    parameter = nn.Parameter(torch.tensor(w))
    optimizer = BertAdam([parameter], lr=0.1, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.01)
    m = v = np.zeros(5)
    for _ in range(4):
        g = rng.normal(size=5)
        parameter.grad = torch.tensor(g)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        w = w - 0.1 * (m / (np.sqrt(v) + 1e-6) + 0.01 * w)
        np.testing.assert_allclose(parameter.detach().numpy(), w, rtol=1e-12)


def test_its_first_step_is_larger_than_corrected_adams() -> None:
    """Without correction the first update is (1 - b1) / sqrt(1 - b2) = 3.16 times Adam's."""
    steps = []
    for name in ("bert_adam", "adamw"):
        module = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            module.weight.fill_(1.0)
        section = OptimizerSection(name=name, weight_decay=0.0, eps=1e-12)
        optimizer = build_optimizer(module, section)
        optimizer.param_groups[0]["lr"] = 0.01
        module.weight.grad = torch.full((1, 1), 0.5)
        optimizer.step()
        steps.append(1.0 - float(module.weight.detach()))
    assert steps[0] / steps[1] == pytest.approx(0.1 / 0.001**0.5, rel=1e-4)


def test_groups_split_by_name_and_keep_every_parameter_once() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    groups = parameter_groups(module, OptimizerSection(weight_decay=0.2, no_decay=("bias", "1.")))
    assert [g["weight_decay"] for g in groups] == [0.2, 0.0]
    assert [len(g["params"]) for g in groups] == [1, 3]
    (everything,) = parameter_groups(module, OptimizerSection(weight_decay=0.2))
    assert len(everything["params"]) == 4


def test_the_rate_rises_to_the_peak_and_falls_to_zero() -> None:
    section = OptimizerSection(lr=2.0, warmup=0.1)
    rates = [learning_rate(section, 10 * step, 10, 1000) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[8] == pytest.approx(1.8)
    assert max(rates) == pytest.approx(2.0) and rates.index(max(rates)) == 9
    assert rates[55] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(2.0 * 10 / 900)
    assert all(r > 0 for r in rates)


def test_the_curve_does_not_depend_on_the_batch() -> None:
    section = OptimizerSection(lr=1.0, warmup=0.05)
    assert learning_rate(section, 600, 10, 1000) == learning_rate(section, 600, 50, 1000)

"""Optimizers, weight-decay groups and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.sections import OptimizerSection


class AdamW(torch.optim.AdamW):
    """torch's."""

    hold = False
    """A step does nothing, as DeepSpeed may not be kept from making one."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if not self.hold:
            super().step(closure)


class BertAdam(torch.optim.Optimizer):
    """Adam as BERT and LXMERT were trained: no bias correction, decoupled weight decay.

    update = exp_avg / (sqrt(exp_avg_sq) + eps) + weight_decay * w;  w -= lr * update
    (the optimizer of Devlin et al. 2019, `AdamWeightDecayOptimizer` in their released code).
    """

    hold = False
    """As AdamW's."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if self.hold:
            return
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                update = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group["eps"])
                p.add_(update.add_(p, alpha=group["weight_decay"]), alpha=-group["lr"])


def parameter_groups(module: nn.Module, section: OptimizerSection) -> list[dict[str, Any]]:
    """Parameters with and without weight decay, in the module's order; no empty group."""
    decay: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in module.named_parameters():
        (plain if any(part in name for part in section.no_decay) else decay).append(parameter)
    groups = [
        {"params": decay, "weight_decay": section.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def build_optimizer(module: nn.Module, section: OptimizerSection) -> AdamW | BertAdam:
    groups = parameter_groups(module, section)
    # The rate is 0 until the first step sets it: DeepSpeed makes a dry step for some stages.
    if section.name == "bert_adam":
        return BertAdam(groups, 0.0, section.betas, section.eps, section.weight_decay)
    return AdamW(groups, 0.0, section.betas, section.eps, section.weight_decay, fused=True)


def learning_rate(section: OptimizerSection, consumed: int, count: int, total: int) -> float:
    """Rate of the optimizer step that takes pairs [consumed, consumed + count) of `total`.

    Linear warm-up, then linear decay to 0, in pairs: a pure function with no state to save, and
    the same curve when the global batch changes.
    """
    warmup = section.warmup * total
    rising = (consumed + count) / warmup if warmup else 1.0
    falling = (total - consumed) / (total - warmup)
    return section.lr * min(rising, falling, 1.0)

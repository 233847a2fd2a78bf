"""The training step beside Hugging Face's: python benchmarks/train_step.py [--help]

Both models have the same weights and take the same batches in turn: forward of every objective,
backward, and torch's fused AdamW. Batches are those of step_batches.py, padded for Hugging Face's.
Before any timing, losses that both define alike are compared with dropout off.

In bf16 both have bf16 weights, and master weights and moments in fp32, as ZeRO has them. Hugging
Face's model is also run with fp32 weights under autocast (autocast), and with its attention written
as torch's scaled_dot_product_attention (which it lacks) and torch.compile over all of it (compiled;
--mode says how). Ratios are to its best one.

With --sentences of an image, "shared" is ours with sampler.share_vision of as many: the same pairs,
whose objects are masked alike for all sentences of an image.

Batches lie on the device before a step. Both are in one process, whose C library keeps the memory
that is freed (keep_freed_memory), which workers of lxscale do not have it do. Our weights lie as in
ZeRO 1 and 2; on a GPU our layers are compiled, as with train.compile=true.

Useful FLOP/s are those of model/flops.py, the same number for both, over the rate of a large
product of matrices that is measured in the same rounds. Peak memory, of a GPU alone, is what
torch's allocator has at most in a step, without what the others in the process hold. Needs torch,
transformers and pydantic; no DeepSpeed and no Ray.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterable
from copy import deepcopy as copy_of
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.batch import Batch
from model.config import ModelConfig
from model.flops import training_flops
from model.interchange import config_to_huggingface
from model.lxmert import Lxmert, compile_layers, init_weights
from model.objectives.base import LossSettings
from step_batches import make_batch, moved, padded, shared

_BATCHES = 4
"""Different ones, taken in turn."""
NAMES = {
    "theirs": "Hugging Face",
    "autocast": "Hugging Face, autocast",
    "compiled": "Hugging Face, SDPA and torch.compile",
    "shared": "lxscale, share_vision",
    "ours": "lxscale",
}


# --- steps --------------------------------------------------------------------------------------


class Optimizer:
    """Fused AdamW, on fp32 copies where the weights are bf16."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._own = list(parameters)
        low = self._own[0].dtype != torch.float32
        self._master = [p.detach().float().clone() for p in self._own] if low else self._own
        self._low = low
        self._adam = torch.optim.AdamW(self._master, lr=1e-5, weight_decay=0.01, fused=True)

    def step(self) -> None:
        if self._low:
            found = [(m, p.grad) for m, p in zip(self._master, self._own, strict=True)]
            low = {m: g for m, g in found if g is not None}
            high = [torch.empty_like(m) for m in low]
            torch._foreach_copy_(high, [*low.values()])
            for master, grad in zip(low, high, strict=True):
                master.grad = grad
        self._adam.step()
        if self._low:
            with torch.no_grad():
                torch._foreach_copy_(self._own, self._master)
        for p in (*self._own, *self._master):
            p.grad = None


def lie_flat(model: torch.nn.Module) -> None:
    """Have matrices, and vectors, beside each other in memory, as ZeRO has them."""
    for vectors in (False, True):
        own = [p for p in model.parameters() if (p.dim() < 2) == vectors]
        flat = torch.cat([p.detach().flatten() for p in own])
        for p, piece in zip(own, flat.split([p.numel() for p in own]), strict=True):
            p.data = piece.view(p.shape)


def ours(model: Lxmert, batches: list[Batch], settings: LossSettings) -> Callable[[int], None]:
    lie_flat(model)
    optimizer = Optimizer(model.parameters())
    device = next(model.parameters()).device
    ready = [b.to(device) for b in batches]
    if device.type == "cuda":
        compile_layers(model)

    def step(i: int) -> None:
        out = model(ready[i % len(ready)], settings=settings)
        torch.stack([s / max(out.count[n], 1) for n, s in out.loss_sum.items()]).sum().backward()
        optimizer.step()

    return step


def theirs(
    model: Any, batches: list[Batch], autocast: bool = False, mode: str | None = None
) -> Callable[[int], None]:
    """mode: torch.compile's; None: not compiled."""
    optimizer = Optimizer(model.parameters())
    first = next(model.parameters())
    ready = [moved(padded(b), first.device, first.dtype) for b in batches]
    forward = torch.compile(with_sdpa(model), mode=mode) if mode else model

    def step(i: int) -> None:
        with torch.autocast(first.device.type, torch.bfloat16, enabled=autocast):
            loss = forward(**ready[i % len(ready)]).loss
        loss.backward()
        optimizer.step()

    return step


def with_sdpa(model: torch.nn.Module) -> torch.nn.Module:
    """Hugging Face's model with torch's attention."""

    def attend(own: Any, x: Tensor, context: Tensor, mask: Any = None, **_: Any) -> tuple[Tensor]:
        q, k, v = (
            part(of).unflatten(-1, (own.num_attention_heads, -1)).transpose(1, 2)
            for part, of in ((own.query, x), (own.key, context), (own.value, context))
        )
        p = own.dropout.p if own.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p)
        return (out.transpose(1, 2).flatten(2),)

    for module in model.modules():
        if type(module).__name__ == "LxmertAttention":
            module.forward = types.MethodType(attend, module)
    return model


def huggingface(config: ModelConfig, model: Lxmert) -> Any:
    """Hugging Face's model with our weights."""
    tree = {k: v for k, v in config_to_huggingface(model).items() if k != "architectures"}
    found = transformers.LxmertForPreTraining(transformers.LxmertConfig(**tree))
    assert not found.load_state_dict(model.state_dict(), strict=False).missing_keys
    return found


def check_losses(model: Lxmert, peer: Any, batch: Batch) -> None:
    """SystemExit unless both have the same loss of masked words and answers with dropout off."""
    model.eval(), peer.eval()
    inputs = moved(padded(batch), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        found = model(batch)
        there = peer(**inputs)
    words, answers = there.prediction_logits, there.question_answering_score
    for name, logits, target in (
        ("masked_lm", words.flatten(0, 1), inputs["labels"].flatten()),
        ("qa", answers, inputs["ans"]),
        ("matching", there.cross_relationship_score, inputs["matched_label"]),
    ):
        mean = float(found.loss_sum[name]) / max(found.count[name], 1)
        expected = float(F.cross_entropy(logits, target))
        if abs(mean - expected) > 1e-4 * abs(expected):
            raise SystemExit(f"{name}: {mean} is not Hugging Face's {expected}")
    model.train(), peer.train()


# --- measuring ----------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Have the C library keep what this process frees: the tensors of a step on the CPU are then in
    the pages of the last one's, and not in new ones that the system has to clear."""
    # glibc's names in malloc.h; others have no mallopt.
    trim_threshold, mmap_max = -1, -4
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two large square matrices: the best of several."""
    size, times = (8192, 5) if device.type == "cuda" else (2048, 1)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        took = timed(lambda: [torch.mm(a, b) for _ in range(times)], device)
        best = max(best, times * 2 * size**3 / took)
    return best


def timed(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


@dataclass
class Contestant:
    step: Callable[[int], None]
    own: int
    """Bytes on the GPU of its weights, optimizer and batches, which it has between steps."""
    peak: int = 0
    """Bytes on the GPU at most."""
    seconds: list[float] = field(default_factory=list)
    """Of each step after the first."""


def contestants(given: argparse.Namespace, device: torch.device) -> dict[str, Contestant]:
    """Each after its first steps, which compile and warm up."""
    config = ModelConfig()
    batches = [make_batch(config, given.batch, s, given.sentences) for s in range(_BATCHES)]
    model = Lxmert(config)
    init_weights(model, 0)
    peer = huggingface(config, model)
    check_losses(model, peer, make_batch(config, min(given.batch, 32), 0))
    dtype = torch.bfloat16 if given.precision == "bf16" else torch.float32

    def copy(dtype: torch.dtype) -> Any:
        return huggingface(config, model).to(device, dtype).train()

    makers: dict[str, Callable[[], Callable[[int], None]]] = {
        "theirs": lambda: theirs(copy(dtype), batches),
        "autocast": lambda: theirs(copy(torch.float32), batches, autocast=True),
        "compiled": lambda: theirs(copy(dtype), batches, mode=given.mode),
        "shared": lambda: ours(
            copy_of(model).to(device, dtype).train(), [*map(shared, batches)], LossSettings()
        ),
        "ours": lambda: ours(model.to(device, dtype).train(), batches, LossSettings()),
    }
    found = {}
    for arm in [*given.arms, "ours"]:
        if arm == "autocast" and given.precision == "fp32":
            continue
        before = allocated(device)
        step = makers[arm]()
        began = time.perf_counter()
        for i in range(_BATCHES):
            timed(partial(step, i), device)
        print(f"{NAMES[arm]}: first steps {time.perf_counter() - began:.1f} s", file=sys.stderr)
        found[NAMES[arm]] = Contestant(step, allocated(device) - before)
    return found


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def measure(each: Contestant, i: int, device: torch.device) -> None:
    others = allocated(device) - each.own
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    each.seconds.append(timed(partial(each.step, i), device))
    if device.type == "cuda":
        each.peak = max(each.peak, torch.cuda.max_memory_allocated() - others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32, help="pairs of a step")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", choices=[*NAMES][:-1], default=["theirs", "autocast"])
    parser.add_argument("--sentences", type=int, default=2, help="of an image in a batch")
    parser.add_argument("--mode", default="default", help="torch.compile's, of Hugging Face's")
    parser.add_argument("--out", type=Path, help="a file to which the table is added")
    given = parser.parse_args()
    device = torch.device(given.device)
    dtype = torch.bfloat16 if given.precision == "bf16" else torch.float32
    keep_freed_memory()
    found = contestants(given, device)
    rates = []
    for i in range(given.rounds):
        rates.append(matrix_rate(device, dtype))
        for each in found.values():
            measure(each, i, device)
        print(f"round {i + 1} of {given.rounds}", file=sys.stderr, flush=True)
    text = report(given, found, max(rates), device)
    print(text)
    if given.out:
        with given.out.open("a") as file:
            file.write(text + "\n")


def report(
    given: argparse.Namespace, found: dict[str, Contestant], rate: float, device: torch.device
) -> str:
    config = ModelConfig()
    batches = [make_batch(config, given.batch, s, given.sentences) for s in range(_BATCHES)]
    useful = statistics.mean(training_flops(config, batch) for batch in batches)
    in_views = statistics.mean(training_flops(config, shared(batch)) for batch in batches)
    own = NAMES["shared"], NAMES["ours"]
    peers = [c for n, c in found.items() if n not in own] or [found[NAMES["ours"]]]
    best = min(statistics.median(c.seconds) for c in peers)
    where = torch.cuda.get_device_name() if device.type == "cuda" else str(device)
    lines = [
        f"{date.today()}, batch {given.batch}, {given.precision}, {where}, torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads; matrix rate "
        f"{rate / 1e9:,.0f} GFLOP/s; {useful / given.batch / 1e9:.1f} useful GFLOP a pair"
        + (f"; Hugging Face's compiled with mode {given.mode}" if "compiled" in given.arms else ""),
        "",
        "| | pairs/s | spread | ratio | of the matrix rate | peak memory, GB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, each in found.items():
        middle = statistics.median(each.seconds)
        done = in_views if name == NAMES["shared"] else useful
        peak = f"{each.peak / 1e9:.1f}" if each.peak else "-"
        lines.append(
            f"| {name} | {given.batch / middle:.2f} | {given.batch / max(each.seconds):.2f} to "
            f"{given.batch / min(each.seconds):.2f} | {best / middle:.2f} | "
            f"{done / middle / rate:.0%} | {peak} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

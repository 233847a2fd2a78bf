"""What a person on call sees: one progress line, TensorBoard scalars, a record of every step."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.config import RunConfig
from trainer.curves import Curves, curves_url
from trainer.device import peak_flops, peak_memory
from trainer.live_goodput import LiveGoodput
from trainer.profiling import Traces
from trainer.setup import run_url
from trainer.step.laps import Laps

log = logging.getLogger("lxscale")


class Progress:
    """Rank 0's view of a run. Holds open files only; `close` when the run ends."""

    def __init__(self, config: RunConfig, attempt: int, start_step: int, total_steps: int) -> None:
        self._curves = Curves(curves_url(config), attempt, start_step)
        self._goodput = LiveGoodput(run_url(config), attempt)
        steps = config.train.profile
        self._traces = Traces(steps, curves_url(config), attempt) if steps else None
        self._every = config.train.log_every
        self._total = total_steps
        self._peak = peak_flops()
        self._begin_interval()
        self._shares: dict[str, tuple[float, float]] = {}
        self._counted = 0
        self._complained = False

    def begin(self) -> None:
        """A step begins, with the wait for its data."""
        if self._traces:
            self._traces.begin()

    def step(
        self, step: int, values: Mapping[str, float], pairs: int, laps: Laps, flops: int
    ) -> None:
        """Journal a finished step: `pairs` over all ranks, `flops` of this one. Validation and
        saving are not in it. Losses are shown as means over the interval of a line: each over the
        steps that had it, those without an update left out."""
        with self._spared():
            self._curves.step(json.dumps({"step": step, "pairs": pairs, **values}))
        seconds = laps.total
        self._goodput.step(seconds)
        if self._traces:
            self._traces.end(step)
        for name, value in values.items():
            if name.split("/")[0] == "loss":
                self._losses[name].append(value)
        self._pairs += pairs
        self._seconds += seconds
        self._flops += flops
        self._steps += 1
        for name, lap in laps.seconds.items():
            self._laps[name] += lap
        if step % self._every and step != self._total:
            return
        rate = self._pairs / max(self._seconds, 1e-9)
        speed = self._speed(rate)
        values = {**values, **{name: _mean(found) for name, found in self._losses.items()}}
        self._begin_interval()
        with self._spared():
            scalars = {f"train/{name}": value for name, value in values.items()}
            for name, (planned, counted) in self._shares.items():
                scalars[f"share/{name}/planned"] = planned
                scalars[f"share/{name}/actual"] = counted / self._counted
            self._curves.scalars(scalars | speed | self._goodput.scalars(), step)
        losses = " ".join(
            f"{name.removeprefix('loss/')} {value:.3f}"
            for name, value in values.items()
            if name.startswith("loss/")
        )
        log.info(
            "step %d/%d | %s | lr %.2e | %.0f pairs/s | left %s",
            step,
            self._total,
            losses,
            values["lr"],
            rate,
            _duration((self._total - step) * (pairs / max(rate, 1e-9))),
        )

    def _begin_interval(self) -> None:
        """Count anew: what is shown is of the steps since the last line."""
        self._steps, self._pairs, self._seconds, self._flops = 0, 0, 0.0, 0
        self._losses: defaultdict[str, list[float]] = defaultdict(list)
        self._laps: defaultdict[str, float] = defaultdict(float)

    def _speed(self, rate: float) -> dict[str, float]:
        """rate: pairs per second."""
        seconds = max(self._seconds, 1e-9)
        flops = self._flops / seconds
        scalars = {f"step_seconds/{name}": s / self._steps for name, s in self._laps.items()}
        scalars["speed/pairs_per_second"] = rate
        scalars["speed/share_waiting_for_data"] = self._laps["data"] / seconds
        scalars["speed/model_tflops_per_second"] = flops / 1e12
        if self._peak:
            scalars["speed/share_of_device_peak"] = flops / self._peak
        scalars["memory/peak_gib"] = peak_memory() / 2**30
        return scalars

    def mixture(self, planned: Mapping[str, float], pairs: list[float], count: int) -> None:
        """Count a step's pairs towards the mixture of this attempt; `step` shows it."""
        self._counted += count
        for name, share, n in zip(planned, planned.values(), pairs, strict=True):
            self._shares[name] = (share, self._shares.get(name, (share, 0.0))[1] + n)

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        with self._spared():
            scalars = {f"validation/{name}": value for name, value in metrics.items()}
            self._curves.scalars(scalars, step)
        log.info("validation at step %d | %s", step, format_metrics(metrics))

    def publish(self) -> None:
        """Have the curves so far in the run's storage."""
        self._curves.publish()

    def close(self) -> None:
        if self._traces:
            self._traces.close()
        with self._spared():
            self._curves.close()

    @contextlib.contextmanager
    def _spared(self) -> Iterator[None]:
        """Curves are worth no run: where the disk is full, say so once and train on."""
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: closed after the first
            if not self._complained:
                self._complained = True
                log.error("curves cannot be written, training goes on: %s", error)


def _mean(values: Sequence[float]) -> float:
    """Of those that are finite, where any are."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else values[-1]


def some_of(names: Sequence[str], most: int = 12) -> str:
    """Names for a line: `most` of them, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def format_metrics(metrics: Mapping[str, Any]) -> str:
    return " ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}"

"""Draw the curves of a run from its TensorBoard events: python docs/plot_run.py RUN OUT.png

Needs matplotlib, which nothing else here does: pip install matplotlib
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PANELS = {
    "held-out QA accuracy": ["validation/accuracy/qa"],
    "training loss": ["train/loss/qa", "train/loss/masked_lm", "train/loss/matching"],
    "pairs per second": ["speed/pairs_per_second"],
}


def main(run: Path, out: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    figure, axes = plt.subplots(1, len(PANELS), figsize=(12, 3.2), constrained_layout=True)
    for axis, (title, tags) in zip(axes, PANELS.items(), strict=True):
        for tag in tags:
            points = events.Scalars(tag)
            axis.plot([p.step for p in points], [p.value for p in points], label=tag.split("/")[-1])
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""What a run says of its steps beside their losses: the gradients' norm, and a trace on request."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shards.format.build import BuildSettings, build
from tests.conftest import small_records
from tests.ranks import config_tree, run_ranks, step_record

OFF = {"dropout": 0.0, "attention_dropout": 0.0}


def test_the_norm_is_that_of_the_whole_gradient_and_a_trace_is_written(tmp_path: Path) -> None:
    """At every ZeRO stage and strict, by two ranks, with clipping and without it."""
    data = tmp_path / "set"
    build(small_records(20), data, BuildSettings("profile", "test", images_per_shard=8))

    def tree(name: str, clip: float, **train: Any) -> dict[str, Any]:
        train = {"steps": 3, "accumulation": 1, **train}
        return config_tree(
            data, tmp_path, name, train=train, model=OFF, optimizer={"clip_norm": clip}
        )

    jobs = {f"zero-{s}": tree(f"zero-{s}", 0.5, zero_stage=s) for s in range(4)}
    jobs["strict"] = tree("strict", 0.5, strict=4)
    jobs["free"] = tree("free", 0.0)
    jobs["traced"] = tree("traced", 0.5, steps=9, profile=2)
    assert not run_ranks(2, [(job, None, False) for job in jobs.values()])
    norms = {
        name: [values["gradient_norm"] for values in step_record(job).values()]
        for name, job in jobs.items()
    }
    assert all(norm > 0.5 for norm in norms["zero-1"]), "clipping would not show"
    for name, found in norms.items():
        # After the first step an update by clipped gradients is another one.
        steps = slice(0, 1) if name in ("free", "traced") else slice(None)
        assert found[steps] == pytest.approx(norms["zero-1"][steps], rel=1e-4), name

    events = EventAccumulator(str(tmp_path / "traced" / "tensorboard")).Reload()
    shown = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    parts = ("data", "agreement", "copy", "forward", "backward", "reduce", "update")
    assert all(shown[f"step_seconds/{part}"] > 0 for part in parts)
    assert shown["speed/model_tflops_per_second"] > 0 and shown["memory/peak_gib"] > 0.1
    assert "speed/share_of_device_peak" not in shown  # of a CPU that is not known

    (path,) = (tmp_path / "traced" / "tensorboard").glob("*.pt.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps_of = {e["name"] for e in events if str(e.get("name")).startswith("ProfilerStep")}
    assert len(steps_of) == 2
    assert any("addmm" in str(e.get("name")) for e in events)

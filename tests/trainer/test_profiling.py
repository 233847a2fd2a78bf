"""What a run says of its steps beside their losses: the gradients' norm, and a trace on request."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shards.format.build import BuildSettings, build
from tests.conftest import small_records
from tests.ranks import config_tree, run_ranks, step_record
from trainer.profiling import Traces

OFF = {"dropout": 0.0, "attention_dropout": 0.0}


def names_in(trace: Path) -> list[str]:
    """Of the events of a trace."""
    found = json.loads(gzip.decompress(trace.read_bytes()))
    return [str(event.get("name")) for event in found["traceEvents"]]


def test_the_norm_is_that_of_the_whole_gradient_and_traces_are_written(tmp_path: Path) -> None:
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

    paths = sorted((tmp_path / "traced" / "tensorboard").glob("*.pt.trace.json.gz"))
    steps_of = [path.name for path in paths]
    assert steps_of == [f"profile-a000001-s00000000{i}.pt.trace.json.gz" for i in (6, 7)]
    for path in paths:
        names = names_in(path)
        # Of one step, and no validation: that has two forwards and no backward.
        assert names.count("_GroupedBackward") == names.count("_Grouped") == 5


def test_a_trace_grows_with_its_step_alone_and_what_cannot_be_written_is_said_once(
    tmp_path: Path, said: list[logging.LogRecord]
) -> None:
    """A worker that says nothing for 15 s is taken for dead: 400 steps in one trace were."""
    traces = Traces(30, str(tmp_path / "curves"), 1)
    (tmp_path / "curves").mkdir()
    for step in range(1, 50):
        traces.begin()
        torch.ones(2).add(1)
        traces.end(step)
        torch.ones(4, 4) @ torch.ones(4, 4)  # a validation
    traces.close()
    paths = sorted((tmp_path / "curves").iterdir())
    assert [p.name for p in paths] == [
        f"profile-a000001-s{step:09d}.pt.trace.json.gz" for step in range(6, 36)
    ]
    for path in paths:
        names = names_in(path)
        assert names.count("aten::add") == 1 and "aten::mm" not in names

    (tmp_path / "file").write_text("")
    traces = Traces(9, str(tmp_path / "file"), 1)
    for step in range(1, 20):
        traces.begin()
        traces.end(step)
    traces.close()
    assert len([r for r in said if "a trace cannot be written" in r.getMessage()]) == 1

    few = Traces(9, str(tmp_path / "curves"), 2)
    few.begin()
    few.end(1)
    few.close()
    assert "no trace: too few steps" in said[-1].getMessage()

"""A run goes on with the version of the order that it began with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shards.dataset import open_dataset
from shards.format.build import BuildSettings, build
from tests.conftest import small_records
from tests.ranks import config_tree, run_ranks
from trainer.audit import audit
from trainer.checkpoint.format import manifest_bytes
from trainer.checkpoint.generations import find_generation
from trainer.checkpoint.journal import read_segments
from trainer.config import parse_config
from trainer.data.batch import make_batch
from trainer.data.digest import digest
from trainer.evaluate import Evaluation, evaluate, without_gradient
from trainer.model import load_checkpoint
from trainer.predict import evaluate_checkpoint
from trainer.setup import batch_settings, resolve_objectives

STEPS = 9


@pytest.mark.parametrize("version", [2, pytest.param(3, marks=pytest.mark.faults)])
def test_a_run_keeps_its_order(tmp_path: Path, version: int) -> None:
    build(small_records(31), tmp_path / "set", BuildSettings("order", "test", images_per_shard=7))
    sampler = {"mode": "balanced", "window": 2}
    train = {"steps": STEPS, "validation_batch": 7}
    validation = {"validation": str(tmp_path / "set")}
    tree = config_tree(
        tmp_path / "set", tmp_path, "run", data=validation, train=train, sampler=sampler
    )
    assert not run_ranks(1, [(tree, 4, False)])
    generation = find_generation(str(tmp_path / "run"))
    done = generation.step
    # As a run of that version leaves it: nothing else of the state depends on it.
    state = dict(generation.manifest.data_state) | {"order": version}
    del state["data.text"], state["sampler.lanes"]
    path = tmp_path / "run" / "checkpoints" / generation.name
    path.write_bytes(manifest_bytes(replace(generation.manifest, data_state=state)))
    assert not run_ranks(2, [(tree, None, False)])

    end = find_generation(str(tmp_path / "run"))
    heads = [h for h, _ in read_segments(str(tmp_path / "run"), end.manifest.journal)]
    assert heads[-1].data_state["order"] == end.manifest.data_state["order"] == version
    lines = [
        x for _, part in read_segments(str(tmp_path / "run"), end.manifest.journal) for x in part
    ]
    config = parse_config(tree, "test")
    data = open_dataset(str(tmp_path / "set"), tmp_path / "cache")
    order = data.sampler(config.sampler, config.run.seed, version)
    drawn = batch_settings(config, data, version)
    steps = order.steps_ahead(generation.manifest.sampler, 13, STEPS * 13)
    expected = [
        digest(make_batch(data, order, order.plan(step), drawn), step.before.consumed)
        for step in steps
    ]
    assert len(expected) == STEPS - done > 2
    assert [line.digest for line in lines[done:]] == expected
    found = audit(str(tmp_path / "run"), cache=str(tmp_path / "cache"))
    assert version == 2 or found.problems == []

    # Validations, too, are of the run's version, whoever makes them.
    metrics = evaluate_checkpoint(str(tmp_path / "run"), str(tmp_path / "set"))
    metrics = {name: value for name, value in metrics.items() if name.count("/") == 1}
    assert validated(tmp_path / "run") == pytest.approx(metrics, rel=1e-4)
    model, config, _ = load_checkpoint(str(tmp_path / "run"))
    task = Evaluation(data, drawn, frozenset(resolve_objectives(config, data)), 20)
    forward = without_gradient(model.eval(), torch.device("cpu"), config.objectives.losses())
    assert evaluate(forward, task) == pytest.approx(metrics, rel=1e-4)
    other = replace(task, batch=replace(drawn, order=5 - version))
    assert evaluate(forward, other)["loss/masked_lm"] != pytest.approx(
        metrics["loss/masked_lm"], rel=1e-4
    )


def validated(run: Path) -> dict[str, float]:
    """The metrics of a run's last validation."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = [t for t in events.Tags()["scalars"] if t.startswith("validation/")]
    return {t.removeprefix("validation/"): events.Scalars(t)[-1].value for t in tags}

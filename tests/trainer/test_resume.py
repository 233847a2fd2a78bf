"""A run that was killed and went on is the run that was not: bitwise at the same world size."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.format.build import BuildSettings, build
from tests.conftest import small_records
from tests.ranks import config_tree, run_ranks, step_record
from trainer.checkpoint.format import KINDS, Span
from trainer.checkpoint.generations import (
    Generation,
    find_generation,
    generations,
    read_fragments,
)
from trainer.export import export_huggingface

CASES = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
SOME = [(0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with questions, captions and labels, whose pairs divide by nothing."""
    folder = tmp_path_factory.mktemp("data") / "set"
    settings = BuildSettings("resume", "test", images_per_shard=7)
    build(small_records(31, labels=True), folder, settings)
    return folder


def state_of(run: Path | str) -> tuple[Generation, dict[str, dict[str, np.ndarray]]]:
    """The newest generation and every parameter's master and moments, whole."""
    generation = find_generation(str(run))
    shapes = generation.manifest.parameters
    wanted = [Span(name, 0, int(np.prod(shape))) for name, shape in shapes.items()]
    state: dict[str, dict[str, np.ndarray]] = {
        name: {k: np.full(length, np.nan, np.float32) for k in KINDS} for name, _, length in wanted
    }
    for i, start, values in read_fragments(generation, wanted):
        for kind, part in values.items():
            state[wanted[i].name][kind][start : start + len(part)] = part
    return generation, state


def assert_bitwise(a: Path | str, b: Path | str) -> None:
    (one, state_a), (two, state_b) = state_of(a), state_of(b)
    assert one.step == two.step and one.manifest.sampler == two.manifest.sampler
    assert state_a.keys() == state_b.keys()
    for name, kinds in state_a.items():
        for kind, values in kinds.items():
            assert np.isfinite(values).all(), (name, kind)
            assert values.tobytes() == state_b[name][kind].tobytes(), (name, kind)


def losses(tree: dict[str, Any]) -> dict[int, dict[str, float]]:
    return {
        step: {k: v for k, v in entry.items() if k.startswith("loss")}
        for step, entry in step_record(tree).items()
    }


@pytest.mark.parametrize(
    "cases", [SOME, pytest.param(CASES, marks=pytest.mark.faults)], ids=["some", "all"]
)
def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(
    data: Path, tmp_path: Path, cases: list[tuple[int, str]]
) -> None:
    """ZeRO 0-3, fp32 and bf16, accumulation 2, dropout on; kill -9 at step 5 of 8."""

    def tree(kind: str, stage: int, precision: str) -> dict[str, Any]:
        settings = {"zero_stage": stage, "precision": precision}
        return config_tree(data, tmp_path, f"{kind}-{stage}-{precision}", train=settings)

    assert not run_ranks(2, [(tree("whole", *case), None, False) for case in cases])
    for case in cases:
        run_ranks(2, [(tree("killed", *case), 5, True)])
    assert not run_ranks(2, [(tree("killed", *case), None, False) for case in cases])
    for stage, precision in cases:
        whole, killed = tree("whole", stage, precision), tree("killed", stage, precision)
        name = f"{stage}-{precision}"
        assert_bitwise(tmp_path / f"whole-{name}", tmp_path / f"killed-{name}")
        assert losses(whole) == losses(killed), name
        assert len(losses(whole)) == 8


def test_any_step_may_be_the_last_before_a_stop(data: Path, tmp_path: Path) -> None:
    """A clean stop after each step in turn; every new start goes on where the last one ended."""
    whole = config_tree(data, tmp_path, "whole")
    parts = config_tree(data, tmp_path, "parts")
    jobs = [(parts, 1, False)] * 8
    assert not run_ranks(2, [(whole, None, False), *jobs, (parts, None, False)])
    assert_bitwise(tmp_path / "whole", tmp_path / "parts")
    assert losses(whole) == losses(parts)


@pytest.mark.parametrize(
    "before, after",
    [(2, 1), *(pytest.param(*p, marks=pytest.mark.faults) for p in ((1, 2), (2, 3)))],
)
def test_another_world_size_goes_on_with_the_pairs_that_follow(
    data: Path, tmp_path: Path, before: int, after: int
) -> None:
    """Dropout off; losses agree with the uninterrupted run to 1e-5, from any ZeRO stage to
    another."""
    off = {"dropout": 0.0, "attention_dropout": 0.0}
    stages = [(0, 2), (1, 1), (2, 3), (3, 0)]

    def tree(kind: str, stage: int) -> dict[str, Any]:
        return config_tree(data, tmp_path, kind, train={"zero_stage": stage}, model=off)

    whole = tree("whole", 1)
    assert not run_ranks(before, [(whole, None, False)])
    assert not run_ranks(before, [(tree(f"run-{a}", a), 3, False) for a, _ in stages])
    assert not run_ranks(after, [(tree(f"run-{a}", b), None, False) for a, b in stages])
    expected = losses(whole)
    for a, b in stages:
        found = losses(tree(f"run-{a}", b))
        for step in range(1, 9):
            for name, value in expected[step].items():
                assert found[step][name] == pytest.approx(value, rel=1e-5), (a, b, step, name)
        one, two = (
            find_generation(str(tmp_path / "whole")),
            find_generation(str(tmp_path / f"run-{a}")),
        )
        assert one.manifest.sampler == two.manifest.sampler
        assert two.manifest.world_size == after


def test_a_finished_run_has_nothing_left_to_do(data: Path, tmp_path: Path) -> None:
    tree = config_tree(data, tmp_path, "run")
    assert not run_ranks(1, [(tree, None, False), (tree, None, False)])
    found = generations(str(tmp_path / "run"))
    assert [g.step for g in found if isinstance(g, Generation)] == [8, 6, 3]


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.faults)])
def test_initial_weights_may_be_gone_once_there_is_a_checkpoint(
    data: Path, tmp_path: Path, precision: str
) -> None:
    first, weights = config_tree(data, tmp_path, "first"), tmp_path / "weights"
    assert not run_ranks(1, [(first, 1, False)])
    export_huggingface(str(tmp_path / "first"), weights)

    def tree(name: str) -> dict[str, Any]:
        train = {"init_from": str(weights), "precision": precision}
        return config_tree(data, tmp_path, name, train=train)

    assert not run_ranks(2, [(tree("whole"), None, False), (tree("run"), 3, False)])
    shutil.rmtree(weights)
    assert not run_ranks(2, [(tree("run"), None, False)])
    assert_bitwise(tmp_path / "whole", tmp_path / "run")
    # A run without a checkpoint needs them as ever.
    (error,) = run_ranks(1, [(tree("another"), None, False)])
    assert error.startswith("ModelError") and "weights" in error


def test_a_damaged_generation_is_passed_over_and_none_whole_is_an_error(
    data: Path, tmp_path: Path
) -> None:
    tree = config_tree(data, tmp_path, "run")
    assert not run_ranks(1, [(tree, 6, False)])
    objects = sorted((tmp_path / "run/checkpoints/objects").glob("step-00000006-*"))
    raw = bytearray(objects[0].read_bytes())
    raw[len(raw) // 2] ^= 1
    objects[0].write_bytes(raw)
    assert not run_ranks(1, [(tree, None, False)])
    assert find_generation(str(tmp_path / "run")).step == 8
    whole = config_tree(data, tmp_path, "whole")
    assert not run_ranks(1, [(whole, None, False)])
    assert_bitwise(tmp_path / "whole", tmp_path / "run")
    for path in (tmp_path / "run/checkpoints/objects").iterdir():
        path.write_bytes(b"torn")
    (error,) = run_ranks(1, [(tree, None, False)])
    assert error.startswith("CheckpointError: no generation of") and "is damaged" in error


def test_a_generation_that_was_read_in_part_leaves_nothing_behind(
    data: Path, tmp_path: Path
) -> None:
    """Rank 0's object is whole and has been loaded when rank 1 finds its own damaged: moments and
    Adam's count of steps are those of the generation before all the same."""
    tree, whole = config_tree(data, tmp_path, "run"), config_tree(data, tmp_path, "whole")
    assert not run_ranks(2, [(tree, 6, False), (whole, None, False)])
    (path,) = (tmp_path / "run/checkpoints/objects").glob("step-00000006-*-r00001-*")
    path.write_bytes(b"torn")
    assert not run_ranks(2, [(tree, None, False)])
    assert_bitwise(tmp_path / "whole", tmp_path / "run")


def test_another_model_or_data_state_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    tree = config_tree(data, tmp_path, "run")
    assert not run_ranks(1, [(tree, 2, False)])
    other = config_tree(data, tmp_path, "run", model={"hidden_size": 32})
    (error,) = run_ranks(1, [(other, None, False)])
    assert error.startswith("CheckpointError") and "checkpoint of another model" in error
    moved = config_tree(data, tmp_path, "run", sampler={"window": 1})
    (error,) = run_ranks(1, [(moved, None, False)])
    assert "ConfigError" in error and "sampler.window: checkpoint 0, now 1" in error
    going_on = {"every": 3, "override_data_state": True}
    moved = config_tree(data, tmp_path, "run", sampler={"window": 1}, checkpoint=going_on)
    assert not run_ranks(1, [(moved, None, False)])


def test_a_changed_global_batch_resumes_at_the_same_pair(data: Path, tmp_path: Path) -> None:
    tree = config_tree(data, tmp_path, "run", train={"steps": None, "epochs": 1.5})
    assert not run_ranks(2, [(tree, 2, False)])
    first = find_generation(str(tmp_path / "run"))
    assert first.manifest.sampler.consumed == 26
    grown = config_tree(
        data, tmp_path, "run", train={"steps": None, "epochs": 1.5, "global_batch": 20}
    )
    assert not run_ranks(1, [(grown, None, False)])
    steps = step_record(grown)
    pairs = round(1.5 * sum(e["pairs"] for e in steps.values()) / 1.5)
    last = find_generation(str(tmp_path / "run"))
    assert last.manifest.sampler.consumed == pairs
    assert steps[3]["pairs"] == 20


def test_qa_joins_at_its_epoch(data: Path, tmp_path: Path) -> None:
    tree = config_tree(
        data, tmp_path, "run", objectives={"qa_from_epoch": 0.5}, train={"steps": None, "epochs": 1}
    )
    assert not run_ranks(1, [(tree, None, False)])
    has_qa = ["loss/qa" in entry for _, entry in sorted(step_record(tree).items())]
    assert not has_qa[0] and has_qa[-1] and has_qa == sorted(has_qa)

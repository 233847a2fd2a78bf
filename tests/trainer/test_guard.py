"""Steps whose loss or gradients are not finite: no update on any rank, under any stage, and no
generation of what is not finite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards.dataset import open_dataset
from shards.format.build import BuildSettings, build
from tests.conftest import small_records
from tests.ranks import config_tree, run_ranks, step_record
from tests.trainer.test_resume import losses, state_of
from trainer.checkpoint.format import KINDS, Span
from trainer.checkpoint.journal import read_segments
from trainer.checkpoint.saver import Snapshot, not_finite
from trainer.checkpoint.zero_state import list_fragments, read, refresh_weights, write
from trainer.config import parse_config
from trainer.step.guard import skip_report

CASES = [
    (stage, precision, clip)
    for stage in (0, 1, 2, 3)
    for precision in ("fp32", "bf16")
    for clip in (1.0, 0.0)
]
BAD = {1: "gradient", 3: "loss", 4: "norm", 6: "nan"}
"""What is wrong with which step, the first included."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard") / "set"
    settings = BuildSettings("guard", "test", images_per_shard=2)
    build(small_records(31, labels=True), folder, settings)
    return folder


# --- what happens in the ranks ------------------------------------------------------------------


class _Factors(torch.autograd.Function):
    """A loss and its gradient, each times a factor."""

    @staticmethod
    def forward(ctx: Any, loss: Any, of_loss: float, of_gradient: float) -> Any:
        ctx.factor = of_gradient
        return loss * of_loss

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient * ctx.factor, None, None


FACTORS = {
    "nan": (np.nan, np.nan),
    "loss": (np.inf, 1.0),
    "gradient": (1.0, np.inf),
    # Every element is finite, the norm's square is not in fp32.
    "norm": (1.0, 1e25),
}


def _in_steps(steps: dict[int, str], around: Callable[..., Any]) -> None:
    """Have `around(make_step, run, kind)` make those steps of the run."""
    import trainer.loop

    real = trainer.loop.step

    def step(run: Any, state: Any, *rest: Any) -> Any:
        make = partial(real, run, state, *rest)
        kind = steps.get(state.step + 1)
        return around(make, run, kind) if kind else make()

    trainer.loop.step = step  # type: ignore[assignment]


def spoil(steps: dict[int, str], _rank: int, only: int | None = None) -> None:
    """Spoil the first micro-batch's loss in some steps, on one rank or all; nothing may change."""

    def spoiled(make: Callable[[], Any], run: Any, kind: str) -> Any:
        seen = 0

        def hook(_module: Any, _inputs: Any, out: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen > 1:
                return out
            return replace(
                out,
                loss_sum={n: _Factors.apply(v, *FACTORS[kind]) for n, v in out.loss_sum.items()},
            )

        before = _everything(run.engine)
        handle = None
        if only is None or run.part.rank == only:
            handle = run.engine.module.register_forward_hook(hook)
        try:
            after = make()
        finally:
            if handle:
                handle.remove()
        for key, value in _everything(run.engine).items():
            assert value.tobytes() == before[key].tobytes(), f"{kind} changed {key}"
        return after

    _in_steps(steps, spoiled)


def leave_out(steps: dict[int, str], _rank: int) -> None:
    """Make some steps and undo their updates: as if Adam had not had them."""

    def undone(make: Callable[[], Any], run: Any, _kind: str) -> Any:
        engine, fragments = run.engine, list_fragments(run.engine)
        held = [{k: read(engine, f, k).clone() for k in KINDS} for f in fragments]
        counts = [_count(engine, f.holder) for f in fragments]
        after = make()
        for fragment, kinds, count in zip(fragments, held, counts, strict=True):
            for kind, values in kinds.items():
                write(engine, fragment, kind, values, count)
        refresh_weights(engine)
        return after

    _in_steps(steps, undone)


def poison(step: int, _rank: int) -> None:
    """After a step, make one weight's second moment infinite on the last rank."""

    def poisoned(make: Callable[[], Any], run: Any, _kind: str) -> Any:
        after = make()
        if run.part.rank == run.part.world - 1:
            fragment = next(f for f in list_fragments(run.engine))
            read(run.engine, fragment, "exp_avg_sq")[0] = np.inf
        return after

    _in_steps({step: "poison"}, poisoned)


def _everything(engine: Any) -> dict[str, np.ndarray]:
    """The weights of the forward as this rank holds them, masters, moments, Adam's counts."""
    out = {}
    for name, p in engine.module.named_parameters():
        out[name] = getattr(p, "ds_tensor", p).detach().float().numpy().copy()
    for i, fragment in enumerate(list_fragments(engine)):
        for kind in KINDS:
            out[f"{fragment.span} {i} {kind}"] = read(engine, fragment, kind).numpy().copy()
        out[f"{fragment.span} {i} count"] = np.asarray(_count(engine, fragment.holder))
    return out


def _count(engine: Any, holder: Any) -> int:
    return int(engine.basic_optimizer.state.get(holder, {}).get("step", 0))


# --- tests --------------------------------------------------------------------------------------


def tree(
    data: Path, storage: Path, kind: str, case: tuple[int, str, float], **sections: Any
) -> dict[str, Any]:
    stage, precision, clip = case
    train = {"zero_stage": stage, "precision": precision, **sections.pop("train", {})}
    optimizer = {"clip_norm": clip}
    name = f"{kind}-{stage}-{precision}-{clip:g}"
    return config_tree(data, storage, name, train=train, optimizer=optimizer, **sections)


def assert_same_state(a: Path, b: Path) -> None:
    (one, state_a), (two, state_b) = state_of(a), state_of(b)
    assert one.step == two.step and one.manifest.sampler == two.manifest.sampler
    for name, kinds in state_a.items():
        for kind, values in kinds.items():
            assert np.isfinite(values).all(), (name, kind)
            assert values.tobytes() == state_b[name][kind].tobytes(), (name, kind)


@pytest.mark.parametrize(
    "cases",
    [
        [(0, "fp32", 1.0), (1, "bf16", 0.0), (3, "fp32", 0.0), (3, "bf16", 1.0)],
        pytest.param(CASES, marks=pytest.mark.faults),
    ],
    ids=["some", "all"],
)
def test_a_bad_step_is_left_out(
    data: Path, tmp_path: Path, cases: list[tuple[int, str, float]]
) -> None:
    """One rank's loss, gradient or norm is not finite: no rank changes a weight, moment or count,
    and the steps after are those of a run whose Adam never had these."""
    made = partial(tree, data, tmp_path)
    spoiled = [(made("spoiled", case), None, False) for case in cases]
    reference = [(made("reference", case), None, False) for case in cases]
    assert not run_ranks(2, spoiled, prepare=partial(spoil, BAD, only=1))
    assert not run_ranks(2, reference, prepare=partial(leave_out, BAD))
    for (run, *_), (other, *_) in zip(spoiled, reference, strict=True):
        name, other_name = run["run"]["name"], other["run"]["name"]
        assert_same_state(tmp_path / name, tmp_path / other_name)
        found, expected = losses(run), losses(other)
        assert [found[s] for s in (2, 5, 7, 8)] == [expected[s] for s in (2, 5, 7, 8)], name
        generation, _ = state_of(tmp_path / name)
        assert generation.manifest.skipped_updates == 4
        segments = read_segments(str(tmp_path / name), generation.manifest.journal)
        assert [line.step for _, lines in segments for line in lines] == list(range(1, 9))
        counts = [entry["skipped_updates"] for _, entry in sorted(step_record(run).items())]
        assert counts == [1, 1, 2, 3, 3, 4, 4, 4]


@pytest.mark.faults
def test_a_run_goes_on_across_bad_steps_bitwise(data: Path, tmp_path: Path) -> None:
    """Killed after two, stopped at one; Adam's bias correction counts updates, not steps."""
    bad = partial(spoil, {2: "nan", 5: "norm"})
    whole, killed, stopped = (
        config_tree(data, tmp_path, name, checkpoint={"every": 1, "keep": 10})
        for name in ("whole", "killed", "stopped")
    )
    assert not run_ranks(2, [(whole, None, False), (stopped, 5, False)], prepare=bad)
    # The step without an update is made again: the newest generation is one before it.
    assert state_of(tmp_path / "stopped")[0].step == 4
    run_ranks(2, [(killed, 6, True)], prepare=bad)
    assert not run_ranks(2, [(killed, None, False), (stopped, None, False)], prepare=bad)
    assert_same_state(tmp_path / "whole", tmp_path / "killed")
    assert_same_state(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.faults
@pytest.mark.parametrize("after", [0, 2, 3])
def test_a_run_goes_on_across_bad_steps_at_another_stage(
    data: Path, tmp_path: Path, after: int
) -> None:
    bad = partial(spoil, {1: "nan", 5: "norm"})
    whole = config_tree(data, tmp_path, "whole", train={"zero_stage": 1})
    moved = [config_tree(data, tmp_path, "moved", train={"zero_stage": s}) for s in (1, after)]
    jobs = [(whole, None, False), (moved[0], 3, False), (moved[1], None, False)]
    assert not run_ranks(2, jobs, prepare=bad)
    found, expected = losses(moved[1]), losses(whole)
    for step in (2, 3, 4, 6, 7, 8):
        for name, value in expected[step].items():
            assert found[step][name] == pytest.approx(value, rel=1e-5), (step, name)


def test_too_many_in_a_row_end_the_run_and_leave_the_last_good_generation(
    data: Path, tmp_path: Path
) -> None:
    run = config_tree(
        data,
        tmp_path,
        "run",
        train={"max_skipped_updates": 2},
        checkpoint={"every": 1, "keep": 1},
    )
    bad = partial(spoil, {2: "nan", 5: "nan", 6: "loss", 7: "gradient"}, only=0)
    for _ in range(2):  # the same command tries again from there
        one, two = run_ranks(2, [(run, None, False)], prepare=bad)
        assert one == two
        assert one.startswith("DivergedError: loss or gradients are not finite in steps 5 to 7")
        assert "pairs [52, 91)" in one and "train.max_skipped_updates" in one
        generation, state = state_of(tmp_path / "run")
        assert generation.step == 4 and generation.manifest.skipped_updates == 1
        assert all(np.isfinite(v).all() for kinds in state.values() for v in kinds.values())
    parsed = parse_config(run, "test")
    opened = open_dataset(parsed.data.specs(), parsed.data.cache)
    sampler = opened.sampler(parsed.sampler, parsed.run.seed)
    steps = list(sampler.steps_ahead(sampler.start(), 13, 8 * 13))[4:7]
    held = {int(s) for step in steps for s in sampler.plan(step).shard}
    named = [i for i, file in enumerate(opened.shards.files) if file.url in one]
    assert len(held) > 12 and f" and {len(held) - 12} more:" in one
    assert len(named) == 12 and set(named) <= held
    # Without them it ends well.
    assert not run_ranks(2, [(run, None, False)])


def test_what_is_not_finite_is_never_committed(data: Path, tmp_path: Path) -> None:
    run = config_tree(data, tmp_path, "run", checkpoint={"every": 2, "keep": 1})
    errors = run_ranks(2, [(run, None, False)], prepare=partial(poison, 4))
    generation, state = state_of(tmp_path / "run")
    assert generation.step == 2
    assert all(np.isfinite(v).all() for kinds in state.values() for v in kinds.values())
    assert len(errors) == 2 and errors[0] == errors[1]
    assert errors[0].startswith("DivergedError: weights or moments are not finite after step 4, of")
    assert not run_ranks(2, [(run, None, False)])


def test_parameters_that_are_not_finite_are_named() -> None:
    spans = (Span("a", 0, 3), Span("b", 0, 2), Span("c", 4, 2))
    largest = np.finfo(np.float32).max
    arrays = {kind: np.full(7, largest, np.float32) for kind in KINDS}
    assert not_finite(Snapshot(spans, arrays)) == []
    arrays["exp_avg"][4] = -np.inf
    arrays["exp_avg_sq"][:2] = np.inf, -np.inf
    assert not_finite(Snapshot(spans, arrays)) == ["a", "b"]
    arrays["master"][6] = np.nan
    assert not_finite(Snapshot(spans, arrays)) == ["a", "b", "c"]


def test_the_line_says_which_losses() -> None:
    losses = {"qa": np.nan, "masked_lm": 2.5, "matching": -np.inf}
    assert skip_report(17, losses, 3, 2) == (
        "step 17: loss or gradients are not finite (qa=nan matching=-inf), its update is skipped "
        "(3 in all, 2 in a row)"
    )
    assert "(the gradients, every loss is finite)" in skip_report(17, {"qa": 1.0}, 3, 2)

"""What ranks agree on about a step: when they do, and what follows from what they want."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from shards.format.build import BuildSettings, build
from tests.conftest import small_records
from tests.ranks import config_tree, run_ranks
from trainer.checkpoint.generations import find_generation
from trainer.step.sync import Verdict, Wants, verdict

BATCH, STEPS = 8, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sync") / "set"
    build(small_records(20), folder, BuildSettings("sync", "test"))
    return folder


def _tree(data: Path, storage: Path) -> dict[str, Any]:
    return config_tree(data, storage, "run", train={"steps": STEPS, "global_batch": BATCH})


def _told(log: Path, rank: int) -> None:
    """Write down when a step's sync is begun, when it is waited for and when the step is made."""
    import trainer.loop as loop
    import trainer.run as run

    begin_sync, step = run.begin_sync, loop.step

    def say(what: str, number: int) -> None:
        with open(f"{log}-{rank}", "a") as f:
            print(what, number, file=f)

    def begun(loaded: Any, *rest: Any) -> Any:
        number = loaded.step.before.consumed // BATCH + 1
        say("begun", number)
        synced = begin_sync(loaded, *rest)

        def waited() -> Any:
            say("waited", number)
            return synced()

        return waited

    def made(of: Any, state: Any, *rest: Any) -> Any:
        say("made", state.step + 1)
        return step(of, state, *rest)

    vars(run)["begin_sync"], vars(loop)["step"] = begun, made


def test_a_steps_sync_runs_behind_the_step_before(data: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert not run_ranks(2, [(_tree(data, tmp_path), None, False)], prepare=partial(_told, log))
    expected = ["begun 1"]
    for step in range(1, STEPS + 1):
        expected.append(f"waited {step}")
        expected += [f"begun {step + 1}"] * (step < STEPS)
        expected.append(f"made {step}")
    for rank in (0, 1):
        assert Path(f"{log}-{rank}").read_text().splitlines() == expected


def _one_wants_to_stop(rank: int) -> None:
    """Rank 1 alone wants to, before the second step."""
    import trainer.loop as loop

    wants = loop.wants

    def wanting(run: Any, state: Any, _stop: bool) -> Wants:
        return wants(run, state, rank == 1 and state.step == 1)

    vars(loop)["wants"] = wanting


def test_all_stop_after_the_step_before_which_one_wants_to(data: Path, tmp_path: Path) -> None:
    assert not run_ranks(2, [(_tree(data, tmp_path), None, False)], prepare=_one_wants_to_stop)
    assert find_generation(str(tmp_path / "run")).step == 2


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([Wants(), Wants()], Verdict(stop=False, save=False, snapshot=False)),
        ([Wants(), Wants(stop=True)], Verdict(stop=True, save=False, snapshot=False)),
        ([Wants(save=True), Wants()], Verdict(stop=False, save=True, snapshot=False)),
        ([Wants(save=True), Wants(full=True)], Verdict(stop=False, save=False, snapshot=False)),
        (
            [Wants(save=True, snapshot=True), Wants(snapshot=True, busy=True)],
            Verdict(stop=False, save=True, snapshot=False),
        ),
        (
            [Wants(snapshot=True), Wants(snapshot=True, full=True)],
            Verdict(stop=False, save=False, snapshot=True),
        ),
    ],
)
def test_what_follows_from_what_ranks_want(ranks: list[Wants], expected: Verdict) -> None:
    sums = [sum(flags) for flags in zip(*(w.flags() for w in ranks), strict=True)]
    assert [verdict(w, sums) for w in ranks] == [expected] * len(ranks)

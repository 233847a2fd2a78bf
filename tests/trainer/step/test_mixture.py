"""TensorBoard shows planned against actual shares, of every set and objective, in every mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shards.format.answers import load_answers
from shards.format.build import BuildSettings, build
from shards.format.manifest import load_manifest
from tests.conftest import files_of, small_records
from tests.ranks import config_tree, run_ranks

STEPS, BATCH = 40, 26


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets that can be mixed."""
    folder = tmp_path_factory.mktemp("shares")
    build(small_records(31), folder / "first", BuildSettings("first", "test", images_per_shard=7))
    manifest = load_manifest(str(folder / "first"))
    settings = BuildSettings(
        "second",
        "test",
        images_per_shard=5,
        vocab=files_of(folder / "first") / manifest.vocab.file,
        answers=load_answers(files_of(folder / "first") / manifest.answers.file),
    )
    build(small_records(12, seed=3), folder / "second", settings)
    return folder


@pytest.mark.parametrize(
    "mode",
    [
        "balanced",
        pytest.param("natural", marks=pytest.mark.faults),
        pytest.param("alternating", marks=pytest.mark.faults),
    ],
)
def test_planned_and_actual_shares_agree(folder: Path, mode: str) -> None:
    mixed = [{"url": str(folder / "first"), "weight": 3}, {"url": str(folder / "second")}]
    mixed[1]["weight"] = 1
    tree: dict[str, Any] = config_tree(
        folder / "first",
        folder,
        mode,
        data={"train": mixed},
        sampler={"mode": mode, "mismatch": 0.25, "families": {"masked": 2}, "question_share": 0.6},
        train={"steps": STEPS, "global_batch": BATCH, "log_every": STEPS, "accumulation": 1},
    )
    assert not run_ranks(2, [(tree, None, False)])
    events = EventAccumulator(str(folder / mode / "tensorboard"))
    events.Reload()
    shares: dict[str, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        if tag.startswith("share/"):
            name, _, kind = tag.removeprefix("share/").rpartition("/")
            shares.setdefault(name, {})[kind] = events.Scalars(tag)[-1].value
    expected = {"source/coco_cap", "source/vqa", "set/first", "set/second", "mismatched"}
    expected |= {"objective/masked", "objective/matching", "objective/qa"}
    assert set(shares) == expected
    pairs = STEPS * BATCH
    # Exact where the sampler is; by chance, or within an epoch of a stream, elsewhere.
    exact = {"set/first", "set/second", "objective/masked", "objective/matching"}
    if mode == "balanced":
        exact |= {"mismatched", "source/vqa", "source/coco_cap"}
    for name, found in shares.items():
        rounding = BATCH if mode == "alternating" else 2
        off = rounding / pairs if name in exact else 0.06
        assert found["actual"] == pytest.approx(found["planned"], abs=off), name
    assert shares["set/first"]["planned"] == pytest.approx(0.75)
    if mode == "balanced":
        assert shares["source/vqa"]["planned"] == pytest.approx(0.6)
        assert shares["objective/qa"]["planned"] == pytest.approx(0.6 * 0.75)
    if mode == "alternating":
        assert shares["objective/masked"]["planned"] == pytest.approx(0.5)
        assert shares["objective/matching"]["planned"] == pytest.approx(0.25)

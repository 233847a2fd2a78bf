"""data.on_error: a shard that cannot be had ends the run on all ranks, or all pass over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shards.dataset import Dataset, open_dataset
from shards.format.build import BuildSettings, build
from shards.format.manifest import load_manifest
from shards.store import objects
from tests.conftest import files_of, small_records, upload_set
from tests.ranks import config_tree, fresh_server, run_ranks
from trainer.audit import audit
from trainer.checkpoint.generations import find_generation
from trainer.checkpoint.journal import StepLine, read_segments
from trainer.config import parse_config
from trainer.data.batch import make_batch
from trainer.data.digest import digest
from trainer.setup import batch_settings

STEPS, BATCH = 10, 13
OFF = {"dropout": 0.0, "attention_dropout": 0.0}


@pytest.fixture(scope="module", autouse=True)
def _loader_workers_know_the_store(s3: str) -> None:
    fresh_server()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skip") / "set"
    build(small_records(40), folder, BuildSettings("skip", "test", images_per_shard=7))
    return folder


@pytest.fixture
def remote(source: Path, s3: str, tmp_path: Path) -> str:
    """A copy in the store, for a test to damage."""
    url = f"{s3}/skip/{tmp_path.name}"
    upload_set(source, url)
    return url


def tree(url: str, storage: Path, name: str, on_error: str = "skip", **data: Any) -> dict[str, Any]:
    return config_tree(
        Path("unused"),
        storage,
        name,
        data={"train": url, "on_error": on_error, **data},
        sampler={"window": 2},
        train={"steps": STEPS, "global_batch": BATCH},
        model=OFF,
    )


def journal_of(run: Path) -> list[StepLine]:
    """The lines of all steps that led to the newest generation."""
    segments = find_generation(str(run)).manifest.journal
    lines = [line for _, part in read_segments(str(run), segments) for line in part]
    assert [line.step for line in lines] == list(range(1, len(lines) + 1))
    return lines


def expected_digests(
    config: dict[str, Any], data: Dataset, given_up: dict[int, int]
) -> tuple[list[int], int]:
    """What the steps must have trained on, and how many pairs were passed over, where each shard
    of `given_up` is left out from a number of consumed pairs on."""
    parsed = parse_config(config, "test")
    sampler = data.sampler(parsed.sampler, parsed.run.seed)
    digests, passed = [], 0
    for step in sampler.steps_ahead(sampler.start(), BATCH, STEPS * BATCH):
        whole, consumed = sampler.plan(step), step.before.consumed
        own = whole.without([s for s, at in given_up.items() if at <= consumed])
        passed += len(whole) - len(own)
        batch = make_batch(data, sampler, own, batch_settings(parsed, data))
        digests.append(digest(batch, consumed))
    return digests, passed


def first_need(config: dict[str, Any], data: Dataset, shard: int) -> int:
    """Pairs consumed before the first step that needs the shard."""
    parsed = parse_config(config, "test")
    sampler = data.sampler(parsed.sampler, parsed.run.seed)
    for step in sampler.steps_ahead(sampler.start(), BATCH, STEPS * BATCH):
        if shard in sampler.plan(step).shard:
            return step.before.consumed
    raise AssertionError("the run does not need it")


def late_shard(config: dict[str, Any], data: Dataset) -> tuple[int, int]:
    """A shard that is not needed at the start, and when it is."""
    needs = {s: first_need(config, data, s) for s in range(len(data.manifest.shards))}
    shard = max(needs, key=lambda s: (0 < needs[s] <= 5 * BATCH, needs[s]))
    return shard, needs[shard]


def place_of(remote: str) -> str:
    """Where its files are."""
    return load_manifest(remote).place(remote)


def damage(url: str, how: str) -> None:
    if how == "deleted":
        objects.delete(url)
    else:
        objects.write_bytes(url, b"\0" + objects.read_bytes(url)[1:])


@pytest.mark.parametrize("how", ["deleted", pytest.param("damaged", marks=pytest.mark.faults)])
def test_fail_ends_every_rank_with_one_error(
    remote: str, source: Path, tmp_path: Path, how: str
) -> None:
    config = tree(remote, tmp_path, "run", "fail")
    data = open_dataset(str(source), tmp_path / "reference")
    shard, _ = late_shard(config, data)
    name = data.manifest.shards[shard].name
    damage(f"{place_of(remote)}/{name}", how)
    errors = run_ranks(3, [(config, None, False)])
    assert len(errors) == 3 and len(set(errors)) == 1, errors
    assert f"{place_of(remote)}/{name}" in errors[0]
    assert "does not exist" in errors[0] if how == "deleted" else "content" in errors[0]


@pytest.mark.parametrize(
    ("world", "how", "loader"),
    [
        (3, "deleted", {}),
        (2, "damaged", {"loader_workers": 1}),
        pytest.param(2, "deleted", {"cache_limit_gb": 1.0}, marks=pytest.mark.faults),
    ],
    ids=["deleted", "damaged-worker", "limited"],
)
def test_skip_leaves_out_that_shards_pairs_and_no_others(
    remote: str,
    source: Path,
    tmp_path: Path,
    world: int,
    how: str,
    loader: dict[str, Any],
) -> None:
    config = tree(remote, tmp_path, "run", **loader)
    data = open_dataset(str(source), tmp_path / "reference")
    shard, at = late_shard(config, data)
    name = data.manifest.shards[shard].name
    damage(f"{place_of(remote)}/{name}", how)
    assert not run_ranks(world, [(config, None, False)])
    digests, passed = expected_digests(config, data, {shard: at})
    lines = journal_of(tmp_path / "run")
    assert [line.digest for line in lines] == digests
    assert passed > 0
    begin = at // BATCH
    assert [line.skipped for line in lines] == [()] * begin + [(shard,)] * (STEPS - begin)
    state = find_generation(str(tmp_path / "run")).manifest.sampler
    assert (state.consumed, state.skipped) == (STEPS * BATCH, ((shard, at),))
    assert state.skipped_pairs == passed


def test_a_shard_whose_table_is_lost_is_passed_over_once(
    remote: str, source: Path, tmp_path: Path
) -> None:
    """Where words come with the shards."""
    config = tree(remote, tmp_path, "run", text="window")
    data = open_dataset(str(source), tmp_path / "reference")
    shard, _ = late_shard(config, data)
    objects.delete(f"{place_of(remote)}/{data.manifest.shards[shard].table}")
    assert not run_ranks(2, [(config, 8, False)])
    assert not run_ranks(3, [(config, None, False)])
    assert [s for s, _ in find_generation(str(tmp_path / "run")).manifest.sampler.skipped] == [
        shard
    ]
    skips = {line.skipped for line in journal_of(tmp_path / "run")}
    assert skips <= {(), (shard,)} and (shard,) in skips
    assert audit(str(tmp_path / "run"), [str(source)], str(tmp_path / "audit")).problems == []


@pytest.mark.faults
def test_what_is_skipped_is_said_once(
    remote: str, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fresh_server()
    config = tree(remote, tmp_path, "run")
    data = open_dataset(str(source), tmp_path / "reference")
    shard, at = late_shard(config, data)
    name, pairs = data.manifest.shards[shard].name, data.manifest.shards[shard].pairs
    damage(f"{place_of(remote)}/{name}", "deleted")
    assert not run_ranks(2, [(config, None, False)])
    said = "".join(capfd.readouterr())
    assert said.count(f"skipping {place_of(remote)}/{name} and its {pairs} pairs") == 1
    passed = expected_digests(config, data, {shard: at})[1]
    assert said.count(f"1 shards are passed over, {passed} pairs") == 1


def test_a_resume_at_another_world_size_goes_on_without_the_shard(
    remote: str, source: Path, tmp_path: Path
) -> None:
    whole, parts = tree(remote, tmp_path, "whole"), tree(remote, tmp_path, "parts")
    data = open_dataset(str(source), tmp_path / "reference")
    shard, at = late_shard(whole, data)
    name = data.manifest.shards[shard].name
    damage(f"{place_of(remote)}/{name}", "deleted")
    stop = at // BATCH + 2  # stopped two steps later, resumed with the object back in its place
    assert not run_ranks(2, [(whole, None, False), (parts, stop, False)])
    objects.upload(files_of(source) / name, f"{place_of(remote)}/{name}")
    assert not run_ranks(3, [(parts, 1, False)])
    assert not run_ranks(1, [(parts, None, False)])
    one, two = journal_of(tmp_path / "whole"), journal_of(tmp_path / "parts")
    assert [line.digest for line in one] == [line.digest for line in two]
    assert {line.world for line in two} == {1, 2, 3}
    states = [find_generation(str(tmp_path / n)).manifest.sampler for n in ("whole", "parts")]
    assert states[0] == states[1] and states[0].skipped == ((shard, at),)


def test_ranks_agree_when_only_one_lacks_the_shard(
    remote: str, source: Path, tmp_path: Path
) -> None:
    """Rank 1 has a cache of its own, an empty one; rank 0's holds the shard already."""
    config = tree(remote, tmp_path, "run", cache=None)
    data = open_dataset(str(source), tmp_path / "reference")
    shard, at = late_shard(config, data)
    warm = open_dataset(remote, tmp_path / "cache-0")
    warm.shards.path(shard)
    name = data.manifest.shards[shard].name
    damage(f"{place_of(remote)}/{name}", "deleted")
    caches = [{"LXSCALE_CACHE": str(tmp_path / f"cache-{r}")} for r in range(2)]
    assert not run_ranks(2, [(config, None, False)], environments=caches)
    lines = journal_of(tmp_path / "run")
    # Rank 1 is the first to miss it at a step whose second half has pairs of it.
    skipped = [line for line in lines if line.skipped]
    when = (skipped[0].step - 1) * BATCH
    assert when >= at
    assert [line.digest for line in lines] == expected_digests(config, data, {shard: when})[0]
    state = find_generation(str(tmp_path / "run")).manifest.sampler
    assert state.skipped == ((shard, when),)


@pytest.mark.faults
def test_a_step_of_which_nothing_is_left_does_no_harm(
    remote: str, source: Path, tmp_path: Path
) -> None:
    """With windows of one shard whole steps are passed over."""
    config = tree(remote, tmp_path, "run")
    config["sampler"]["window"] = 1
    config["train"]["global_batch"] = BATCH
    data = open_dataset(str(source), tmp_path / "reference")
    shard, at = late_shard(config, data)
    damage(f"{place_of(remote)}/{data.manifest.shards[shard].name}", "deleted")
    assert not run_ranks(2, [(config, None, False)])
    assert [x.digest for x in journal_of(tmp_path / "run")] == expected_digests(
        config, data, {shard: at}
    )[0]


def test_no_shard_at_all_is_an_error(remote: str, source: Path, tmp_path: Path) -> None:
    config = tree(remote, tmp_path, "run")
    place = place_of(remote)
    for path in source.rglob("*.tar"):
        objects.delete(f"{place}/{path.name}")
    errors = run_ranks(2, [(config, None, False)])
    assert len(set(errors)) == 1 and len(errors) == 2
    assert "no shard of" in errors[0]

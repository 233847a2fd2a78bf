"""The auditor proves a run's journal, and finds what does not hold in one that was changed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.cli.main import main
from shards.errors import DataError
from shards.format.build import BuildSettings, build
from tests.conftest import small_records
from tests.ranks import config_tree, fresh_server, run_ranks
from trainer.audit import audit
from trainer.checkpoint.format import manifest_bytes
from trainer.checkpoint.generations import find_generation
from trainer.checkpoint.journal import verify_behind

OFF = {"dropout": 0.0, "attention_dropout": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    build(small_records(31), folder / "set", BuildSettings("audit", "test", images_per_shard=7))
    return folder


def trained(folder: Path, name: str, worlds: tuple[int, ...], **sections: Any) -> Path:
    """A run whose attempts have these world sizes; each but the last is killed after 4 steps."""
    tree = config_tree(folder / "set", folder, name, model=OFF, **sections)
    for world in worlds[:-1]:
        run_ranks(world, [(tree, 4, True)])
    assert not run_ranks(worlds[-1], [(tree, None, False)])
    return folder / name


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return trained(folder, "natural", (2, 3, 1), train={"steps": 14}, sampler={"window": 2})


def test_a_run_with_kills_and_other_world_sizes_is_proved(
    run: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shards", "audit", str(run), "--cache", str(folder / "cache")]) == 0
    out = capsys.readouterr().out
    pairs = 14 * 13
    total = json.loads((folder / "set" / "manifest.json").read_text())["counts"]["pairs"]
    assert "14 steps on 2, 3, 1 workers, in order" in out
    assert f"stream all: {pairs // total} whole epochs of {total} pairs, each once" in out
    assert f"{pairs % total} so far, none twice" in out and out.endswith("proved\n")


@pytest.mark.parametrize(
    "sampler",
    [
        {"mode": "balanced", "question_share": 0.7, "source_weights": {"vqa": 2}},
        {"mode": "alternating", "window": 2},
        {"last_batch": "short", "sentences_per_visit": 2},
    ],
    ids=["balanced", "alternating", "short"],
)
def test_every_mode_is_proved(folder: Path, sampler: dict[str, Any]) -> None:
    name = "-".join(sampler)
    run = trained(folder, name, (1,), train={"steps": 14}, sampler=sampler)
    found = audit(str(run), cache=str(folder / "cache"))
    assert found.problems == [] and any("whole epochs" in line for line in found.lines)


def test_a_data_set_that_was_moved_is_the_same(folder: Path, tmp_path: Path) -> None:
    """Within an epoch, twice, and the places before are gone."""
    shutil.copytree(folder / "set", tmp_path / "set-0")
    for i, end in enumerate((3, 7, None)):
        tree = config_tree(tmp_path / f"set-{i}", tmp_path, "run", model=OFF, train={"steps": 14})
        assert not run_ranks(1, [(tree, end, False)])
        shutil.move(tmp_path / f"set-{i}", tmp_path / f"set-{i + 1}")
    places = [str(tmp_path / "set-3")]
    found = audit(str(tmp_path / "run"), places, str(tmp_path / "cache"))
    assert found.problems == []
    (stream,) = (line for line in found.lines if line.startswith("stream all"))
    pairs = json.loads((tmp_path / "set-3" / "manifest.json").read_text())["counts"]["pairs"]
    assert f"{14 * 13 // pairs} whole epochs" in stream
    assert not any("another data state" in line for line in found.lines)
    with pytest.raises(DataError, match=r"no data set at .*set-2.* moved, .*--data"):
        audit(str(tmp_path / "run"), cache=str(tmp_path / "cache"))
    # Without --data they are looked for where the run had them last.
    shutil.move(tmp_path / "set-3", tmp_path / "set-2")
    assert audit(str(tmp_path / "run"), cache=str(tmp_path / "cache")).lines == found.lines


def test_another_order_by_override_is_said(folder: Path, tmp_path: Path) -> None:
    def tree(**sections: Any) -> dict[str, Any]:
        override = {"override_data_state": True}
        return config_tree(
            folder / "set", tmp_path, "run", model=OFF, checkpoint=override, **sections
        )

    cache = str(tmp_path / "cache")
    assert not run_ranks(1, [(tree(), 3, False)])
    # What is masked is no part of the order.
    assert not run_ranks(1, [(tree(objectives={"token_mask": 0.2}), 4, False)])
    found = audit(str(tmp_path / "run"), cache=cache)
    assert found.problems == [] and "another data state" not in "".join(found.lines)
    assert not run_ranks(1, [(tree(sampler={"window": 1}), None, False)])
    found = audit(str(tmp_path / "run"), cache=cache)
    assert any("from step 8: another data state, by override" in line for line in found.lines)


def changed(run: Path, tmp_path: Path, change: Callable[[list[dict[str, Any]]], None]) -> str:
    """A copy of the run whose last segment was changed by someone who can compute hashes."""
    generation = find_generation(str(run))
    copy = tmp_path / "run"
    (copy / "checkpoints" / "record").mkdir(parents=True)
    *earlier, last = generation.manifest.journal
    for entry in earlier:
        Path(entry.url(str(copy))).write_bytes(Path(entry.url(str(run))).read_bytes())
    lines = [json.loads(x) for x in Path(last.url(str(run))).read_text().splitlines()]
    change(lines)
    data = "".join(json.dumps(x) + "\n" for x in lines).encode()
    Path(last.url(str(copy))).write_bytes(data)
    last = replace(last, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest = replace(generation.manifest, journal=(*earlier, last))
    (copy / "checkpoints" / generation.name).write_bytes(manifest_bytes(manifest))
    return str(copy)


def flip_digest(lines: list[dict[str, Any]]) -> None:
    lines[2]["digest"] = f"{int(lines[2]['digest'], 16) ^ 1:016x}"


def drop_step(lines: list[dict[str, Any]]) -> None:
    del lines[1]


def repeat_step(lines: list[dict[str, Any]]) -> None:
    lines.insert(2, lines[2])


def larger_step(lines: list[dict[str, Any]]) -> None:
    lines[2]["pairs"] += 1


def other_start(lines: list[dict[str, Any]]) -> None:
    lines[0]["start"]["consumed"] -= 13
    lines[0]["start"]["cursors"][0] -= 13


def other_masks(lines: list[dict[str, Any]]) -> None:
    lines[0]["data_state"]["objectives.token_mask"] = 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_digest, "trained on other pairs, words, masks or answers than the order's"),
        (drop_step, "follows on step"),
        (repeat_step, "follows on step"),
        (larger_step, "trained on other pairs, words, masks or answers than the order's"),
        (other_start, "does not go on from where step"),
        (other_masks, "trained on other pairs, words, masks or answers than the order's"),
    ],
)
def test_a_changed_journal_is_found(
    run: Path, folder: Path, tmp_path: Path, change: Any, message: str
) -> None:
    found = audit(changed(run, tmp_path, change), cache=str(folder / "cache"))
    assert any(message in p for p in found.problems), found.problems
    assert not audit(changed(run, tmp_path / "same", lambda _: None), cache=str(folder)).problems


def test_another_data_set_and_a_damaged_segment_are_errors(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(small_records(9), tmp_path / "other", BuildSettings("other", "test"))
    arguments = ["shards", "audit", str(run), "--cache", str(tmp_path)]
    assert main([*arguments, "--data", str(tmp_path / "other")]) == 2
    assert "is not the data set of the run" in capsys.readouterr().err
    copy = Path(changed(run, tmp_path, lambda _: None))
    segment = next((copy / "checkpoints" / "record").iterdir())
    segment.write_bytes(segment.read_bytes()[:-1])
    assert main(["shards", "audit", str(copy)]) == 2
    assert f"{segment} is damaged" in capsys.readouterr().err


@pytest.mark.faults
def test_segments_that_are_not_whole_are_said_when_the_run_goes_on(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fresh_server()  # prints to where the test reads
    shutil.copytree(run, tmp_path / run.name)
    tree = config_tree(
        run.parent / "set",
        tmp_path,
        run.name,
        model=OFF,
        train={"steps": 40},
        sampler={"window": 2},
    )
    first, second, *_ = find_generation(str(run)).manifest.journal
    Path(first.url(str(tmp_path / run.name))).unlink()
    path = Path(second.url(str(tmp_path / run.name)))
    path.write_bytes(path.read_bytes()[:-1])
    assert not run_ranks(1, [(tree, None, False)])
    out, err = capfd.readouterr()
    (line,) = (line for line in (out + err).splitlines() if "segments of the journal" in line)
    assert "2 of the " in line and first.name in line
    assert f"prove steps {first.first}-{first.last}, {second.first}-{second.last}" in line
    assert find_generation(str(tmp_path / run.name)).step == 40
    fresh_server()


def test_whole_segments_are_not_spoken_of(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    verify_behind(str(run), find_generation(str(run)).manifest.journal).join()
    assert not caplog.records

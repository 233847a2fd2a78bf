"""How a run stands, from its storage alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.cli.main import main
from shards.errors import NotFoundError
from shards.format.build import BuildSettings, build
from shards.format.manifest import load_manifest
from shards.store import objects
from tests.conftest import small_records
from tests.ranks import config_tree
from tests.trainer.checkpoint.test_checkpoint import own, save
from tests.trainer.checkpoint.test_owner import elsewhere, quick  # noqa: F401
from trainer.config import parse_config
from trainer.run_status import find_runs, run_status
from trainer.setup import note_run


def begin(storage: str, name: str, **train: float | None) -> str:
    tree = config_tree(Path("/none"), Path("/none"), name, train=train)
    tree["run"]["storage"] = storage
    note_run(parse_config(tree, "test"))
    return f"{storage}/{name}"


def test_a_run_is_told_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    url = begin(str(tmp_path), "run", steps=3)
    found = run_status(url)
    assert (found.state, found.step, found.total, found.attempt) == ("new", 0, 3, 0)
    owner = own(url)
    found = run_status(url)
    assert (found.state, found.step, found.saved, found.attempt) == ("running", 0, None, 1)
    save(owner, 2, 1.0)
    found = run_status(url)
    assert (found.state, found.step, found.generation) == ("running", 2, "a000001-000001")
    assert found.saved and "host" in found.owner
    owner.close()
    assert run_status(url).state == "stopped"
    owner = own(url)
    save(owner, 3, 1.0)
    owner.close()
    found = run_status(url)
    assert (found.state, found.step, found.attempt, found.problem) == ("done", 3, 2, "")
    # A damaged newest generation is told of, and the one before counts.
    (tmp_path / "run" / "checkpoints" / f"{found.generation}.json").write_bytes(b"{}")
    found = run_status(url)
    assert (found.state, found.step) == ("stopped", 2) and "a000002-000001" in found.problem


@pytest.mark.usefixtures("elsewhere")
def test_an_owner_that_says_nothing_more_is_dead(tmp_path: Path) -> None:
    url = begin(str(tmp_path), "run", steps=3)
    save(own(url), 2, 1.0)
    assert run_status(url).state == "dead"


def test_a_length_in_epochs_needs_the_data(tmp_path: Path) -> None:
    url = begin(str(tmp_path), "run", steps=None, epochs=2, global_batch=10)
    assert run_status(url).total is None
    data = tmp_path / "set"
    build(small_records(9), data, BuildSettings("set", "test", images_per_shard=9))
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("/none", str(data), 1))
    pairs = load_manifest(str(data)).pairs
    assert run_status(url).total == -(-2 * pairs // 10)


@pytest.mark.parametrize("where", ["a folder", "S3"])
def test_all_runs_of_a_storage(
    where: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those with / in their names; not what else is there."""
    storage = str(tmp_path) if where == "a folder" else f"{request.getfixturevalue('s3')}/all"
    urls = [begin(storage, name, steps=3) for name in ("a", "team/b", "team/c/d", "a/e")]
    for name in ("set/manifest.json", "set/build-1/config.yaml", "note.txt"):
        objects.write_bytes(f"{storage}/{name}", b"x")
    owner = own(urls[1])
    save(owner, 2, 1.0)
    owner.close()
    objects.write_bytes(f"{urls[2]}/config.yaml", b"[")
    assert find_runs(storage) == sorted(urls)
    assert main(["runs", storage, "--json"]) == 0
    told = {r["url"]: r for r in map(json.loads, capsys.readouterr().out.splitlines())}
    states = [told[url]["state"] for url in urls]
    assert states == ["new", "stopped", "unreadable", "new"]
    assert "config.yaml is not valid YAML" in told[urls[2]]["problem"]
    assert told[urls[1]]["step"] == 2 and told[urls[1]]["saved"] > 1e9
    assert main(["runs", storage]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "a", "a/e", "team/b", "team/c/d"]
    assert main(["status", urls[1]]) == 0
    assert f"{urls[1]}: stopped\n  step      2 of 3, saved " in capsys.readouterr().out
    assert main(["runs", f"{storage}/nothing"]) == 2
    with pytest.raises(NotFoundError, match="is no run"):
        run_status(f"{storage}/nothing")

"""A recipe: several data sets of the same files, whose images do not meet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.cli.main import main
from shards.convert.recipe import load_recipe
from shards.errors import DataError
from shards.format.manifest import load_manifest
from shards.format.verify import verify
from shards.webdataset import as_webdataset
from tests.conftest import files_of
from tests.shards.convert.inputs import aggregated, make_row, tsv_bytes

RECIPE = """
features:
  - {place: train.tsv, split: train}
  - {place: val.tsv, split: val}
sentences:
  - {files: [a.json, b.json]}
lists:
  minival: {features: val.tsv, first: 2}
  test: {sentences: [test.json]}
  mine: {ids: [ids.txt], numbers: coco}
data_sets:
  train: {exclude: [minival, test, mine]}
  minival: {only: minival}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train = [f"COCO_train2014_{i:012d}" for i in range(1, 9)]
    val = [f"COCO_val2014_{i:012d}" for i in range(21, 26)]
    (tmp_path / "train.tsv").write_bytes(tsv_bytes([make_row(n) for n in train]))
    (tmp_path / "val.tsv").write_bytes(tsv_bytes([make_row(n) for n in val]))
    (tmp_path / "a.json").write_text(aggregated(train + val[:1]))
    (tmp_path / "b.json").write_text(aggregated(val[1:]))
    (tmp_path / "test.json").write_text(aggregated(train[:1] + val[-1:]))
    (tmp_path / "ids.txt").write_text("7\n\n000000000008.jpg\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def test_data_sets_of_a_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out"
    command = [
        *("shards", "build", "--recipe", str(folder / "recipe.yaml"), "--out", str(out)),
        *("--feature-dim", "6", "--vocab-size", "200", "--workers", "1", "--quiet", "--json"),
    ]
    assert main([*command, "--dry-run"]) == 0 and not out.exists()
    assert [json.loads(x)["images"] for x in capsys.readouterr().out.splitlines()] == [7, 2]
    assert main(command) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(t["images"], t["pairs"]) for t in told] == [(7, 21), (2, 6)]
    assert told[0]["left_out"] == {
        "images left out: minival": 2,
        "images left out: test": 2,
        "images left out: mine": 2,
    }
    images = {
        name: sorted(r["image"][-2:] for r in as_webdataset(str(out / name)))
        for name in ("train", "minival")
    }
    assert images == {"train": ["02", "03", "04", "05", "06", "23", "24"], "minival": ["21", "22"]}
    first, second = (load_manifest(str(out / n)) for n in ("train", "minival"))
    assert first.vocab.sha256 == second.vocab.sha256 and first.answers == second.answers
    assert verify(str(out / "train")) == verify(str(out / "minival")) == []
    assert files_of(out / "train").parent == out / "train"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("exclude: [minival", "exclude: [minivall"), "names the list 'minivall', not there"),
        (("place: train", "plaze: train"), r"features\.0\.place: Field required"),
        (("lists:", "list:"), "list: Extra inputs"),
        (("first: 2", "first: x"), r"lists\.minival\.first: Input should be"),
        (("  train: {", "  ../train: {"), "'../train' is no name of a folder"),
        (("features:", "features: ["), "is no YAML"),
        (("\n", "\n- "), "is no YAML|is no recipe"),
    ],
)
def test_what_is_wrong_with_a_recipe(folder: Path, change: tuple[str, str], message: str) -> None:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace(*change))
    with pytest.raises(DataError, match=message) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)

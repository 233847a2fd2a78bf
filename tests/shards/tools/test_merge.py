"""Data sets that are merged are what a build of all their records is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from shards.dataset import open_dataset
from shards.errors import DataError
from shards.format.answers import load_answers
from shards.format.build import BuildSettings, build
from shards.format.manifest import MANIFEST, Manifest, given_file, load_manifest
from shards.format.record import ImageRecord, Sentence
from shards.format.verify import verify
from shards.store import objects
from shards.tools.merge import merge, merge_plan
from tests.conftest import contents, files_of, small_records
from tests.shards.tools.sets import SETTINGS, renamed, run, with_words_of


def others(n: int) -> list[ImageRecord]:
    """Records of other images and another set, with answers of their own."""
    return [
        replace(
            record,
            sentences=(
                *record.sentences,
                Sentence(f"a purple line {i}?", "gqa", {"Gray": 1.0, "rare": 0.5}, str(i)),
                Sentence("is it grey", "aaa", {"the grey": 0.25}),
            ),
        )
        for i, record in enumerate(renamed(small_records(n, seed=1), "b/"))
    ]


def as_built(records: list[ImageRecord], place: Path, answers: list[str], like: Path) -> Manifest:
    """A build of these, whose shards are those of the parts: of five images."""
    return build(records, place, replace(with_words_of(like), answers=answers, images_per_shard=5))


def test_it_is_a_build_of_all_records(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    settings = replace(SETTINGS, images_per_shard=5)
    build(small_records(10), one, settings)
    build(others(7), two, replace(with_words_of(one), answers=None, images_per_shard=5))
    made = merge([str(one), str(two)], str(tmp_path / "both"), "set")
    answers = load_answers(given_file(tmp_path / "both", "answers"))
    first = load_answers(given_file(one, "answers"))
    assert answers[: len(first)] == first and answers[len(first) :] == ["gray"]
    built = as_built([*small_records(10), *others(7)], tmp_path / "built", answers, one)
    assert contents(tmp_path / "both") == contents(tmp_path / "built")
    assert made.fingerprint == built.fingerprint and made.question_sources == built.question_sources
    assert verify(tmp_path / "both") == []
    # Tars are those of the parts, byte for byte.
    old = [s.sha256 for place in (one, two) for s in load_manifest(str(place)).shards]
    assert [s.sha256 for s in made.shards] == old


def test_other_words_are_numbered_anew(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    build(small_records(5), one, replace(SETTINGS, images_per_shard=5))
    build(others(5), two, BuildSettings("two", "test", max_tokens=6, images_per_shard=5))
    assert load_manifest(str(one)).vocab.sha256 != load_manifest(str(two)).vocab.sha256
    both = [*small_records(5), *others(5)]
    merge([str(one), str(two)], str(tmp_path / "m1"), "set")
    answers = load_answers(given_file(tmp_path / "m1", "answers"))
    as_built(both, tmp_path / "b1", answers, one)
    assert contents(tmp_path / "m1") == contents(tmp_path / "b1")
    merge([str(one), str(two)], str(tmp_path / "m2"), "set", vocab=two)
    as_built(both, tmp_path / "b2", answers, one)
    assert load_manifest(str(tmp_path / "m2")).vocab.sha256 == load_manifest(str(two)).vocab.sha256
    assert verify(tmp_path / "m1") == [] == verify(tmp_path / "m2")


@pytest.mark.parametrize("other", ["vocab", "answers", "sources", "max_tokens"])
def test_one_thing_that_differs_is_enough(tmp_path: Path, other: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    build(small_records(5), one, replace(SETTINGS, images_per_shard=5))
    records, settings = renamed(small_records(5), "b"), with_words_of(one, max_tokens=20)
    if other == "vocab":
        settings = replace(settings, vocab=[*reversed(settings.vocab or ())])
    if other == "answers":
        settings = replace(settings, answers=[*reversed(settings.answers or ())])
    if other == "max_tokens":
        settings = replace(settings, max_tokens=4)
    if other == "sources":
        records = [
            replace(r, sentences=tuple(replace(s, source="vqa") for s in r.sentences))
            for r in records
        ]
    build(records, two, replace(settings, images_per_shard=5))
    merge([str(one), str(two)], str(tmp_path / "both"), "set")
    answers = load_answers(given_file(one, "answers"))
    as_built([*small_records(5), *records], tmp_path / "built", answers, one)
    assert contents(tmp_path / "both") == contents(tmp_path / "built")


def test_tables_are_copied_where_they_fit(tmp_path: Path, s3: str) -> None:
    one, two = f"{s3}/{tmp_path.name}/one", f"{s3}/{tmp_path.name}/two"
    build(small_records(5), one, SETTINGS)
    build(renamed(small_records(6), "c"), two, with_words_of(one))
    plan = merge_plan([one, two])
    assert plan.copied == (True, True) and plan.new_answers == 0
    out = f"{s3}/{tmp_path.name}/both"
    made = merge([one, two], out, "both")
    tables = [s.table_sha256 for u in (one, two) for s in load_manifest(u).shards]
    assert [s.table_sha256 for s in made.shards] == tables
    assert verify(out) == [] and len(open_dataset(out, cache=tmp_path / "c").index.source) == (
        made.pairs
    )


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    out = str(tmp_path / "out")
    build(small_records(5), one, SETTINGS)

    def refused(records: list[ImageRecord], message: str, **changes: object) -> None:
        build(records, two, replace(SETTINGS, overwrite=True, **changes))
        with pytest.raises(DataError, match=message):
            merge([one, two], out, "both")
        assert not Path(out).exists()

    new = renamed(small_records(5), "c")
    refused(
        [replace(r, features=r.features[:, :4].copy()) for r in new], "its feature_dim is 4, not 8"
    )
    refused(renamed(small_records(5, labels=True), "c"), "its labels is True, not False")
    refused(new, r"different extractors are not interchangeable; --allow-", extractor="other")
    assert merge([one, two], out, "both", allow_extractors=True).extractor == "test + other"
    assert verify(out) == []
    again = [*new, small_records(4)[3]]
    with pytest.raises(DataError, match=r"there is a data set at .*--overwrite"):
        merge([one, two], out, "both")
    shutil.rmtree(out)
    refused(again, r"image 'pictures/image 3.png' of .*two/.*shard-000001.tar is in .*one, too")
    with pytest.raises(DataError, match=r"two or more"):
        merge([one], out, "both")
    with pytest.raises(DataError, match=r"is the same shard as"):
        merge_plan([one, one])


def test_damage_ends_it_and_leaves_nothing(tmp_path: Path, s3: str) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    build(small_records(5), one, SETTINGS)
    build(renamed(small_records(9), "c"), two, SETTINGS)
    table = sorted(files_of(Path(two)).glob("*.safetensors"))[2]
    whole = table.read_bytes()
    table.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    out = f"{s3}/{tmp_path.name}/out"
    with pytest.raises(DataError, match=f"{table.name} is damaged"):
        merge([one, two], out, "both")
    assert objects.list_tree(out) == []
    table.unlink()
    with pytest.raises(DataError, match=table.name):
        merge([one, two], out, "both")
    assert objects.list_tree(out) == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, out = (tmp_path / name for name in ("one", "two", "out"))
    build(small_records(5), one, SETTINGS)
    build(others(5), two, SETTINGS)
    line = (one, two, "--out", out, "--json", "--quiet")
    assert run("merge", *line, "--dry-run") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["images"] == 10 and told["new_answers"] == 1 and not out.exists()
    assert told["tables_copied"] == {str(one): False, str(two): False}
    assert run("merge", *line) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["fingerprint"] == load_manifest(str(out)).fingerprint and made["name"] == "out"
    assert {k: told[k] for k in ("images", "pairs", "sentences", "shards")} == {
        k: made[k] for k in ("images", "pairs", "sentences", "shards")
    }
    assert (out / MANIFEST).exists() and verify(out) == []

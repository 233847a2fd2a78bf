"""Building: the bytes, who can read them, and what is left when it goes wrong."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeRecords, subprocess_environment
from PIL import Image

from shards import store
from shards.answers import answer_index, load_answers, normalise_answer, normalise_answers
from shards.build import BuildSettings, build
from shards.commands import add_shards_parser
from shards.easy_vqa import write_easy_vqa
from shards.errors import DataError
from shards.manifest import load_manifest
from shards.record import Report, Sentence, labels_bytes, record_key
from shards.source_images import LAYOUTS, describe, grid_boxes, read_images
from shards.table import open_table
from shards.tokenizer import load_tokenizer, make_tokenizer, parse_vocab, train_vocab
from shards.verify import verify

SETTINGS = BuildSettings("small", "random", vocab_size=200, images_per_shard=4)


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def cli(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_shards_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["shards", *map(str, arguments)])
    return int(args.func(args))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven random pictures and their sentences.json."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    entries = []
    for i in range(7):
        size = (24 + i, 32, 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{i}.png")
        color = ["Red", "a blue.", "grey"][i % 3]
        sentences = [
            {"text": f"What color has the picture {i}?", "answers": {color: 1.0}, "id": f"00{i}"},
            {"text": "A picture of nothing.", "source": "coco_cap"},
        ]
        entries.append({"image": f"{i}.png", "split": "train", "sentences": sentences})
    (folder / "sentences.json").write_text(json.dumps(entries))
    return folder


def test_what_is_written_is_what_was_given(tmp_path: Path, make_records: MakeRecords) -> None:
    records = make_records(10, labels=True)
    settings = replace(SETTINGS, answers=["blue", "green", "red"])
    report = Report()
    manifest = build(records, tmp_path, settings, report=report)
    assert manifest == load_manifest(str(tmp_path))
    assert [s.images for s in manifest.shards] == [4, 4, 2]
    assert manifest.schema.labels and manifest.schema.max_objects == max(
        len(r.boxes) for r in records
    )
    assert manifest.sources == ("coco_cap", "vqa") and manifest.question_sources == ("vqa",)
    assert report.counts == {"answers that are not in the answer table": 10}
    tokenizer = load_tokenizer(tmp_path / "vocab.txt")
    at = 0
    for shard in manifest.shards:
        table, data = open_table(tmp_path / shard.table), (tmp_path / shard.name).read_bytes()
        for i in range(shard.images):
            record = records[at]
            at += 1
            n = int(table.image_objects[i])

            def payload(offset: int, size: int, data: bytes = data) -> bytes:
                return data[int(offset) :][: int(size)]

            assert payload(table.features_offset[i], n * 16) == record.features.tobytes()
            assert payload(table.boxes_offset[i], n * 16) == record.boxes.tobytes()
            assert table.labels_offset is not None and record.labels is not None
            assert payload(table.labels_offset[i], n * 16) == labels_bytes(record.labels)
            document = json.loads(payload(table.record_offset[i], table.record_size[i]))
            assert document["image"] == record.image
            begin, end = table.image_sentences[i : i + 2]
            assert end - begin == len(record.sentences)
            for s, sentence in zip(range(begin, end), record.sentences, strict=True):
                ids = table.tokens[table.token_start[s] : table.token_start[s + 1]].tolist()
                assert ids == tokenizer.encode(sentence.text).ids[:18]
                assert manifest.sources[table.sentence_source[s]] == sentence.source
                answers = slice(table.answer_start[s], table.answer_start[s + 1])
                known = {settings.answers[a] for a in table.answer_id[answers].tolist()}
                assert known == set(sentence.answers or {}) - {"rare"}
    assert verify(tmp_path) == []


def test_stock_readers_read_a_shard(tmp_path: Path, make_records: MakeRecords) -> None:
    import webdataset

    records = make_records(5, labels=True)
    build(records, tmp_path, replace(SETTINGS, images_per_shard=None))
    tar = tmp_path / "shard-000000.tar"
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False))
    assert len(samples) == 5
    for sample, record in zip(samples, records, strict=True):
        assert sample["__key__"] == record_key(record.image)
        assert json.loads(sample["json"])["image"] == record.image
        features = np.frombuffer(sample["features.f16"], "<f2").reshape(record.features.shape)
        np.testing.assert_array_equal(features, record.features)
        np.testing.assert_array_equal(
            np.frombuffer(sample["boxes.f32"], "<f4").reshape(-1, 4), record.boxes
        )
        assert {"labels.bin"} < set(sample)
    listed = subprocess.run(["tar", "tvf", tar], capture_output=True, text=True, check=True).stdout
    assert len(listed.splitlines()) == 20
    assert all(line.startswith("-rw-r--r--") for line in listed.splitlines())
    assert all(" 1970-01-01 " in line for line in listed.splitlines())


def test_two_processes_build_the_same_bytes(tmp_path: Path, pictures: Path) -> None:
    script = (
        "import argparse, sys\nfrom shards.commands import add_shards_parser\n"
        "if __name__ == '__main__':\n"
        "    p = argparse.ArgumentParser()\n    add_shards_parser(p.add_subparsers())\n"
        "    a = p.parse_args()\n    sys.exit(a.func(a))\n"
    )
    (tmp_path / "run.py").write_text(script)
    for seed, workers, out in (("1", "0", "a/data"), ("2", "2", "b/data")):
        subprocess.run(
            [
                *(sys.executable, tmp_path / "run.py", "shards", "build", "images", "--quiet"),
                *("--images", pictures, "--sentences", pictures / "sentences.json"),
                *("--source", "vqa", "--boxes", "5", "--images-per-shard", "3"),
                *("--workers", workers, "--out", tmp_path / out),
            ],
            env=subprocess_environment(PYTHONHASHSEED=seed),
            check=True,
        )
    assert len(contents(tmp_path / "a/data")) == 9
    assert contents(tmp_path / "a/data") == contents(tmp_path / "b/data")
    manifest = load_manifest(str(tmp_path / "a/data"))
    assert json.loads((tmp_path / "a/data/answers.json").read_text()) == ["red", "blue", "gray"]
    assert manifest.counts.sentences == {"coco_cap": 7, "vqa": 7}


def test_s3_gets_the_same_bytes(tmp_path: Path, make_records: MakeRecords, s3: str) -> None:
    url = f"{s3}/same"
    # A crowd of shards of an interrupted build: none of it may stay.
    store.write_bytes(f"{url}/shard-000007.tar", b"old")
    local = build(make_records(9), tmp_path / "data", SETTINGS)
    remote = build(make_records(9), url, SETTINGS, staging=tmp_path / "staging")
    assert remote == local == load_manifest(url)
    names = store.list_names(url)
    assert names == sorted(contents(tmp_path / "data"))
    for name in names:
        assert store.read_bytes(f"{url}/{name}") == (tmp_path / "data" / name).read_bytes()
    assert list((tmp_path / "staging").iterdir()) == []
    assert verify(url) == []
    with pytest.raises(DataError, match="--overwrite"):
        build(make_records(3), url, SETTINGS)
    fewer = build(make_records(3), url, replace(SETTINGS, overwrite=True))
    assert load_manifest(url) == fewer != local
    assert [n for n in store.list_names(url) if n.endswith(".tar")] == ["shard-000000.tar"]


def test_an_existing_data_set_is_replaced_only_on_request(
    tmp_path: Path, make_records: MakeRecords
) -> None:
    build(make_records(9), tmp_path, SETTINGS)
    before = contents(tmp_path)
    with pytest.raises(DataError, match=r"there is a data set.*--overwrite"):
        build(make_records(3), tmp_path, SETTINGS)
    with pytest.raises(DataError, match="has features"):  # a failing one leaves the old as it was
        bad = [*make_records(5), *make_records(1, feature_dim=9, seed=1)]
        bad[-1] = replace(bad[-1], image="other")
        build(bad, tmp_path, replace(SETTINGS, overwrite=True))
    assert contents(tmp_path) == before
    build(make_records(3), tmp_path, replace(SETTINGS, overwrite=True))
    assert sorted(p.name for p in tmp_path.glob("shard-*.tar")) == ["shard-000000.tar"]
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": np.ones((2, 4), np.float32) * 2}, "boxes outside of 0..1"),
        ({"features": np.full((2, 8), np.nan, np.float16)}, "not finite"),
        ({"features": np.zeros((3, 8), np.float16)}, r"features of shape \(3, 8\)"),
        ({"sentences": ()}, "no sentence"),
        ({"sentences": (Sentence("\ud800", "vqa"),)}, "not valid Unicode"),
        ({"image": "pictures/image 0.png"}, "comes twice"),
        ({"width": 0}, "a size of 0"),
    ],
)
def test_bad_records_are_named_and_can_be_skipped(
    tmp_path: Path, make_records: MakeRecords, change: dict, message: str
) -> None:
    good = make_records(2)
    bad = replace(
        good[1],
        **{
            "boxes": np.zeros((2, 4), np.float32),
            "features": np.zeros((2, 8), np.float16),
            "image": "bad one",
            **change,
        },
    )
    with pytest.raises(DataError, match=message) as caught:
        build([good[0], bad], tmp_path / "a", SETTINGS)
    assert bad.image in str(caught.value)
    assert list((tmp_path / "a").iterdir()) == []
    report = Report()
    manifest = build(
        [good[0], bad], tmp_path / "a", replace(SETTINGS, skip_bad=True), report=report
    )
    assert manifest.images == 1 and report.counts["bad image records"] == 1


SLOW_BUILD = """
import sys, time, resource
sys.path.insert(0, sys.argv[2])
from conftest import small_records
from shards.build import BuildSettings, build
from shards.errors import DataError

def slow(records):
    for i, record in enumerate(records):
        if i == 9 and sys.argv[3] == "hang":
            time.sleep(60)
        yield record

if sys.argv[3] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
records = small_records(12, feature_dim=512)
try:
    build(slow(records), sys.argv[1], BuildSettings("x", "y", vocab_size=200, images_per_shard=4))
except DataError as error:
    sys.exit(str(error))
"""


def run_slow_build(out: Path, kind: str) -> subprocess.Popen[str]:
    tests = str(Path(__file__).parent)
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_BUILD, str(out), tests, kind],
        env=subprocess_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_build_leaves_no_final_name(tmp_path: Path, make_records: MakeRecords) -> None:
    out = tmp_path / "out"
    child = run_slow_build(out, "hang")
    deadline = time.monotonic() + 30
    while not list(out.glob(".building-*/shard-000002.tar")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    assert [p.name for p in out.iterdir() if not p.name.startswith(".building-")] == []
    # A living build's folder is not taken for a dead one's.
    build(make_records(2), out, SETTINGS)
    assert len(list(out.glob(".building-*"))) == 1
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    build(make_records(2), out, replace(SETTINGS, overwrite=True))
    assert list(out.glob(".building-*")) == []
    assert verify(out) == []


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = run_slow_build(out, "full")
    _, errors = child.communicate()
    assert (
        child.returncode == 1 and errors.startswith("cannot write ") and "Traceback" not in errors
    )
    assert list(out.iterdir()) == []


def test_no_record_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image record"):
        build([], tmp_path / "out", SETTINGS)


def test_keys_are_safe_distinct_and_bounded() -> None:
    ids = ["a/b.png", "a_b.png", "a=2Fb", "ä", "x" * 300, "x" * 301, "COCO_val2014_000000000042"]
    keys = [record_key(i) for i in ids]
    assert keys[0] == "a=2Fb=2Epng" and keys[-1] == ids[-1]
    assert len(set(keys)) == len(keys)
    assert all(len(k) <= 80 and not set(k) & set("./\\ ") for k in keys)
    tarfile.TarInfo(f"{keys[4]}.features.f16").tobuf(tarfile.USTAR_FORMAT)  # no error


# --- vocabulary and answers ---------------------------------------------------------------------


def test_the_trained_vocabulary_does_not_depend_on_the_process(tmp_path: Path) -> None:
    script = (
        "import sys, hashlib\nfrom shards.tokenizer import train_vocab\n"
        "rows = [f'{a}{b} naïve grün {b}{a}x{i}' for i in range(40) for a in 'abcdefgh' "
        "for b in 'stuvw']\n"
        "rows = rows[::int(sys.argv[1])]\n"
        "print(hashlib.sha256('\\n'.join(train_vocab(rows, 400)).encode()).hexdigest())"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", script, order],
            env=subprocess_environment(PYTHONHASHSEED=seed, TOKENIZERS_PARALLELISM=parallel),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for order, seed, parallel in (("1", "1", "true"), ("-1", "2", "true"), ("1", "3", "false"))
    }
    assert len(hashes) == 1


def test_vocabulary() -> None:
    vocab = train_vocab(["the cat", "the cats", "[MASK] me"] * 3, 100)
    assert vocab[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(set(vocab)) == len(vocab) and "the" in vocab
    tokenizer = make_tokenizer(vocab)
    assert 4 not in tokenizer.encode("[MASK] the cat").ids  # data cannot speak special tokens
    with pytest.raises(DataError, match="no room"):
        train_vocab(["abcdefgh"], 12)


def test_berts_vocabulary_gives_berts_tokens(shared_data: Path) -> None:
    from transformers import BertTokenizer

    path = shared_data / "bert-base-uncased-vocab.txt"
    ours, theirs = load_tokenizer(path), BertTokenizer(vocab=str(path))
    for text in ("A very clean kitchen, isn't it?", "Crème brûlée 東京 unaffable!", "[MASK] x"):
        expected = theirs.tokenize(text.replace("[MASK]", "mask"))
        assert ours.encode(text.replace("[MASK]", "mask")).tokens == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n", r"v.txt has no \[MASK\]"),
        (b"[PAD]\na\nb\na\n", "line 2 and line 4"),
        (b"[PAD]\n\na\n", "empty line 2"),
        (b"\xff\n", "not UTF-8"),
    ],
)
def test_bad_vocabularies(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_vocab(data, "v.txt")


def test_answers_normal_form_and_table(shared_data: Path) -> None:
    forms = {
        "Two": "2", "a man": "man", "The Grey": "gray", " on.": "on", "an a1": "a1", "ten": "10",
        "none": "none", "another": "another",
    }  # fmt: skip
    assert {a: normalise_answer(a) for a in forms} == forms
    assert normalise_answers({"Gray": 0.3, "grey": 0.9, "a gray": 0.6, ".": 1}) == {"gray": 0.9}
    table = load_answers(shared_data / "lxmert_all_ans.json")
    assert len(table) == 9500
    index = answer_index(table)
    # Every entry in normal form finds itself.
    assert all(index[a] == i for i, a in enumerate(table) if normalise_answer(a) == a)
    assert answer_index(["A man", "man", "Yes"]) == {"man": 1, "yes": 2}


# --- pictures -----------------------------------------------------------------------------------


def test_grids_and_features() -> None:
    for n in LAYOUTS:
        boxes = grid_boxes(n)
        assert boxes.shape == (n, 4) and boxes.min() == 0 and boxes.max() == 1
        assert len(np.unique(boxes, axis=0)) == n
        assert (boxes[:, 0] < boxes[:, 2]).all() and (boxes[:, 1] < boxes[:, 3]).all()
    np.testing.assert_allclose(grid_boxes(10)[5], [0.25, 0.25, 0.75, 0.75])
    with pytest.raises(DataError, match="choose one of"):
        grid_boxes(7)
    image = Image.new("RGB", (3, 2), (255, 0, 0))
    features = describe(image, grid_boxes(36))
    assert features.shape == (36, 2048) and features.dtype == np.float16
    np.testing.assert_array_equal(features[:, :6], [[1, 0, 0, 0, 0, 0]] * 36)
    with pytest.raises(DataError, match="at least 426"):
        describe(image, grid_boxes(1), 100)


def test_bad_pictures_and_sentences(pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.json"

    def read(entries: object, **options: bool) -> list:
        file.write_text(json.dumps(entries))
        return list(read_images(pictures, file, boxes=1, workers=0, **options))

    sentence = {"text": "x", "source": "vqa"}
    cases: list[tuple[object, str]] = [
        ({}, "not a list"),
        ([{"image": "0.png", "sentences": [{"source": "vqa"}]}], r"entry 0 \(0.png\), sentence 0"),
        ([{"image": "../0.png", "sentences": [sentence]}], "out of the folder"),
        ([{"image": "0.png", "sentences": [sentence]}] * 2, "same image as entry 0"),
        ([{"image": "0.png", "sentences": [sentence], "x": 1}], "unknown key 'x'"),
        ([{"image": "0.png", "sentences": [{**sentence, "answers": {"a": 2}}]}], "not 0..1"),
        ([{"image": "no.png", "sentences": [sentence]}], "cannot read the picture .*no.png"),
        ([{"image": "sentences.json", "sentences": [sentence]}], "cannot read the picture"),
    ]
    for entries, message in cases:
        with pytest.raises(DataError, match=message):
            read(entries)
    report = Report()
    file.write_text(
        json.dumps(
            [
                {"image": "no.png", "sentences": [sentence]},
                {"image": "1.png", "sentences": []},
                {"image": "2.png", "sentences": [sentence]},
            ]
        )
    )
    kept = read_images(pictures, file, boxes=1, workers=0, skip_bad=True, report=report)
    assert [r.image for r in kept] == ["2.png"]
    assert report.counts == {"images without sentences": 1, "images that cannot be read": 1}


def test_easy_vqa_and_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = write_easy_vqa(tmp_path / "easy")
    entries = json.loads(written.test_sentences.read_text())
    assert len(entries) == 1000 and sum(len(e["sentences"]) for e in entries) == 9673
    few = tmp_path / "few.json"
    few.write_text(json.dumps(entries[:8]))
    out = tmp_path / "data"
    code = cli(
        *("build", "images", "--images", written.test_images, "--sentences", few, "--boxes", 10),
        *("--answers", written.answers, "--workers", 0, "--vocab-size", 300, "--out", out),
    )
    assert code == 0 and "source       easy_vqa" in capsys.readouterr().out
    assert cli("info", out) == 0
    assert "answers      13" in capsys.readouterr().out
    assert cli("verify", out) == 0
    (out / "answers.json").write_text("[]")
    assert cli("verify", out) == 1
    assert "answers.json has 2 bytes" in capsys.readouterr().out

"""Pictures to features: whose boxes, which features, and what is left when it goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.cli.main import main
from shards.convert.convert import records
from shards.convert.inputs import FeatureInput, Inputs, SentenceInput
from shards.extract.network import Found, load
from shards.extract.pooling import pool_boxes
from shards.sources.features import tsv as of_tsv
from shards.sources.features.tars import FORMAT
from shards.sources.regions import Options, Regions
from tests.conftest import subprocess_environment


def run(*arguments: object) -> int:
    return main(["shards", "extract", *map(str, arguments), "--quiet"])


def regions(folder: Path, dim: int) -> dict[str, Regions]:
    """What was extracted, as a build reads it."""
    options, out = Options(feature_dim=dim), {}
    for tar in FORMAT.files(str(folder)):
        with FORMAT.reader(tar, options) as read:
            for entry in FORMAT.entries(tar, options):
                assert not entry.problem
                out[entry.image] = read(entry)
    return out


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DETR with random weights, whose map is 64 wide; it stands for the hub's."""
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor, ResNetConfig

    torch.manual_seed(0)
    last: dict[str, Any] = {"out_features": ["stage4"]}
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 32, 64],
        depths=[1, 1, 1, 1],
        **last,
    )
    sizes: dict[str, Any] = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_model"), 16)
    sizes |= {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    sizes |= {"num_labels": 5}
    config = DetrConfig(
        backbone_config=backbone,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=20,
        **sizes,
    )
    folder = tmp_path_factory.mktemp("detr")
    DetrForObjectDetection(config).save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 96}
    DetrImageProcessor(size=size).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Nine random pictures of several sizes, one of them in a folder below."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for i in range(9):
        pixels = rng.integers(0, 256, (40 + 3 * i, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / (f"below/{i}.png" if i == 8 else f"{i}.png"))
    return folder


# --- pooling ------------------------------------------------------------------------------------


def bilinear(map_: np.ndarray, x: float, y: float) -> np.ndarray:
    """The value at a point in units of cells, whose centres are at halves; edges go on."""
    height, width = map_.shape[1:]
    x, y = np.clip(x - 0.5, 0, width - 1), np.clip(y - 0.5, 0, height - 1)
    left, top = int(x), int(y)
    right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
    a, b = x - left, y - top
    upper = map_[:, top, left] * (1 - a) + map_[:, top, right] * a
    lower = map_[:, bottom, left] * (1 - a) + map_[:, bottom, right] * a
    return np.asarray(upper * (1 - b) + lower * b)


def test_pooling_is_the_mean_of_bilinear_samples() -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(5, 6, 9)).astype(np.float32)
    boxes = np.asarray([[0, 0, 1, 1], [0.1, 0.2, 0.3, 0.9], [0.5, 0.5, 0.5, 0.5]], np.float32)
    valid = np.asarray([0.8, 0.9], np.float32)
    found = pool_boxes(*map(torch.from_numpy, (features, boxes, valid)))
    for box, row in zip(boxes, found.numpy(), strict=True):
        steps = (np.arange(14) + 0.5) / 14
        xs = (box[0] + (box[2] - box[0]) * steps) * valid[0] * 9
        ys = (box[1] + (box[3] - box[1]) * steps) * valid[1] * 6
        due = np.mean([bilinear(features, x, y) for y in ys for x in xs], axis=0)
        np.testing.assert_allclose(row, due, rtol=1e-4, atol=1e-5)


def test_a_box_has_the_features_of_what_is_in_it() -> None:
    planted = torch.zeros(2, 10, 20)
    planted[0, 4:8, 10:16] = 3.0
    planted[1] = 1.0
    boxes = torch.tensor([[0.5, 0.4, 0.8, 0.8], [0.0, 0.0, 0.3, 0.2]])
    inside, outside = pool_boxes(planted, boxes, torch.ones(2))
    assert inside[0] > 2.5 and outside[0] == 0 and inside[1] == outside[1] == 1


# --- whose boxes --------------------------------------------------------------------------------


def test_a_detectors_boxes_and_features(tmp_path: Path, pictures: Path, detector: Path) -> None:
    arguments = (pictures, "--detector", detector, "--min-boxes", 4, "--max-boxes", 6)
    assert run(*arguments, "--out", tmp_path / "a") == 0
    assert run(*arguments, "--out", tmp_path / "b") == 0
    (a,), (b,) = (sorted((tmp_path / n).glob("*.tar")) for n in "ab")
    assert a.read_bytes() == b.read_bytes(), "the same pictures give the same bytes"
    found = regions(tmp_path / "a", 64)
    assert sorted(found) == [*(f"{i}.png" for i in range(8)), "below/8.png"]
    network = load(str(detector), True, "cpu")
    for name, one in found.items():
        assert 4 <= len(one.boxes) <= 6 and one.labels is not None
        assert one.labels.object_id.max() < 5 and not one.labels.attribute_conf.any()
        assert (np.diff(one.labels.object_conf) <= 0).all()
        with Image.open(pictures / name) as picture:
            assert (one.width, one.height) == picture.size
            (seen,) = network.look([picture.convert("RGB")])
        alone = seen.features(one.boxes)
        assert np.corrcoef(alone.ravel(), one.features.astype(np.float32).ravel())[0, 1] > 0.9


def test_a_backbone_sees_the_whole_picture(tmp_path: Path) -> None:
    """And not what a classifier's preparation leaves of it, which cuts the edges off."""
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32]}
    ResNetModel(ResNetConfig(depths=[1, 1, 1, 1], **sizes)).save_pretrained(tmp_path / "resnet")
    ConvNextImageProcessor().save_pretrained(tmp_path / "resnet")
    folder = tmp_path / "pictures"
    folder.mkdir()
    wide = Image.new("RGB", (400, 100), (255, 255, 255))
    wide.paste((255, 0, 0), (360, 0, 400, 100))
    wide.save(folder / "000000000001.png")
    Image.new("RGB", (100, 200), (255, 255, 255)).save(folder / "000000000002.png")
    boxes = [[0, 0, 40, 100], [360, 0, 40, 100], [160, 0, 40, 100]]
    found = [{"image_id": 1, "bbox": b, "category_id": 3} for b in boxes]
    found += [{"image_id": 2, "bbox": [0, 0, 100, 200], "category_id": 3}]
    (tmp_path / "boxes.json").write_text(
        json.dumps({"categories": [{"id": 3}], "annotations": found})
    )
    arguments = (folder, "--boxes", tmp_path / "boxes.json", "--backbone", tmp_path / "resnet")
    assert run(*arguments, "--out", tmp_path / "f") == 0
    rows = regions(tmp_path / "f", 32)["000000000001.png"].features.astype(np.float32)
    left, right, middle = rows
    # Edges differ from the middle, too: what pads a convolution is black.
    assert np.abs(left - right).max() > 2 * np.abs(left - middle).max()


def test_how_many_boxes() -> None:
    boxes = np.tile(np.asarray([0, 0, 1, 1], np.float32), (5, 1))
    boxes[3] = [0.5, 0, 0.5, 1]  # empty
    score = np.asarray([0.1, 0.9, 0.3, 0.95, 0.2], np.float32)
    found = Found(boxes, np.arange(5), score)
    for least, most, threshold, due in (
        (1, 9, 0.25, [1, 2]),
        (3, 9, 0.25, [1, 2, 4]),
        (1, 1, 0.0, [1]),
        (9, 9, 0.9, [1, 2, 4, 0]),
    ):
        labels = found.best(least, most, threshold).labels
        assert labels is not None and labels.object_id.tolist() == due
    with pytest.raises(ValueError, match="finds no box"):
        Found(boxes[3:4], np.arange(1), score[:1]).best(1, 9, 0)


def test_human_boxes_and_captions(shared_data: Path, tmp_path: Path) -> None:
    """COCO's own: boxes, classes and captions of photographs become a data set's records."""
    coco = shared_data / "tiny_coco"
    boxes = coco / "annotations/instances_val2017.json"
    status = run(coco / "val2017", "--boxes", boxes, "--feature-dim", 512, "--out", tmp_path / "f")
    document = json.loads(boxes.read_text())
    numbers = {
        c["id"]: i for i, c in enumerate(sorted(document["categories"], key=lambda c: c["id"]))
    }
    due: dict[int, list[Any]] = {}
    for a in document["annotations"]:
        if not a["iscrowd"]:
            due.setdefault(a["image_id"], []).append((a["bbox"], numbers[a["category_id"]]))
    assert status == 1, "photographs without boxes are failures"
    (failures,) = (tmp_path / "f").glob("*.failures.jsonl")
    failed = [json.loads(line) for line in failures.read_text().splitlines()]
    assert len(failed) == 50 - len(due) and "has no box of it" in failed[0]["reason"]
    sentences = SentenceInput((coco / "annotations/captions_val2017.json",))
    inputs = Inputs((FeatureInput(str(tmp_path / "f")),), (sentences,))
    found = list(records(inputs, options=Options(feature_dim=512), skip_bad=True))
    assert len(found) == len(due) and all(len(r.sentences) == 5 for r in found)
    for record in found:
        wanted = due[int(record.image.removesuffix(".jpg"))]
        size = np.asarray([record.width, record.height] * 2)
        assert record.labels is not None
        assert record.labels.object_id.tolist() == [label for _, label in wanted]
        for box, ((x, y, w, h), _) in zip(record.boxes, wanted, strict=True):
            np.testing.assert_allclose(box * size, [x, y, x + w, y + h], atol=0.1)


def test_the_boxes_of_other_features(
    shared_data: Path, tmp_path: Path, detector: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of bottom-up-attention's rows, on the photographs that they describe."""
    tsv = shared_data / "butd_train2014_obj36_10rows.tsv"
    arguments = (shared_data / "photos", "--boxes", tsv, "--out", tmp_path / "f")
    assert run(*arguments, "--detector", detector) == 0
    found = {r.image.removesuffix(".jpg"): r for r in regions(tmp_path / "f", 64).values()}
    with of_tsv.FORMAT.reader(str(tsv), Options()) as read:
        for entry in of_tsv.FORMAT.entries(str(tsv), Options()):
            given_row, row = read(entry), found[entry.image]
            np.testing.assert_array_equal(row.boxes, given_row.boxes)
            assert row.labels is not None and given_row.labels is not None
            np.testing.assert_array_equal(row.labels.object_id, given_row.labels.object_id)
            np.testing.assert_array_equal(
                row.labels.attribute_conf, given_row.labels.attribute_conf
            )
            assert row.features.shape == (36, 64)
    assert run(*arguments) == 2, "regions of the pixels are no substitutes for a network's"
    assert "the regions there were made otherwise" in capsys.readouterr().err


# --- partitions, kills, failures ----------------------------------------------------------------


def test_partitions_together_are_all(tmp_path: Path, pictures: Path) -> None:
    for i in range(1, 4):
        arguments = (pictures, "--grid", 1, "--feature-dim", 512, "--partition", f"{i}/3")
        assert run(*arguments, "--out", tmp_path / "f") == 0
    assert len(list((tmp_path / "f").glob("*.tar"))) == 3
    assert len(regions(tmp_path / "f", 512)) == 9


_SCRIPT = """
import sys
import shards.extract.extract
from cluster.cli.main import main
shards.extract.extract._IN_TAR = 3
if __name__ == "__main__":
    sys.exit(main())
"""


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(60):
        Image.new("RGB", (300, 300), (i, 0, 0)).save(folder / f"{i:02}.png")
    (tmp_path / "run.py").write_text(_SCRIPT)
    line = [sys.executable, str(tmp_path / "run.py"), "shards", "extract", str(folder)]
    line += ["--grid", "36", "--feature-dim", "512", "--quiet", "--out"]
    out = tmp_path / "f"
    process = subprocess.Popen([*line, str(out)], env=subprocess_environment())
    while len(list(out.glob("*.tar"))) < 2:
        assert process.poll() is None, "it has ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = {p: p.stat().st_ino for p in out.glob("*.tar")}
    for place in (out, tmp_path / "again"):
        subprocess.run([*line, str(place)], env=subprocess_environment(), check=True)
    assert {p: p.stat().st_ino for p in whole} == whole, "what was whole is made again"
    tars = sorted(p.name for p in out.glob("*.tar"))
    assert len(tars) == 20 and all(
        (out / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in tars
    )


def test_failures_are_listed_and_tried_again(tmp_path: Path, pictures: Path) -> None:
    whole = (pictures / "3.png").read_bytes()
    (pictures / "3.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "4.png").write_bytes(b"no picture")
    arguments = (pictures, "--grid", 1, "--feature-dim", 512, "--out", tmp_path / "f")
    assert run(*arguments) == 1
    (listed,) = (tmp_path / "f").glob("*.failures.jsonl")
    names = [json.loads(line)["image"] for line in listed.read_text().splitlines()]
    assert names == ["3.png", "4.png"]
    assert run(*arguments, "--retry-failed") == 1, "nothing is mended"
    (pictures / "3.png").write_bytes(whole)
    assert run(*arguments, "--retry-failed") == 1
    assert [json.loads(x)["image"] for x in listed.read_text().splitlines()] == ["4.png"]
    Image.new("L", (5, 5)).save(pictures / "4.png")
    assert run(*arguments, "--retry-failed") == 0 and not listed.exists()
    assert run(*arguments, "--retry-failed") == 0 == run(*arguments)
    assert len(regions(tmp_path / "f", 512)) == 9, "each once"


def test_pictures_of_any_kind(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for mode, end in (
        ("CMYK", "jpg"),
        ("P", "png"),
        ("I;16", "png"),
        ("RGBA", "png"),
        ("1", "bmp"),
    ):
        Image.new(mode, (7, 5)).save(folder / f"{mode.replace(';', '')}.{end}")
    turned = Image.new("RGB", (8, 4))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be shown turned; COCO's boxes are of the pixels as they are stored
    turned.save(folder / "turned.jpg", exif=exif)
    os.symlink(folder / "P.png", folder / "link.png")
    assert run(folder, "--grid", 1, "--feature-dim", 512, "--out", tmp_path / "f") == 0
    found = regions(tmp_path / "f", 512)
    assert len(found) == 7 and (found["turned.jpg"].width, found["turned.jpg"].height) == (8, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "say where regions are"),
        (("--detector", "x", "--backbone", "y"), "give --detector or --backbone"),
        (("--detector", "x", "--min-boxes", "50"), "--min-boxes 50 is more"),
        (("--detector", "/nowhere"), "cannot load the detector /nowhere"),
        (("--boxes", "/nowhere"), "cannot read /nowhere"),
        (("--grid", "7"), "there is no grid of 7 boxes"),
        (("--grid", "1", "--partition", "3/2"), "is not I/N"),
    ],
)
def test_what_makes_no_sense(
    tmp_path: Path,
    pictures: Path,
    arguments: tuple,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        status = run(pictures, "--out", tmp_path / "f", *arguments)
    except SystemExit as end:
        status = int(str(end.code))
    assert status == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.glob("f/*.tar"))

"""Detectors and backbones of Hugging Face's: whose boxes are kept, and what features come from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from shards.errors import DataError, NodeError
from shards.extract.found import Found
from shards.extract.network import Network, Seen, load
from shards.extract.pooling import pool_boxes
from tests.shards.extract.runs import regions, run


def looked(network: Network, picture: Image.Image) -> Seen:
    (seen,) = network.look([picture])
    assert isinstance(seen, Seen), seen
    return seen


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
            seen = looked(network, picture.convert("RGB"))
        alone = seen.features(one.boxes)
        assert np.corrcoef(alone.ravel(), one.features.astype(np.float32).ravel())[0, 1] > 0.9
        assert len(np.unique(one.boxes, axis=0)) == len(one.boxes), "a box is there once"


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
    images = [{"id": i, "file_name": f"{i:012}.png"} for i in (1, 2)]
    (tmp_path / "boxes.json").write_text(
        json.dumps({"images": images, "categories": [{"id": 3}], "annotations": found})
    )
    arguments = (folder, "--boxes", tmp_path / "boxes.json", "--backbone", tmp_path / "resnet")
    assert run(*arguments, "--out", tmp_path / "f") == 0
    rows = regions(tmp_path / "f", 32)["000000000001.png"].features.astype(np.float32)
    left, right, middle = rows
    # Edges differ from the middle, too: what pads a convolution is black.
    assert np.abs(left - right).max() > 2 * np.abs(left - middle).max()


def test_how_many_boxes() -> None:
    """The surest, none of them empty, and none that repeats a surer one."""
    corners = [[0, 0, 0.2, 0.2], [0.5, 0, 1, 1], [0, 0.5, 0.2, 1], [0.5, 0, 0.5, 1], [0, 0, 1, 0.2]]
    corners += [[0.5, 0, 1, 1], [0.5, 0.1, 1, 1], [0.5, 0.1, 1, 1]]
    boxes = np.asarray(corners, np.float32)
    score = np.asarray([0.1, 0.9, 0.3, 0.95, 0.2, 0.8, 0.7, 0.15], np.float32)
    # The last three: the second by another class, nearly it by its class, and by another.
    found = Found(boxes, np.asarray([0, 1, 2, 3, 4, 5, 1, 7]), score)
    for least, most, threshold, due in (
        (1, 9, 0.25, [1, 2]),
        (3, 9, 0.25, [1, 2, 4]),
        (1, 1, 0.0, [1]),
        (9, 9, 0.9, [1, 2, 4, 7, 0]),
        (9, 3, 0.9, [1, 2, 4]),
    ):
        labels = found.best(least, most, threshold).labels
        assert labels is not None and labels.object_id.tolist() == due
    with pytest.raises(ValueError, match="finds no box"):
        Found(boxes[3:4], np.arange(1), score[:1]).best(1, 9, 0)


def vit(folder: Path) -> None:
    """A ViT with random weights, patches of 8 and 16 wide."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "image_size": 64, "patch_size": 8}
    ViTModel(ViTConfig(**sizes)).save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)


def test_patches_are_a_map(tmp_path: Path) -> None:
    """Those of a picture in their places: what is at its right end is at the map's."""
    vit(tmp_path)
    network = load(str(tmp_path), False, "cpu")
    plain = Image.new("RGB", (30, 10))
    marked = plain.copy()
    marked.paste((255, 255, 255), (25, 0, 30, 10))
    difference = (looked(network, marked).map - looked(network, plain).map).abs().sum(0)
    assert difference.shape == (41, 125), "1,000 × 333 pixels by 8"
    # Attention spreads it a little over all.
    assert difference[:, 106:].min() > 3 * difference[:, :103].max()
    assert looked(network, plain).valid.tolist() == pytest.approx([1.0, 333 / 328])


def test_yolos_takes_no_padding_for_a_picture(tmp_path: Path) -> None:
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "image_size": [64, 96], "patch_size": 8}
    config = YolosConfig(num_detection_tokens=20, **sizes | {"num_labels": 5})
    YolosForObjectDetection(config).save_pretrained(tmp_path)
    size = {"shortest_edge": 64, "longest_edge": 96}
    YolosImageProcessor(size=size).save_pretrained(tmp_path)
    network = load(str(tmp_path), True, "cpu")
    pictures = [Image.new("RGB", size, (200, 30, 30)) for size in ((64, 32), (32, 64))]
    for seen, picture in zip(network.look(pictures), pictures, strict=True):
        alone = looked(network, picture)
        assert isinstance(seen, Seen) and seen.found is not None and alone.found is not None
        assert seen.map.shape[0] == 16 and torch.equal(seen.map, alone.map)
        np.testing.assert_array_equal(seen.found.boxes, alone.found.boxes)


def test_a_picture_that_a_model_cannot_take_is_a_failure(detector: Path) -> None:
    """And those beside it are none."""
    network = load(str(detector), True, "cpu")
    good, thin = Image.new("RGB", (40, 30)), Image.new("RGB", (20_000, 1))
    first, second, third = network.look([good, thin, good])
    assert isinstance(first, Seen) and isinstance(third, Seen)
    assert isinstance(second, str) and "cannot look at it" in second


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (torch.OutOfMemoryError, DataError, "no memory for 2 pictures .* a smaller --batch"),
        (torch.AcceleratorError, NodeError, "cpu failed: bad luck; run the same command again"),
    ],
)
def test_a_devices_fault_is_no_pictures(
    tmp_path: Path, error: type[Exception], kind: type[Exception], text: str
) -> None:
    vit(tmp_path)
    network = load(str(tmp_path), False, "cpu")

    def fails(_module: object, _inputs: object) -> None:
        raise error("bad luck")

    network.model.register_forward_pre_hook(fails)
    with pytest.raises(kind, match=text):
        network.look([Image.new("RGB", (20, 20))] * 2)


def test_a_models_name_is_of_its_weights(tmp_path: Path) -> None:
    """Not of the folder that it is in, which differs between machines."""
    for seed, place in enumerate(("a/vit", "b/vit")):
        torch.manual_seed(seed)
        vit(tmp_path / place)
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    names = [load(str(tmp_path / p / "vit"), False, "cpu").name for p in "abc"]
    assert names[0] == names[2] != names[1] and names[0].startswith("vit@")


def test_models_that_are_of_no_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import SwinConfig, SwinModel, ViTImageProcessor

    def refused(place: object, text: str, detects: bool = False, device: str = "cpu") -> None:
        with pytest.raises(DataError, match=text) as error:
            load(str(place), detects, device)
        assert "\n" not in str(error.value)

    vit(tmp_path / "vit")
    refused(tmp_path / "vit", "cannot load the detector .*Unrecognized configuration", detects=True)
    refused(tmp_path / "vit", "cannot load .* on gpu: ", device="gpu")
    weights = tmp_path / "vit/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(tmp_path / "vit", "cannot load the backbone .*not fully covered")
    config: dict[str, Any] = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1]}
    SwinModel(SwinConfig(image_size=64, window_size=4, **config)).save_pretrained(tmp_path / "swin")
    ViTImageProcessor().save_pretrained(tmp_path / "swin")
    refused(tmp_path / "swin", "is not to be used: .*it has no map .* choose a detector with")
    (tmp_path / "timm").mkdir()  # as the hub's facebook/detr-resnet-101 describes itself
    save_file({}, tmp_path / "timm/model.safetensors")
    document = {"model_type": "detr", "use_timm_backbone": True, "backbone": "resnet101"}
    (tmp_path / "timm/config.json").write_text(json.dumps(document))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("nobody/detector", "cannot load the detector nobody/detector .*a network", detects=True)
    try:
        import timm  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        refused(tmp_path / "timm", "timm library.*--revision no_timm", detects=True)

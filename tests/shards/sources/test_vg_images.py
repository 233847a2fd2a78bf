"""Images of Visual Genome that are COCO's, as image_data.json says."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.errors import DataError
from shards.sources.vg_images import NO_VG_IMAGES, load_vg_images

PUBLISHED = """[
    {"width": 800, "url": "https://x/VG_100K/2.jpg", "height": 600, "image_id": 2,
     "coco_id": null, "flickr_id": null},
    {"width": 640, "url": "https://x/VG_100K/71.jpg", "height": 480, "image_id": 71,
     "coco_id": 318556, "flickr_id": 1},
    {"width": 640, "url": "https://x/VG_100K/9.jpg", "height": 480, "image_id": 9,
     "coco_id": 4, "flickr_id": 1}]"""


def test_images_of_both(tmp_path: Path) -> None:
    path = tmp_path / "image_data.json"
    path.write_text(PUBLISHED)
    vg = load_vg_images(path)
    assert (vg.vg.tolist(), vg.coco.tolist()) == ([9, 71], [4, 318556])
    assert [vg.resolve(f"vg/{n}") for n in (2, 9, 71, 72)] == [
        "vg/2", "coco/4", "coco/318556", "vg/72",
    ]  # fmt: skip
    assert vg.resolve("coco/9") == "coco/9"


@pytest.mark.parametrize(
    "name", ["vg/cat", "vg/", "vg/a/9", "vg/\u00b2", "vg/9_", "vg/" + "9" * 5000]
)
def test_names_that_only_look_so(name: str) -> None:
    """Pictures may lie in a folder `vg`."""
    assert NO_VG_IMAGES.resolve(name) == name


@pytest.mark.parametrize(
    "entry",
    ['{"id": 1}', "3", '{"image_id": true}', '{"image_id": 1, "coco_id": "4"}',
     '{"image_id": 1, "coco_id": -4}', f'{{"image_id": {10**30}, "coco_id": 1}}',
     f'{{"image_id": 1, "coco_id": {10**30}}}'],
)  # fmt: skip
def test_what_is_no_such_file(tmp_path: Path, entry: str) -> None:
    path = tmp_path / "image_data.json"
    path.write_text(f'[{{"image_id": 5, "coco_id": 6}}, {entry}]')
    with pytest.raises(DataError, match=r"image_data.json: entry 1 has no image_id and coco_id"):
        load_vg_images(path)


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "image_data.json"
    path.write_text(PUBLISHED[:-40])
    with pytest.raises(DataError, match=r"image_data.json is not JSON: .* at character"):
        load_vg_images(path)

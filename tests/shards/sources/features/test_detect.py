"""Each place is taken for what it is, and for nothing else."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.sources.features import (
    arrays,
    gqa_hdf5,
    grid,
    parquet,
    tars,
    tsv,
    uniter_lmdb,
    vinvl,
    volta_lmdb,
)
from tests.shards.convert.inputs import make_row, tsv_bytes
from tests.shards.sources.features import test_lmdb as lmdbs
from tests.shards.sources.features.stores import picture
from tests.shards.sources.features.test_gqa_hdf5 import write as write_gqa

FORMATS = [
    f.FORMAT for f in (tsv, vinvl, volta_lmdb, uniter_lmdb, gqa_hdf5, parquet, tars, arrays, grid)
]


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    p = picture("a")
    (tmp_path / "a.tsv").write_bytes(tsv_bytes([make_row("a")]))
    (tmp_path / "a6.tsv").write_bytes(tsv_bytes([make_row("1", 6)]))
    text = base64.b64encode(p.features.tobytes()).decode()
    (tmp_path / "v.tsv").write_text(f"1\t3\t{text}\n")
    for name in ("arrays", "pictures", "vinvl"):
        (tmp_path / name).mkdir()
    (tmp_path / "vinvl" / "features.tsv").write_text(f"1\t3\t{text}\n")
    np.savez(tmp_path / "arrays" / "a.npz", x=p.features)
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "a.tar").write_bytes(bytes(1024))
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text(json.dumps({}))
    return {
        "a.tsv": tmp_path / "a.tsv",
        "a6.tsv": tmp_path / "a6.tsv",
        "v.tsv": tmp_path / "v.tsv",
        "vinvl": tmp_path / "vinvl",
        "volta": lmdbs.write_volta(tmp_path / "volta", {"a": lmdbs.vilbert(p)}),
        "uniter": lmdbs.write_uniter(tmp_path / "uniter", {"a": p}),
        "gqa": write_gqa(tmp_path / "gqa", [[p]]),
        "a.parquet": tmp_path / "a.parquet",
        "saved": tmp_path / "saved",
        "a.tar": tmp_path / "a.tar",
        "arrays": tmp_path / "arrays",
        "pictures": tmp_path / "pictures",
    }


def test_one_format_a_place(places: dict[str, Path]) -> None:
    due = {
        "a.tsv": tsv, "a6.tsv": tsv, "v.tsv": vinvl, "vinvl": vinvl, "volta": volta_lmdb,
        "uniter": uniter_lmdb, "gqa": gqa_hdf5, "a.parquet": parquet, "saved": parquet,
        "a.tar": tars, "arrays": arrays, "pictures": grid,
    }  # fmt: skip
    for name, place in places.items():
        found = [f.name for f in FORMATS if f.detect(str(place))]
        assert found == [due[name].FORMAT.name], name

"""Our tars by megatron-energon, which comes with the benchmarks (`make bench`)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from shards.format.build import BuildSettings, build
from tests.conftest import MakeRecords, files_of


def test_energon_reads_our_tars(tmp_path: Path, make_records: MakeRecords) -> None:
    energon = pytest.importorskip("megatron.energon", reason="megatron-energon is not installed")
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    records = make_records(7, labels=True)
    build(records, tmp_path / "set", BuildSettings("set", "test", images_per_shard=4))
    folder = files_of(tmp_path / "set")
    names = sorted(p.name for p in folder.glob("*.tar"))
    WebdatasetPreparator.prepare_dataset(
        folder, names, split_parts_ratio=[("train", 1.0)], workers=1
    )
    (folder / ".nv-meta/dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    )

    class Crude(energon.DefaultTaskEncoder):  # type: ignore[name-defined]
        decoder = None
        cookers = (energon.Cooker(energon.stateless(lambda sample: sample)),)

        @energon.stateless
        def batch(self, samples: list) -> list:
            return samples

    data = energon.get_train_dataset(
        folder,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=7,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Crude(),
    )
    found = {json.loads(s["json"])["image"]: s for s in next(iter(energon.get_loader(data)))}
    assert len(found) == 7
    for record in records:
        raw = np.frombuffer(found[record.image]["features.f16"], "<f2")
        np.testing.assert_array_equal(raw.reshape(record.features.shape), record.features)

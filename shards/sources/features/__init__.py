"""Formats of features, a module with a `FORMAT` each; shards.sources.regions says what one is.

    tsv           bottom-up-attention TSV
    vinvl         VinVL TSV
    volta_lmdb    LMDB of VOLTA and ViLBERT
    uniter_lmdb   LMDB of UNITER
    gqa_hdf5      GQA's object features
    parquet       Parquet, and Hugging Face `datasets` on disk
    tars          WebDataset tars of anybody's RoI records
    arrays        a folder of .npz or .npy
    grid          a folder of pictures

A new format is its module and a line of the table below; one of somebody else's is named by its
module's path: `--features-format package.module`.
"""

from __future__ import annotations

from shards.errors import DataError
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
from shards.sources.plug_ins import plug_in
from shards.sources.regions import FeatureFormat
from shards.store import objects

FORMATS: dict[str, FeatureFormat] = {
    f.name: f
    for f in (
        tsv.FORMAT,
        vinvl.FORMAT,
        volta_lmdb.FORMAT,
        uniter_lmdb.FORMAT,
        gqa_hdf5.FORMAT,
        parquet.FORMAT,
        tars.FORMAT,
        arrays.FORMAT,
        grid.FORMAT,
    )
}
"""By name, in the order in which they are tried."""


def feature_format(place: str, name: str | None) -> FeatureFormat:
    """The format of that name, a plug-in's module path among them, or the one that a place is
    detected to be. DataError where there is none."""
    if name is not None:
        return FORMATS.get(name) or plug_in(name, FeatureFormat, "features", FORMATS)
    path = objects.local_path(place)
    if path is not None and not path.exists() and "{" not in place:
        raise DataError(f"cannot read {place}: no such file or folder")
    for found in FORMATS.values():
        try:
            if found.detect(place):
                return found
        except OSError as error:
            raise DataError(f"cannot read {place}: {error.strerror}") from None
    raise DataError(
        f"{place} is of no format of features that is known ({', '.join(FORMATS)}): name it with "
        "--features-format, see `lxscale shards formats`"
    )

"""Readers of users' files: each yields image records, which `shards.format.build` writes.

    source        what a kind of input offers to `lxscale shards build`
    tsv           bottom-up-attention TSVs, with
    aggregated    LXMERT's aggregated sentences
    images        a folder of pictures and a JSON of sentences; regions are a grid
    webdataset    tars of anybody's RoI records, with
    tars          samples of tars, read to a proven end, and
    members       values in their members
    easy_vqa      the easy-VQA package, as input of `images`
    checks        what sources check alike

A new source is its file with a `SOURCE`, and a row of the table below.
"""

from shards.sources import images, tsv, webdataset
from shards.sources.source import Source

SOURCES: dict[str, Source] = {
    "tsv": tsv.SOURCE,
    "images": images.SOURCE,
    "webdataset": webdataset.SOURCE,
}
"""By the name that `lxscale shards build` takes."""

"""Formats of sentences, a module with a `FORMAT` each; shards.sources.texts says what one is.

    aggregated    LXMERT's aggregated sentences
    pictures      our JSON of pictures and sentences
    coco          COCO captions
    vg_regions    Visual Genome region descriptions
    vg_qa         Visual Genome questions and answers
    vqa           VQA v2 questions and annotations
    gqa           GQA questions
    nlvr2         NLVR2 statements
    rows          CSV or JSON lines of image, sentence, answers

A new format is its module and a line of the table below; one of somebody else's is named by its
module's path: `--sentences package.module:FILE`.
"""

from __future__ import annotations

from pathlib import Path

from shards.errors import DataError
from shards.sources.plug_ins import plug_in
from shards.sources.sentences import (
    aggregated,
    coco,
    gqa,
    nlvr2,
    pictures,
    rows,
    vg_qa,
    vg_regions,
    vqa,
)
from shards.sources.texts import SentenceFormat

FORMATS: dict[str, SentenceFormat] = {
    f.name: f
    for f in (
        aggregated.FORMAT,
        pictures.FORMAT,
        vqa.FORMAT,
        coco.FORMAT,
        vg_regions.FORMAT,
        vg_qa.FORMAT,
        gqa.FORMAT,
        nlvr2.FORMAT,
        rows.FORMAT,
    )
}
"""By name, in the order in which they are tried."""


def sentence_format(path: Path, name: str | None) -> SentenceFormat:
    """The format of that name, a plug-in's module path among them, or the one that a file is
    detected to be. DataError where there is none."""
    if name is not None:
        return FORMATS.get(name) or plug_in(name, SentenceFormat, "sentences", FORMATS)
    try:
        for found in FORMATS.values():
            if found.detect(path):
                return found
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    raise DataError(
        f"{path} is of no format of sentences that is known ({', '.join(FORMATS)}): name it, as in "
        "--sentences FORMAT:FILE, see `lxscale shards formats`"
    )

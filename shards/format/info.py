"""A data set in a few lines, for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shards.format.manifest import Manifest, load_manifest


def info(url: str | Path) -> str:
    """A summary of a data set for people."""
    m = load_manifest(str(url))
    size = sum(s.size + s.table_size for s in m.shards)
    labels = "no labels"
    if m.schema.labels:
        objects, attributes = m.schema.num_object_classes, m.schema.num_attribute_classes
        labels = f"{objects} object and {attributes} attribute classes"
    width = f"{m.schema.feature_dim}"
    if m.schema.feature_type != "fp16":
        width += f" in {m.schema.feature_type}"
    lines = [
        f"name         {m.name}",
        f"extractor    {m.extractor}",
        f"fingerprint  {m.fingerprint}",
        f"images       {m.images:,}{' records of two' if m.schema.sides else ''}",
        f"pairs        {m.pairs:,}",
        f"shards       {len(m.shards)} ({size / 1e6:,.1f} MB)",
        f"objects      up to {m.schema.max_objects} of width {width}, {labels}",
        f"vocabulary   {m.schema.vocab_size:,} tokens, sentences of up to {m.schema.max_tokens}",
        f"answers      {m.answers.count:,}",
        *_sources(m, m.sources),
    ]
    return "\n".join(lines)


def _sources(m: Manifest, sources: Sequence[str]) -> list[str]:
    return [
        f"source       {s}: {m.counts.sentences[s]:,} pairs"
        f"{' (questions)' if s in m.question_sources else ''}"
        for s in sources
    ]

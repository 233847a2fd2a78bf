"""Summaries and records as lines for a terminal. What the data says cannot steer it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence

from shards.inspect.counts import SourceCounts
from shards.inspect.find import Shown
from shards.inspect.histogram import Histogram
from shards.inspect.sample import LabelCounts, Sampled
from shards.inspect.summary import Summary

_BAR = 40  # characters
_WIDTH = 100
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LEVELS = " ▁▂▃▄▅▆▇█"


def plain(text: str) -> str:
    """Text whose characters all can be seen: the others are escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Columns of one width each; the first `left` of them are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def bars(rows: Sequence[tuple[str, int]]) -> list[str]:
    """A bar for each of some counts."""
    most, total = max((n for _, n in rows), default=0), sum(n for _, n in rows)
    names = max((len(name) for name, _ in rows), default=0)
    numbers = len(f"{most:,}")
    return [
        f"  {name:>{names}}  {n:>{numbers},}  {_share(n, total):>6}  {_bar(n, most)}".rstrip()
        for name, n in rows
    ]


def histogram(title: str, h: Histogram, scale: float = 1.0, unit: str = "") -> list[str]:
    """A title with the range, and the bins as bars."""
    if not h.values:
        return [f"{title}: none"]
    spans = [h.span(i, scale) + unit for i in range(len(h.counts))]
    median = "" if h.median is None else f"median {h.median:,.0f}, "
    return [
        f"{title}: {_span(h, scale)}{unit}, {median}mean {h.mean * scale:,.3g}{unit}",
        *bars(list(zip(spans, h.counts, strict=True))),
    ]


def spark(h: Histogram) -> str:
    """A histogram in a word."""
    most = max(h.counts)
    last = len(_LEVELS) - 1
    shape = "".join(_LEVELS[-(-n * last // most)] if most else " " for n in h.counts)
    return f"{_span(h)} {shape}"


def _span(h: Histogram, scale: float = 1.0) -> str:
    a, b = ((f"{v:,.0f}" if h.whole else f"{v * scale:.3g}") for v in (h.least, h.most))
    return f"{a} to {b}"


def _bar(n: int, most: int) -> str:
    eighths = -(-n * _BAR * 8 // most) if most else 0
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _share(n: int, total: int) -> str:
    return f"{100 * n / total:.1f} %" if total else "-"


def _listed(title: str, parts: Iterable[str]) -> list[str]:
    return textwrap.wrap(
        f"{title}: {'; '.join(parts)}",
        _WIDTH,
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


# --- a summary ----------------------------------------------------------------------------------


def summary_lines(summary: Summary) -> Iterator[str]:
    """A summary for a person; what is counted and what is drawn is said."""
    counted, noun = summary.counted, "a record" if summary.sides else "an image"
    if summary.sides:
        records = f"{summary.images:,} records, two pictures a record,"
    else:
        records = f"{summary.images:,} images"
    yield f"All {records} and {summary.pairs:,} sentences"
    yield ""
    yield from histogram(f"objects of {noun}", counted.objects)
    yield from histogram(f"sentences of {noun}", counted.sentences)
    yield from histogram("tokens of a sentence, without [CLS] and [SEP]", counted.tokens)
    yield ""
    yield from _source_lines(summary, counted.sources)
    yield ""
    yield from _sampled_lines(summary, summary.sampled)


def _source_lines(summary: Summary, sources: Sequence[SourceCounts]) -> Iterator[str]:
    limit = summary.max_tokens - 2
    one, many = ("a record", "records") if summary.sides else ("an image", "images")
    head = ("source", "sentences", "share", many, "answered", f"at {limit} tokens")
    rows = [(*head, f"sentences of {one}", "tokens")]
    for s in sources:
        rows.append(
            (
                plain(s.source) + (" (questions)" if s.questions else ""),
                f"{s.sentences:,}",
                _share(s.sentences, summary.pairs),
                f"{s.images:,}",
                _share(s.answered, s.sentences),
                _share(s.at_limit, s.sentences),
                spark(s.per_image),
                spark(s.tokens),
            )
        )
    yield from table(rows)
    if not summary.answers:
        return
    yield ""
    used = summary.counted.answers_used
    yield f"answer table: {summary.answers:,} answers, of which {used:,} are used"
    for s in sources:
        if not s.answers:
            continue
        top = (f"{plain(answer)} {_share(n, s.answered)}" for answer, n in s.answers.top)
        yield from _listed(f"  {plain(s.source)}, best answers", top)
        yield f"    {s.answers.distinct:,} distinct" + "".join(
            f"; {k:,} are {100 * share:.1f} %"
            for k, share in s.answers.coverage.items()
            if k < s.answers.distinct
        )


def _sampled_lines(summary: Summary, s: Sampled) -> Iterator[str]:
    if s.seed is None:
        yield f"All {s.records:,} records, read from the tars"
    else:
        yield (
            f"{s.records:,} records from {s.shards:,} of {summary.shards:,} shards, drawn with "
            f"--seed {s.seed}"
        )
    yield ""
    splits = (f"{plain(split) or '(none)'} {n:,}" for split, n in s.splits)
    yield from _listed("splits", splits)
    yield (
        f"pictures: {s.width[0]:,} to {s.width[1]:,} pixels wide, {s.height[0]:,} to "
        f"{s.height[1]:,} high"
    )
    cut = f"{100 * s.cut:.2f} % of {s.sentences:,}"
    yield f"sentences cut at {summary.max_tokens - 2} tokens: {cut}"
    if s.answered_in_source:
        share = _share(s.answered_in_table, s.answered_in_source)
        yield (
            f"sentences that came with answers: {s.answered_in_source:,}, of which {share} have "
            "one in the answer table"
        )
    yield from histogram(f"area of {s.boxes:,} boxes", s.box_area, 100, " %")
    for what, labels in (("object", s.objects), ("attribute", s.attributes)):
        if labels:
            yield from _label_lines(what, labels)
    yield from _feature_lines(s)


def _label_lines(what: str, labels: LabelCounts) -> Iterator[str]:
    total = labels.confidence.values
    top = (f"{plain(name)} {_share(n, total)} ({sure:.2f})" for _, name, n, sure in labels.top)
    yield from _listed(f"{what} labels, {labels.distinct:,} distinct (with mean confidence)", top)
    yield from histogram(f"confidence in {what} labels", labels.confidence)


def _feature_lines(s: Sampled) -> Iterator[str]:
    f = s.features
    h = f.values
    yield (
        f"features of {f.records:,} records: {h.least:.4g} to {h.most:.4g}, mean {h.mean:.4g}, "
        f"{100 * f.zeros:.1f} % zeros, {100 * f.negative:.1f} % below zero"
    )
    rows = []
    for i, n in enumerate(h.counts):
        a, b = h.edges[i], h.edges[i + 1]
        span = "0" if a < 0 < b else f"{_power(a)} to {_power(b)}"
        if n:
            rows.append((span, n))
    yield from bars(rows)


def _power(value: float) -> str:
    return "0" if abs(value) < 1e-9 else f"{value:g}"


# --- a record -----------------------------------------------------------------------------------


def record_lines(shown: Shown) -> Iterator[str]:
    """A record for a person."""
    d = shown.document()
    yield f"image     {plain(d['image'])}"
    yield f"key       {d['key']}"
    yield f"place     {d['shard']}:{d['index']}, {plain(d['tar'])}"
    for i, picture in enumerate(d.get("pictures", ())):
        yield f"picture {i} {plain(picture['image'])}, {_size(picture)}"
    if "pictures" not in d:
        yield f"size      {_size(d)}"
    yield f"split     {plain(d['split']) if d['split'] else '(none)'}"
    yield ""
    yield f"{len(d['sentences'])} sentences, with their tokens"
    for s in d["sentences"]:
        identity = f" {plain(json.dumps(s['id']))}" if s["id"] is not None else ""
        yield f"  [{plain(s['source'])}{identity}] {plain(s['text'])}"
        yield f"      {' '.join(map(plain, s['tokens']))}{' … cut' if s['cut'] else ''}"
        for answer, score in (s["answers"] or {}).items():
            outside = "" if answer in s["in_table"] else ", not in the answer table"
            yield f"      → {plain(answer)} ({score:g}{outside})"
    yield ""
    labelled = d["objects"][0].get("object_id") is not None
    paired = "pictures" in d
    yield f"{len(d['objects'])} objects, boxes in pixels; features: least, most, mean, zeros"
    head = ["", *(["picture"] if paired else []), "x1", "y1", "x2", "y2"]
    head += ["object", "sure", "attribute", "sure"] if labelled else []
    rows = [[*head, "least", "most", "mean", "zeros"]]
    for i, o in enumerate(d["objects"]):
        row = [str(i), *([str(o["picture"])] if paired else [])]
        row += [f"{v:.1f}" for v in o["pixels"]]
        if labelled:
            row += [plain(o["object"]), f"{o['object_conf']:.2f}"]
            row += [plain(o["attribute"]), f"{o['attribute_conf']:.2f}"]
        f = o["feature"]
        row += [f"{f[name]:.3g}" for name in ("least", "most", "mean")]
        rows.append([*row, f"{100 * f['zeros']:.0f} %"])
    yield from table(rows, left=0)


def _size(picture: Mapping[str, int]) -> str:
    return f"{picture['width']:,} × {picture['height']:,} pixels"

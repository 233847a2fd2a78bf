"""What a model is good at: scores by kind of question, type of answer, number of objects."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from trainer.evaluate import Answered
from trainer.kinds import answer_type, kind_of


class Behaviour:
    """Mean scores by kind of question, by type of answer and by number of objects."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, found: Iterable[Answered]) -> None:
        for a in found:
            if a.answers is None:  # nobody has said what is right
                continue
            kind = kind_of(a.kind, a.question)
            for name in (
                f"kind/{kind}",
                f"answer/{answer_type(a.answers) or 'none'}",
                f"objects/{_binned(a.objects)}",
            ):
                self._sums[name][0] += a.score
                self._sums[name][1] += 1

    def metrics(self, most: int = 30) -> dict[str, float]:
        """Of each of the three the groups with most questions."""
        out: dict[str, float] = {}
        for what in ("kind", "answer", "objects"):
            groups = {n: v for n, v in self._sums.items() if n.partition("/")[0] == what}
            if len(groups) < 2:
                continue  # of one group it is the accuracy of all
            kept = sorted(groups, key=lambda n: -groups[n][1])[:most]
            ordered = [n for n in groups if n in kept]
            ordered.sort(
                key=lambda n: int(n.split("/")[1].split("-")[0]) if what == "objects" else 0
            )
            out |= {f"accuracy/{n}": groups[n][0] / groups[n][1] for n in ordered}
        return out


def _binned(objects: int) -> str:
    """Numbers of objects: each up to 10, then tens."""
    if objects <= 10:
        return str(objects)
    first = (objects - 1) // 10 * 10 + 1
    return f"{first}-{first + 9}"

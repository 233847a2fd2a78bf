"""The rules of VQA's evaluation: an answer's normal form, and its score among the annotators'.

After https://visualqa.org/evaluation.html and the evaluation code that it links to: lower case,
periods outside of decimals and punctuation gone, number words to digits, no articles, apostrophes
in contractions that lack one, as its table has them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_ARTICLES = frozenset({"a", "an", "the"})
# With their apostrophes; without one of them they are found.
_CONTRACTIONS = re.findall(
    r"\S+",
    """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll
    ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at
    shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
    we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd
    who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    y'all'll y'all'd've you'd you'd've you'll you're you've
    """,
)


def _lacking(word: str) -> list[str]:
    """A contraction without each one of its apostrophes."""
    return [word[:i] + word[i + 1 :] for i, c in enumerate(word) if c == "'"]


_APOSTROPHES = {lacking: word for word in _CONTRACTIONS for lacking in _lacking(word)}
_APOSTROPHES["somebody'd"] = "somebodyd"  # so in the official table
_NUMBER_COMMA = re.compile(r"(\d),(\d)")
_PERIOD = re.compile(r"\.(?!\d)")


def normal_answer(answer: str) -> str:
    """The form in which answers are compared."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    grouped = _NUMBER_COMMA.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        # Beside a space a mark separates nothing; within a word it does.
        beside = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside or grouped else " ")
    words = [_DIGITS.get(w, w) for w in _PERIOD.sub("", out).lower().split()]
    return " ".join(_APOSTROPHES.get(w, w) for w in words if w not in _ARTICLES)


def scores(answers: Sequence[str]) -> dict[str, float]:
    """The score of each normal form among what N people answered: the mean over the N ways to leave
    one of them out of min(how many others gave it / 3, 1). With ten: 0.3, 0.6, 0.9, then 1."""
    counts: dict[str, int] = {}
    for answer in answers:
        normal = normal_answer(answer)
        if normal:
            counts[normal] = counts.get(normal, 0) + 1
    people = len(answers)
    return {answer: score(count, people) for answer, count in counts.items()}


def score(count: int, people: int) -> float:
    """That of an answer that `count` of so many people gave."""
    # In thirds, so that 0.3 is 0.3.
    thirds = count * min(count - 1, 3) + (people - count) * min(count, 3)
    return thirds / (3 * people)

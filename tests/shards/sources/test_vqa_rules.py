"""VQA's rules against their definition, and every branch of the normal form."""

from __future__ import annotations

import itertools

import pytest

from shards.sources.vqa_rules import normal_answer, score, scores


def test_scores_are_the_mean_over_nine_of_ten() -> None:
    for people, count in itertools.product((1, 3, 10), range(1, 11)):
        if count > people:
            continue
        gave = [True] * count + [False] * (people - count)
        each = [min(sum(gave[:i] + gave[i + 1 :]) / 3, 1) for i in range(people)]
        assert score(count, people) == pytest.approx(sum(each) / people, abs=1e-12)
    assert [score(n, 10) for n in range(1, 5)] == [0.3, 0.6, 0.9, 1.0]


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("Yes", "yes"),
        ("a man", "man"),
        ("The  dog\n", "dog"),
        ("two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("1.5", "1.5"),
        ("red.", "red"),
        ("u.s.", "us"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("(left)", "left"),
        ("what?!", "what"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),  # this and the following three as in the official table
        ("lets", "lets"),
        ("somebody'd", "somebodyd"),
        ("somebodyd've", "somebody'd've"),
        ("ow's'at", "'ow's'at"),
        ("twas", "'twas"),
        ("o'clock", "o'clock"),
        ("an", ""),
    ],
)
def test_normal_form(given: str, normal: str) -> None:
    assert normal_answer(given) == normal


def test_equal_forms_count_together() -> None:
    assert scores(["Two", "2", "two.", "a 2", *["3"] * 6]) == {"2": 1.0, "3": 1.0}
    assert scores(["the"] * 9 + ["x"]) == {"x": 0.3}

"""Configuration: every wrong key and value is named; the shipped files are valid."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from model.objectives import OBJECTIVES
from trainer.config import RunConfig, load_config, parse_config
from trainer.data.loader import bounds
from trainer.errors import ConfigError
from trainer.sections import weights_section
from trainer.setup import run_length, run_url

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
MINIMAL = "data: {train: d}\ntrain: {steps: 5}\n"


def test_there_are_configurations() -> None:
    assert {p.stem for p in CONFIGS} == {"base", "demo", "tiny"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    config = load_config(path)
    assert parse_config(config.given(), "again") == config


def test_the_base_recipe_is_the_papers() -> None:
    config = load_config(next(p for p in CONFIGS if p.stem == "base"))
    sizes = (config.model.language_layers, config.model.object_layers, config.model.cross_layers)
    assert sizes == (9, 5, 5)
    assert (config.train.epochs, config.train.global_batch) == (20, 256)
    assert (config.optimizer.lr, config.optimizer.warmup) == (1e-4, 0.05)
    assert config.objectives.qa_from_epoch == 10 and config.sampler.mismatch == 0.5


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.global_batsh=3", r"train\.global_batsh: no such key"),
        ("optimiser.lr=3", r"optimiser: no such key"),
        ("train.global_batch=0", r"train\.global_batch: .*greater than or equal to 1"),
        ("train.zero_stage=4", r"train\.zero_stage: .*0, 1, 2 or 3"),
        ("objectives.masked_lm=-1", r"objectives\.masked_lm: .*greater than or equal to 0"),
        ("objectives.mlm=1", r"objectives\.mlm: no such key"),
        ("sampler.mode=random", r"sampler\.mode: .*natural"),
        ("train.epochs=2", r"exactly one of train\.epochs and train\.steps"),
        ("model.num_heads=7", r"model: .*768 is not a multiple of num_heads 7"),
        ("nonsense", r"write it as section\.key=value"),
        ("run.name.first=x", r"name is not a section"),
        ("run.name=[", r"override 'run\.name=\['"),
        ("run.name=2020-99-99", r"override 'run\.name=2020-99-99'"),
        # In plain words: what is expected, and what there is.
        (
            "data.train=3",
            r"data\.train: a folder or s3:// URL .* list of \{url, weight\}.*\(it is 3\)$",
        ),
        ("data.train=[3]", r"data\.train\.0: .*\{key: value.*\(it is 3\)$"),
        ("data.train=[{url: a, wait: 3}]", r"yaml: data\.train\.0\.wait: no such key$"),
        ("data.train=[{weight: 3}]", r"yaml: data\.train\.0\.url: must be given$"),
        ("data.train=[]", r"data: data\.train lists no data set"),
        ("train.init_fresh=answer_head", r"train\.init_fresh: a list .*\[answer_head\]"),
        ("optimizer.no_decay=bias", r"optimizer\.no_decay: a list .*\[bias\]"),
        ("optimizer=null", r"optimizer: .*\{key: value.*\(it is null\)$"),
        ("sampler.source_weights=3", r"sampler\.source_weights: .*\{key: value.*\(it is 3\)$"),
        ("checkpoint.every=x", r'checkpoint\.every: .*integer.*\(it is "x"\)$'),
        # No number, or none that can be worked with.
        ("objectives.qa=.inf", r"objectives\.qa: .*finite"),
        ("objectives.qa=.nan", r"objectives\.qa: .*finite"),
        ("optimizer.lr=.inf", r"optimizer\.lr: .*finite"),
        ("optimizer.clip_norm=.inf", r"optimizer\.clip_norm: .*finite"),
        ("optimizer.betas=[0.9, .nan]", r"optimizer\.betas\.1: .*finite"),
        ("optimizer.betas=[0.9, 1]", r"optimizer\.betas\.1: .*less than 1"),
        ("optimizer.betas=[-0.1, 0.9]", r"optimizer\.betas\.0: .*greater than or equal to 0"),
        ("data.train=[{url: a, weight: .inf}]", r"data\.train\.0\.weight: .*finite"),
        ("data.cache_limit_gb=.inf", r"data\.cache_limit_gb: .*finite"),
        ("sampler.families.qa=.inf", r"sampler\.families\.qa: .*finite"),
        ("sampler.source_weights={vqa: .inf}", r"sampler\.source_weights\.vqa: .*finite"),
        (f"sampler.sentences_per_visit={2**63}", r"sampler\.sentences_per_visit: .*less than"),
        ("model.initializer_range=.inf", r"model\.initializer_range: .*finite"),
        ("run.storage=''", r'run\.storage: "" is no path'),
        *((f"{key}=' '", rf'{key}: " " is no path') for key in ("data.train", "train.init_from")),
        ('run.storage="a\\0b"', r"run\.storage: .* is no path"),
        ("train.steps=!!timestamp x", r"override 'train\.steps=!!timestamp x'"),
        (f"train.steps={'[' * 3000}", r"nested too deep"),
        (f"run.name={'x' * 256}", r"run\.name: .*more than 255 bytes"),
        *(
            (f"run.name={name}", r"run\.name: .*folder under run\.storage.*")
            for name in (
                "''",
                "' '",
                ".",
                "..",
                "../x",
                "a/../../b",
                "/a",
                "a/",
                '"a\\0"',
                "x" * 256,
            )
        ),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run: {name: x}\n" + MINIMAL)
    with pytest.raises(ConfigError, match=message):
        load_config(path, [override])


def number_fields(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, bool]]:
    """The key of every number of a configuration, and whether it is a whole one."""
    for name, field in model.model_fields.items():
        key, kinds = f"{path}{name}", {field.annotation, *get_args(field.annotation)}
        if int in kinds or float in kinds:
            yield key, int in kinds
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from number_fields(kind, f"{key}.")


NUMBERS = dict(number_fields(RunConfig))


def test_all_numbers_are_found() -> None:
    assert len(NUMBERS) > 60
    assert {"sampler.families.qa", "checkpoint.spool", "model.dropout"} <= set(NUMBERS)


@pytest.mark.parametrize("key", NUMBERS)
def test_no_number_is_a_text_infinite_or_beyond_sense(tmp_path: Path, key: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    wrong = ["x", ".nan", ".inf", "-.inf", "nan", "inf", "1e400", "''", "[]"]
    if key != "run.seed":
        wrong.append("-2")
    if NUMBERS[key]:
        wrong += ["1.5", str(10**30)]
    elif key not in ("optimizer.lr", "optimizer.eps", "optimizer.weight_decay") and (
        key not in ("optimizer.clip_norm", "model.initializer_range")
    ):
        wrong.append("1.0e+300")
    for value in wrong:
        with pytest.raises(ConfigError, match=rf"{re.escape(key)}: ") as caught:
            load_config(path, [f"{key}={value}"])
        assert len(str(caught.value)) < 300


PLACES = ("data.train", "data.validation", "data.cache", "run.storage", "run.tensorboard")


@pytest.mark.parametrize("key", [*PLACES, "train.init_from"])
def test_a_place_is_checked_and_has_no_password(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(path, [f"{key}=~/x"])
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) == f"{tmp_path}/x"
    for value, words in (
        ("s3://me:hunter2@bucket/x", "s3://…@bucket/x.*AWS_SECRET_ACCESS_KEY"),
        ("https://h/x?token=hunter2", "https://h/x.*AWS_SECRET_ACCESS_KEY"),
        ("s3://bad_Bucket!/x", "is no bucket's name"),
        ("s3://bucket//x", "an empty name"),
        ("s3:/bucket/x", "no URL of a store"),
        ("~nobody-has-this-name/x", "no user"),
    ):
        with pytest.raises(ConfigError, match=rf"{re.escape(key)}: .*{words}") as caught:
            load_config(path, [f"{key}={value}"])
        assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)


def test_overrides_are_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    config = load_config(
        path,
        ["optimizer.lr=3e-4", "optimizer.no_decay=[bias]", "train.steps=null", "train.epochs=2"],
    )
    assert config.optimizer.lr == 3e-4 and config.optimizer.no_decay == ("bias",)
    assert config.train.steps is None and config.train.epochs == 2


def test_every_objective_has_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    objectives = parse_config({"data": {"train": "d"}, "train": {"steps": 1}}, "test").objectives
    assert objectives.weights() == dict.fromkeys(OBJECTIVES, 1.0)
    # As resolved configurations are stored: the weights come first.
    assert list(objectives.model_dump())[:7] == [*OBJECTIVES, "qa_from_epoch"]
    weights = objectives.weights()
    monkeypatch.setitem(OBJECTIVES, "another", replace(OBJECTIVES["matching"], name="another"))
    section = weights_section().model_validate({"another": 2})
    assert section.model_dump() == {**weights, "another": 2.0}


@pytest.mark.parametrize(
    "text",
    [b"a: [", b"- 1\n- 2\n", b"train: {steps: 5}\n", b"run: {name: 2020-99-99}\n", b"1: 2\n"],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1,\n 2\nb: 3\n", r"line 3, column 2: expected ',' or '\]', but got ':'"),
        ("run:\n  name: b: c\n", "line 2, column 10: mapping values are not allowed here"),
        ("run:\n\tname: x\n", r"line 2, column 1: found character '\\t'"),
        ("run:\n  name: 'x\n", "line 3, column 1: .* a quoted scalar from line 2, column 9 on"),
        ("run: {name: *x}\n", "line 1, column 13: found undefined alias 'x'"),
        ("run:\n  name: 2020-13-01\n", "line 2, column 9: 2020-13-01 is no timestamp"),
        ("run: {seed: !!bool x}\n", "line 1, column 13: x is no bool$"),
        ("run:\n  größe: \x01\n", r"line 2, column 10: the character U\+0001 is not allowed"),
    ],
)
def test_wrong_yaml_is_said_in_one_line_with_its_place(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"run\.yaml is not valid YAML, {message}") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    path.write_text(MINIMAL)
    with pytest.raises(ConfigError, match=r"override .*, line \d, column \d") as caught:
        load_config(path, [f"run={text}"])
    assert "\n" not in str(caught.value)


def test_a_file_is_utf_8(tmp_path: Path) -> None:
    path, text = tmp_path / "run.yaml", "run: {name: größer}\n" + MINIMAL
    for coding in ("utf-8", "utf-8-sig"):
        path.write_text(text, encoding=coding)
        assert load_config(path).run.name == "größer"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"run\.yaml is not UTF-8.*line 1"):
        load_config(path)


def test_a_run_may_lie_deeper_under_its_storage() -> None:
    tree = {"run": {"name": "a/b"}, "data": {"train": "d"}, "train": {"steps": 1}}
    assert run_url(parse_config(tree, "test")) == "runs/a/b"


def test_the_length_of_a_run_counts_pairs_not_rounds() -> None:
    tree = {"data": {"train": "d"}, "train": {"epochs": 2, "global_batch": 10}}
    config = parse_config(tree, "test")
    assert run_length(config, 33, 0, 0).__dict__ == {"total": 66, "steps": 7}
    # Resumed at step 3 with another batch.
    tree["train"] = {"epochs": 2, "global_batch": 12}
    config = parse_config(tree, "test")
    assert run_length(config, 33, 3, 30).__dict__ == {"total": 66, "steps": 6}
    tree["train"] = {"steps": 5, "global_batch": 12}
    config = parse_config(tree, "test")
    assert run_length(config, 33, 3, 30).__dict__ == {"total": 54, "steps": 5}


@pytest.mark.parametrize("count, parts", [(0, 3), (1, 4), (13, 5), (256, 3)])
def test_slices_cover_everything_and_differ_by_one(count: int, parts: int) -> None:
    cuts = [bounds(count, i, parts) for i in range(parts)]
    assert cuts[0][0] == 0 and cuts[-1][1] == count
    assert all(a[1] == b[0] for a, b in pairwise(cuts))
    sizes = [e - b for b, e in cuts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("given", "strict", "sizes"),
    [
        ("2", 0, [2]),
        ("1..4", 0, [1, 2, 3, 4]),
        ("1..4", 12, [1, 2, 3, 4]),
        ("2..6", 8, [2, 4]),
        ("3..3", 0, [3]),
    ],
)
def test_a_run_may_have_these_numbers_of_workers(
    tmp_path: Path, given: str, strict: int, sizes: list[int]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    config = load_config(path, [f"cluster.workers={given}", f"train.strict={strict}"])
    assert list(config.world_sizes) == sizes
    assert parse_config(config.given(), "again") == config


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["cluster.workers=4..1"], "fewest first"),
        (["cluster.workers=0..3"], "at least 1 worker"),
        (["cluster.workers=1..x"], "no range as 1..4"),
        (["cluster.workers=5", "train.strict=12"], "train.strict=12 is divided by none of"),
        (["cluster.workers=7..11", "train.strict=12"], "cluster.workers=7..11"),
    ],
)
def test_a_wrong_number_of_workers_is_named(
    tmp_path: Path, overrides: list[str], said: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    with pytest.raises(ConfigError, match=said):
        load_config(path, overrides)

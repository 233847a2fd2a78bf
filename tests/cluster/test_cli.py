"""The command line itself: what it asks for, and what it costs to ask."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from cluster.cli.main import COMMANDS, main, parse
from shards.sources import SOURCES
from tests.conftest import subprocess_environment

_SHARDS = ("verify", "info", "plan", "audit", "easy-vqa")
_LINES = [
    *([name] for name in COMMANDS),
    *(["shards", name] for name in ("build", *_SHARDS)),
    *(["shards", "build", name] for name in SOURCES),
]


@pytest.mark.parametrize("line", _LINES, ids=" ".join)
def test_every_command_has_help(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*line, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: lxscale {' '.join(line)}")


def test_the_list_of_commands_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom cluster.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'ray', 'numpy', 'pydantic', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=subprocess_environment(), capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(f"    {name} " in done.stdout for name in COMMANDS)


def test_what_a_source_needs_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for name in SOURCES:
        with pytest.raises(SystemExit) as end:
            parse(["shards", "build", name, "--out", "x"])
        assert end.value.code == 2
        assert "the following arguments are required" in capsys.readouterr().err


def test_overrides_may_come_after_options() -> None:
    for line in ("train a.yaml --ray-address x b.c=1", "train --ray-address x a.yaml b.c=1"):
        assert parse(line.split()).overrides == ["b.c=1"]
    assert parse(["demo", "--full", "b.c=1"]).overrides == ["b.c=1"]
    for line in ("train a.yaml -- b.c=1", "train a.yaml --ray-address x -- b.c=1"):
        assert parse(line.split()).overrides == ["b.c=1"]
    line = "train a.yaml d=1 --ray-address x e=2 -- b.c=1 f=-3"
    assert parse(line.split()).overrides == ["d=1", "e=2", "b.c=1", "f=-3"]
    for line in (
        "train a.yaml --ray-address x --wrong",
        "train a.yaml --wrong -- b.c=1",
        "export a --out b c",
        "export a --out b -- c",
    ):
        with pytest.raises(SystemExit):
            parse(line.split())


@pytest.mark.parametrize(
    "out",
    [
        *("", " ", "/", "//", "s3:", "s3://", "s3:///x", "s3:/b/x"),
        *("file:///", "file://host/x", "http://h/x", "memory://x"),
    ],
)
@pytest.mark.parametrize("command", ["shards build images --images x --sentences y", "export x"])
def test_an_output_that_is_no_place_is_refused(
    command: str, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse([*command.split(), "--out", out])
    assert end.value.code == 2
    assert f"argument --out: {out!r}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "option",
    [
        *(f"--shard-mb {value}" for value in ("nan", "inf", "0", "-1", "x")),
        *(f"--images-per-shard {value}" for value in ("0", "-1", "1.5")),
        "--feature-dim 0",
        "--source ''",
    ],
)
@pytest.mark.parametrize("source", ["images --images x --sentences y", "webdataset --tars x"])
def test_a_value_of_no_sense_is_refused_with_its_option(
    source: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse(["shards", "build", *source.split(), "--out", "x", *shlex.split(option)])
    assert end.value.code == 2
    assert f"argument {option.split()[0]}: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("value", ["nan", "inf", "0", "-1"])
def test_a_cache_of_no_size_is_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["shards", "plan", "x", "--cache-limit-gb", value])
    assert "argument --cache-limit-gb: " in capsys.readouterr().err.splitlines()[-1]


def test_an_output_may_end_in_slashes() -> None:
    for out, place in (("a/b//", "a/b"), ("/a", "/a"), ("s3://b/", "s3://b"), (".", ".")):
        assert parse(["export", "x", "--out", out]).out == place


def test_an_error_of_the_users_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "info", "/nowhere/at/all"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no data set at /nowhere/at/all")

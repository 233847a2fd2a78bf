"""The command line itself: what it asks for, and what it costs to ask."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cli.main import COMMANDS, main, parse
from tests.conftest import subprocess_environment

_TOOLS = ("merge", "split", "subset", "push", "pull", "index", "migrate")
_SHARDS = (
    *_TOOLS,
    "extract",
    "answers",
    "formats",
    "inspect",
    "dump",
    "verify",
    "info",
    "plan",
    "audit",
    "easy-vqa",
    "scenes",
    "overlap",
)
_LINES = [
    *([name] for name in COMMANDS),
    *(["shards", name] for name in ("build", *_SHARDS)),
    *(["checkpoint", name] for name in ("ls", "verify", "rm", "export")),
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


def test_commands_on_data_do_without_torch(tmp_path: Path) -> None:
    for command in ("shards", "cache", "checkpoint"):
        code = (
            "import sys\nfrom cluster.cli.main import main\n"
            f"main([{command!r}, *sys.argv[1:]])\n"
            "print(sorted({'torch', 'ray', 'transformers', 'tensorboard'} & set(sys.modules)))"
        )
        given = {
            "shards": ["info", str(tmp_path)],
            "cache": ["ls", "--cache", str(tmp_path)],
            "checkpoint": ["ls", str(tmp_path)],
        }[command]
        done = subprocess.run(
            [sys.executable, "-c", code, *given],
            env=subprocess_environment(),
            capture_output=True,
            text=True,
        )
        assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_what_a_build_needs_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(["shards", "build", "--features", "x"])
    assert end.value.code == 2
    assert "the following arguments are required: --out" in capsys.readouterr().err
    for line, message in (
        ("--out x", "give --features, or a --recipe"),
        ("--out x --features y --recipe z", "give --features, or a --recipe"),
        ("--out x --recipe y --append", "a --recipe names the sentences"),
        ("--out x --features y --append --overwrite", "--overwrite replaces"),
        ("--out x --features y --append --feature-type fp32", "--append keeps"),
        ("--out x --features y --append --dry-run", "--dry-run is of a new"),
    ):
        assert main(["shards", "build", *line.split()]) == 2
        assert message in capsys.readouterr().err


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
        "checkpoint export a --out b c",
        "checkpoint export a --out b -- c",
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
@pytest.mark.parametrize(
    "command", ["shards build --features x --sentences y", "checkpoint export x"]
)
def test_an_output_that_is_no_place_is_refused(
    command: str, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse([*command.split(), "--out", out])
    assert end.value.code == 2
    assert f"argument --out: {out!r}" in capsys.readouterr().err.splitlines()[-1]


BUILD = "shards build --features x --sentences y --out z"
NO_NUMBER = ("nan", "inf", "-inf", "1e400", "-1", "x", "''", "9" * 5000)
# Every option that takes a number: where it is, and what of it makes no sense beside all these.
NUMBERS = [
    (BUILD, "--shard-mb", ("0", "1e-9", "1e300")),
    (BUILD, "--images-per-shard", ("0", "1.5")),
    (BUILD, "--feature-dim", ("0", "1.5", str(1 << 21))),
    (BUILD, "--max-tokens", ("0", "2", str(1 << 17))),
    (BUILD, "--vocab-size", ("0", "1.5")),
    (BUILD, "--min-answer-count", ("0", "1.5")),
    (BUILD, "--workers", ("0", "1.5")),
    ("shards plan x", "--window", ("0.5",)),
    ("shards plan x", "--sentences-per-visit", ("0", str(2**63))),
    ("shards plan x", "--lanes", ("0", "-4", "1e400")),
    ("shards plan x", "--batch", ("0", "1.5")),
    ("shards plan x", "--steps-ahead", ("1.5",)),
    ("shards plan x", "--cache-limit-gb", ("0", "1e300")),
    ("evaluate x --data y", "--batch", ("0", "1.5")),
    ("checkpoint rm x", "--step", ("0.5", "-1")),
]


@pytest.mark.parametrize(("line", "option", "wrong"), NUMBERS)
def test_a_number_of_no_sense_is_refused_with_its_option(
    line: str, option: str, wrong: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for value in (*NO_NUMBER, *wrong):
        with pytest.raises(SystemExit) as end:
            parse(shlex.split(f"{line} {option}={value}"))
        assert end.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert f"argument {option}: " in last and " is no " in last and len(last) < 200


def test_every_number_is_tried() -> None:
    """An option with a default that is a number, or with a unit, is in the list above."""
    tried = {option.lstrip("-").replace("-", "_") for _, option, _ in NUMBERS}
    for line, *_ in NUMBERS:
        found = vars(parse(shlex.split(line)))
        numbers = {
            name
            for name, value in found.items()
            if isinstance(value, int | float | list) and not isinstance(value, bool)
            if not (isinstance(value, list) and not (value and all(type(v) is int for v in value)))
        }
        assert numbers <= tried


def test_sizes_are_bytes() -> None:
    for given, count in (("128", 128 << 20), ("0.5", 1 << 19), ("1e3", 1000 << 20)):
        assert parse(shlex.split(f"{BUILD} --shard-mb {given}")).shard_mb == count
    assert parse(shlex.split(BUILD)).shard_mb == 128 << 20


def test_a_source_without_a_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([*shlex.split(BUILD), "--source", ""])
    assert "argument --source: " in capsys.readouterr().err.splitlines()[-1]


# --- places -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (f"{BUILD} --staging=~/p", "staging"),
        (f"{BUILD} --answers=~/p", "answers"),
        (f"{BUILD} --vocab=~/p", "vocab"),
        (f"{BUILD} --vg-images=~/p", "vg_images"),
        (f"{BUILD} --out=~/p", "out"),
        ("shards easy-vqa '~/p'", "folder"),
        *((f"shards {command} '~/p'", "url") for command in ("verify", "info")),
        ("shards plan x --cache=~/p", "cache"),
        ("shards audit '~/p'", "run"),
        ("evaluate '~/p' --data x", "checkpoint"),
        ("evaluate x --data=~/p", "data"),
        ("checkpoint export x --out=~/p", "out"),
        *((f"checkpoint {command} '~/p'", "checkpoint") for command in ("verify", "rm")),
        ("checkpoint ls '~/p'", "run"),
        ("train '~/p'", "config"),
    ],
)
def test_a_home_folder_that_the_shell_left_is_found(
    line: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(getattr(parse(shlex.split(line)), name)) == f"{tmp_path}/p"


def test_a_home_of_nobody_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(shlex.split(f"{BUILD} --staging=~nobody-has-this-name/x"))
    assert "no user 'nobody-has-this-name'" in capsys.readouterr().err.splitlines()[-1]


# --- errors of a store --------------------------------------------------------------------------

_WITH_PASSWORD = "s3://me:hunter2/x@bucket/x"


@pytest.mark.parametrize(
    "line",
    [
        *(["shards", c, "PLACE"] for c in ("info", "verify", "plan", "audit")),
        ["checkpoint", "export", "PLACE", "--out", "x"],
        *(["checkpoint", c, "PLACE"] for c in ("ls", "verify")),
        ["checkpoint", "rm", "PLACE", "--step", "1"],
        ["evaluate", "PLACE", "--data", "x"],
        ["shards", "build", "--features", "PLACE/a.tar", "--out", "x"],
        ["shards", "build", "--features", "a", "--features-format", "tsv", "--out", "PLACE"],
        ["train", "configs/tiny.yaml", "data.train=PLACE"],
        ["train", "configs/tiny.yaml", "run.storage=PLACE"],
        ["train", "configs/tiny.yaml", "data.train=[PLACE"],
        ["train", "configs/tiny.yaml", "--ray-address", "x", "--wrong=PLACE"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize(
    ("place", "words"),
    [
        (_WITH_PASSWORD, ""),
        ("https://me:hunter2@127.0.0.1:1/x?token=hunter2", ""),
        ("s3://bad_Bucket!/x", "bad_Bucket!"),
        ("s3://bucket//x", "bucket//x"),
    ],
)
def test_a_wrong_place_is_one_line_without_passwords(
    line: list[str],
    place: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LXSCALE_STORE_DEADLINE", "0.2")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    root = Path(__file__).parents[2]
    line = [a.replace("PLACE", place).replace("configs/", f"{root}/configs/") for a in line]
    monkeypatch.chdir(tmp_path)
    try:
        status = main(line)
    except SystemExit as end:
        status = int(str(end.code))
    out, err = capfd.readouterr()
    assert "hunter2" not in out + err
    said = [text for text in err.splitlines() if "error: " in text]
    assert len(said) == 1 and words in said[0] and len(said[0]) < 500
    assert status == (75 if "gave up after" in said[0] else 2)
    assert list(tmp_path.iterdir()) == []


def test_an_endpoint_with_a_password_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hunter2@127.0.0.1:1")
    for command in ("info", "verify", "plan", "audit"):
        assert main(["shards", command, "s3://bucket/x"]) == 2
        out, err = capfd.readouterr()
        assert "hunter2" not in out + err and "AWS_ENDPOINT_URL is 'http://…@127.0.0.1:1'" in err
        assert len(err.splitlines()) == 1


def test_an_output_may_end_in_slashes() -> None:
    for out, place in (("a/b//", "a/b"), ("/a", "/a"), ("s3://b/", "s3://b"), (".", ".")):
        assert parse(["checkpoint", "export", "x", "--out", out]).out == place


def test_an_error_of_the_users_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "info", "/nowhere/at/all"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no data set at /nowhere/at/all")

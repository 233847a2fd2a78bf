"""A table of runs that are compared: which there are, what they begin from, what is measured.

The YAML of a table, from whose folder on it names configurations:

    storage: runs/paper            where its runs are
    seeds: [1, 2]                  each run is trained with each
    columns:                       what is measured, name -> data set
      questions: {data: data/scenes/test}
    runs:                          pre-training, name -> configuration and what differs
      pretrain: {config: pretrain.yaml, set: [objectives.qa=0]}
    rows:
      - name: pre-trained          cells by column: a run, or a fine-tuning of one
        cells:
          questions: {config: questions.yaml, from: pretrain}
        paper: {questions: 69.9}   the paper's figure, where it has one
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, model_validator

from trainer.config import RunConfig, load_config, parse_yaml
from trainer.errors import ConfigError
from trainer.sections import Place, Section


def _file(name: str) -> str:
    if not name.endswith((".yaml", ".yml")):
        raise ValueError(f"{name} is no YAML file")
    return name


class Trained(Section):
    """A run, for every seed."""

    config: Annotated[str, AfterValidator(_file)]
    """A file, by its path from the table's folder."""
    set: tuple[str, ...] = ()
    """What differs from it: section.key=value."""
    from_: str | None = Field(None, alias="from")
    """The run of the table that it begins from."""


class Cell(Trained):
    """A run that is measured."""

    blind: bool = False
    """All features are zero when it is measured."""


class Column(Section):
    """What is measured."""

    data: Place
    """The data set."""
    metric: str = "accuracy"
    """Of `lxscale evaluate`."""


class Row(Section):
    """Cells by column."""

    name: str
    cells: dict[str, Cell]
    paper: dict[str, float | str] = Field(default_factory=dict)
    """The paper's figures, in percent."""


class Comparison(Section):
    """The whole table."""

    storage: Place
    seeds: tuple[int, ...] = Field(min_length=1)
    columns: dict[str, Column]
    runs: dict[str, Trained] = Field(default_factory=dict)
    rows: tuple[Row, ...] = Field(min_length=1)
    folder: Path = Path()
    """Of the table's file."""

    @model_validator(mode="after")
    def _all_named(self) -> Comparison:
        for name, run in self.runs.items():
            if run.from_ is not None and run.from_ not in list(self.runs)[: self._place(name)]:
                raise ValueError(f"runs.{name}: from: {run.from_} is no run above it")
        named = [run_name(name, 0) for name in self.runs]
        named += [cell_name(row, column, 0) for row in self.rows for column in row.cells]
        if twice := {n for n in named if named.count(n) > 1}:
            place = sorted(twice)[0].removesuffix("/seed-0")
            raise ValueError(f"two runs would be in one folder, {place}: give rows other names")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one is there twice")
        for row in self.rows:
            for column, cell in row.cells.items():
                if column not in self.columns:
                    raise ValueError(f"row {row.name}: there is no column {column}")
                if cell.from_ is not None and cell.from_ not in self.runs:
                    raise ValueError(f"row {row.name}, {column}: from: {cell.from_} is no run")
        return self

    def _place(self, name: str) -> int:
        return list(self.runs).index(name)


def load_comparison(path: Path) -> Comparison:
    """The table in a YAML file. ConfigError naming what is wrong in it."""
    try:
        tree = parse_yaml(path.read_text("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read the table {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML, {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected storage, seeds, columns, runs and rows")
    try:
        return Comparison.model_validate({**tree, "folder": path.parent})
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, e['loc'])) or 'table'}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        ]
        raise ConfigError(f"{path}: {'; '.join(wrong)}") from None


def with_rows(table: Comparison, names: Sequence[str]) -> Comparison:
    """The table with some rows. ConfigError for a name that it has not."""
    there = [row.name for row in table.rows]
    if unknown := [name for name in names if name not in there]:
        raise ConfigError(f"the table has no row {unknown[0]!r}: it has {', '.join(there)}")
    return table.model_copy(update={"rows": tuple(r for r in table.rows if r.name in names)})


def used_runs(table: Comparison) -> dict[str, Trained]:
    """The runs that a row begins from, or another of these does."""
    used = {cell.from_ for row in table.rows for cell in row.cells.values()}
    for name in reversed(table.runs):
        if name in used:
            used.add(table.runs[name].from_)
    return {name: run for name, run in table.runs.items() if name in used}


def run_name(name: str, seed: int) -> str:
    """Of a run in the storage."""
    plain = "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")
    return f"{'-'.join(filter(None, plain.split('-')))}/seed-{seed}"


def overrides(table: Comparison, name: str, run: Trained, seed: int) -> list[str]:
    """What a run's configuration gets, after its own file: the later ones count. name: of the run
    in the storage."""
    out = [*run.set, f"run.storage={table.storage}", f"run.name={name}", f"run.seed={seed}"]
    if run.from_ is not None:
        out.append(f"train.init_from={table.storage}/{run_name(run.from_, seed)}")
    return out


def configuration(table: Comparison, name: str, run: Trained, seed: int) -> RunConfig:
    """A run's configuration; ConfigError as `load_config`."""
    return load_config(table.folder / run.config, overrides(table, name, run, seed))


def markdown(table: Comparison, found: dict[str, Any]) -> str:
    """The table with mean and spread over the seeds, in percent; found: run -> metrics."""
    head = ["", *(f"{c} | paper" for c in table.columns)]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: | ---: |' * len(table.columns)}"]
    for row in table.rows:
        cells = [row.name]
        for column, what in table.columns.items():
            cells.append(_cell(table, row, column, what, found))
            cells.append(str(row.paper.get(column, "")))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(table: Comparison, row: Row, column: str, what: Column, found: dict[str, Any]) -> str:
    if column not in row.cells:
        return ""
    names = [cell_name(row, column, seed) for seed in table.seeds]
    values = [100 * found[n][what.metric] for n in names if n in found]
    if not values:
        return "–"
    mean = f"{sum(values) / len(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.1f} to {max(values):.1f}, {len(values)} seeds)"


def cell_name(row: Row, column: str, seed: int) -> str:
    """Of a cell's run; a cell that is seen and one that is blind may be of one run."""
    return run_name(f"{row.name} {column}", seed)

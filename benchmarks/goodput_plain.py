"""The training loop that people write, for the other arms of goodput.py: torch's own data-parallel
training of the same LXMERT, with a whole checkpoint every so many steps.

As a script it is a worker of kill-all-and-restart: goodput_plain.py SPEC RANK WORLD PORT.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch.nn.parallel import DistributedDataParallel

from goodput_steps import Pace, StepLog
from model.batch import Batch
from model.objectives import target_counts
from trainer import setup
from trainer.config import RunConfig, parse_config
from trainer.data.loader import RankSlice, load_steps
from trainer.model import build_model

GLOO_TIMEOUT = timedelta(seconds=30)
"""Of a collective; torch's own is half an hour."""
_FILE = "state.pt"


@dataclass(frozen=True)
class Spec:
    """What a plain run is."""

    config: str
    """A run's YAML: its data, model, optimizer, batch, steps and checkpoint.every."""
    log: str
    """Folder of the step log."""
    step_seconds: float
    storage: str
    """Folder of checkpoints."""

    def parsed(self) -> RunConfig:
        return parse_config(yaml.safe_load(Path(self.config).read_text()), self.config)


Save = Callable[[dict[str, Any], int], None]
"""Called on every rank with the state, which only rank 0's needs to be written, and the step."""


def train(spec: Spec, state: dict[str, Any] | None, save: Save, notice: Callable[[], bool]) -> None:
    """Train to the last step, from a state that was saved. notice: asked on every rank once a step,
    and the same on all; a first True of a process asks for a save there and then.

    Each rank trains on its part of the first batch over and over, so that data costs nothing.
    """
    config = spec.parsed()
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    module, weights, batch = _parts(config, rank, world)
    if state:
        module.load_state_dict(state["model"])
    model = DistributedDataParallel(module)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr)
    if state:
        optimizer.load_state_dict(state["optimizer"])
    log = StepLog(Pace(Path(spec.log), spec.step_seconds), rank, world)
    names, losses = frozenset(weights), config.objectives.losses()
    counts = target_counts(batch, losses)
    first, steps, every = int(state["step"]) if state else 0, config.train.steps, 0
    every = config.checkpoint.every
    noticed = False
    assert steps
    for number in range(first + 1, steps + 1):
        with log.step(number):
            out = model(batch, objectives=names, settings=losses)
            sums = [w * out.loss_sum[n] / max(counts[n], 1) for n, w in weights.items()]
            torch.stack(sums).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        told = notice()
        if number % every == 0 or number == steps or (told and not noticed):
            now = {"model": module.state_dict(), "optimizer": optimizer.state_dict()}
            save({**now, "step": number}, number)
        noticed |= told


def _parts(
    config: RunConfig, rank: int, world: int
) -> tuple[torch.nn.Module, dict[str, float], Batch]:
    """The model, the weights of the objectives, and this rank's part of the first batch."""
    data = setup.open_training_data(config)
    objectives = setup.resolve_objectives(config, data)
    sampler = data.sampler(config.sampler, config.run.seed)
    batch = config.train.global_batch
    loaded = load_steps(
        data,
        sampler,
        setup.batch_settings(config, data),
        RankSlice(rank, world, 1),
        sampler.start(),
        batch,
        batch,
        config.data,
    )
    (only,) = next(loaded).batches
    loaded.close()
    model = build_model(setup.resolve_model(config, data), config.run.seed)
    return model, objectives, only


def write_state(folder: Path, state: dict[str, Any]) -> None:
    torch.save(state, folder / _FILE)


def read_state(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / _FILE, weights_only=True)
    return found


# --- kill-all-and-restart -----------------------------------------------------------------------


def newest(storage: Path) -> dict[str, Any] | None:
    """The state of the newest checkpoint."""
    found = sorted(storage.glob("step-*"))
    return read_state(found[-1]) if found else None


def save_in_folder(storage: Path) -> Save:
    """Rank 0 writes; a checkpoint is whole when it has its name. All wait for it, as is usual."""

    def save(state: dict[str, Any], step: int) -> None:
        if dist.get_rank() == 0:
            storage.mkdir(exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(dir=storage, prefix="unfinished-"))
            write_state(unfinished, state)
            os.rename(unfinished, storage / f"step-{step:08}")
        dist.barrier()

    return save


def main() -> None:
    spec_file, rank, world, port = sys.argv[1:]
    spec = Spec(**yaml.safe_load(Path(spec_file).read_text()))
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=int(rank),
        world_size=int(world),
        timeout=GLOO_TIMEOUT,
    )
    storage = Path(spec.storage)
    train(spec, newest(storage), save_in_folder(storage), lambda: False)


if __name__ == "__main__":
    main()

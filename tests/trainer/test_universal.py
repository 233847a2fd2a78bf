"""An export for DeepSpeed, read by DeepSpeed: an engine as anybody may build it goes on from it as
ours does from the checkpoint."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.cli.main import main
from shards.format.build import BuildSettings, build
from shards.store import objects
from tests.conftest import small_records
from tests.ranks import config_tree, run_ranks
from trainer.checkpoint.generations import find_generation, load_weights
from trainer.config import RunConfig, parse_config
from trainer.universal import export_universal

Case = tuple[int, str]
"""(ZeRO stage, precision)"""

ALL: list[Case] = [(stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16")]
RATE = 3e-3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a run on two ranks at ZeRO 2, three steps, one of them without an update, and
    its export."""
    root = tmp_path_factory.mktemp("universal")
    build(small_records(31), root / "set", BuildSettings("u", "test", images_per_shard=7))
    tree = config_tree(
        root / "set",
        root,
        "run",
        model={"dropout": 0.0, "attention_dropout": 0.0},
        train={"steps": 3, "zero_stage": 2, "accumulation": 1},
        optimizer={"lr": 5e-3, "no_decay": ["bias", "LayerNorm"], "weight_decay": 0.3},
    )
    assert not run_ranks(2, [(tree, None, False)])
    out = root / "universal"
    given = [str(root / "run"), "--to", "deepspeed-universal", "--out", str(out)]
    assert main(["checkpoint", "export", *given]) == 0
    return root, tree


def their_engine(model: torch.nn.Module, config: RunConfig, stage: int, precision: str) -> Any:
    """As a user of DeepSpeed builds one, with hyperparameters that the checkpoint is to replace."""
    from trainer.step.engine import import_deepspeed

    # Gradients are rounded as ours are.
    accumulated = "bf16" if precision == "bf16" and stage < 2 else "fp32"
    plain = ("bias", "LayerNorm")
    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named if not any(x in n for x in plain)]},
        {"params": [p for n, p in named if any(x in n for x in plain)]},
    ]
    # Under ZeRO 3 DeepSpeed would take the first group's for all of them: there they are its own.
    for group, decay in zip(groups, (0.3, 0.0) if stage == 3 else (0.7, 0.1), strict=True):
        group["weight_decay"] = decay
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": config.optimizer.clip_norm,
        "bf16": {"enabled": precision == "bf16"},
        "data_types": {"grad_accum_dtype": accumulated},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": True},
    }
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.5, 0.5), eps=1.0)
    engine, *_ = import_deepspeed().initialize(
        model=model, optimizer=optimizer, config=settings, dist_init_required=False
    )
    return engine


def masters(engine: Any) -> dict[str, np.ndarray]:
    """The fp32 weights, whole."""
    from deepspeed.utils import safe_get_full_fp32_param

    named = engine.module.named_parameters()
    return {name: safe_get_full_fp32_param(p).numpy().copy() for name, p in named}


def go_on(rank: int, root: Path, tree: dict[str, Any], cases: list[Case], told: Path) -> None:
    """In a rank: one more step of both engines on the same pairs; how far their masters are apart
    then, and how far from where they began."""
    import torch.distributed as dist

    from trainer import setup
    from trainer.checkpoint.restore import parameter_shapes, restore
    from trainer.data.loader import RankSlice, load_steps
    from trainer.model import build_model
    from trainer.step.engine import build_engine, set_learning_rate

    world = dist.get_world_size()
    generation = find_generation(str(root / "run"))
    found = []
    for stage, precision in cases:
        case = {**tree["train"], "zero_stage": stage, "precision": precision}
        config = parse_config({**tree, "train": case}, "test")
        data = setup.open_training_data(config)
        config = config.model_copy(update={"model": setup.resolve_model(config, data)})
        sampler = data.sampler(config.sampler, config.run.seed)
        batch = setup.batch_settings(config, data)
        part = RankSlice(rank, world, 1, world)
        state = generation.manifest.sampler
        steps = load_steps(data, sampler, batch, part, state, 13, 10**6, config.data, 0)
        loaded = next(steps)

        model = build_model(config.model, config.run.seed)
        shapes = parameter_shapes(model)
        ours = build_engine(model, config)
        restore(ours, [generation], str(root / "run"), shapes)
        set_learning_rate(ours, RATE)
        theirs = their_engine(build_model(config.model, 77), config, stage, precision)
        path, client = theirs.load_checkpoint(str(root / "universal"))
        assert path and client == {
            "lxscale_checkpoint": generation.name,
            "global_samples": 39,
        }, client
        assert theirs.global_steps == 3
        if stage == 3:  # DeepSpeed gives one tensor to all groups, which each of them counts up
            for state in theirs.optimizer.optimizer.state.values():
                state["step"] = state["step"].clone()
        before = masters(theirs)
        for engine in (ours, theirs):
            (micro,) = loaded.batches
            names = frozenset(("masked_lm", "masked_feature", "matching"))
            out = engine(micro, objectives=names, settings=config.objectives.losses())
            engine.backward(sum(out.loss_sum.values()) / 13)
            engine.step()
        one, two = masters(ours), masters(theirs)
        steps.close()
        groups = [(g["weight_decay"], *g["betas"], g["eps"]) for g in theirs.optimizer.param_groups]
        apart = max(float(np.abs(one[name] - two[name]).max()) for name in one)
        moved = max(float(np.abs(before[name] - two[name]).max()) for name in two)
        found.append([stage, precision, apart, moved, groups])
    if rank == 0:
        told.write_text(json.dumps(found))


@pytest.mark.parametrize(
    "world, cases",
    [
        (2, [(1, "fp32")]),
        *(pytest.param(world, ALL, marks=pytest.mark.faults) for world in (1, 2)),
    ],
)
def test_deepspeed_goes_on_as_we_do(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, world: int, cases: list[Case]
) -> None:
    told = tmp_path / "told.json"
    root, tree = trained
    prepare = functools.partial(go_on, root=root, tree=tree, cases=cases, told=told)
    run_ranks(world, [], prepare=prepare)
    found = json.loads(told.read_text())
    assert [(stage, precision) for stage, precision, *_ in found] == cases
    for stage, precision, apart, moved, groups in found:
        assert apart < 1e-6 and moved > 1e-3, (stage, precision, apart, moved)
        assert [g[0] for g in groups] == [0.3, 0.0]
        assert all(g[1:] == [0.9, 0.999, 1e-6] for g in groups)


def test_the_folder_is_plain_and_whole(trained: tuple[Path, dict[str, Any]]) -> None:
    root, _ = trained
    generation = find_generation(str(root / "run"))
    out = root / "universal"
    tag = out / (out / "latest_universal").read_text()
    for path in tag.rglob("*.pt"):
        torch.load(path, weights_only=True)  # tensors, numbers and dictionaries
    for name, value in load_weights(generation).items():
        held = torch.load(tag / "zero" / name / "fp32.pt", weights_only=True)["param"]
        np.testing.assert_array_equal(held.numpy(), value)
        assert torch.load(tag / "zero" / name / "step.pt", weights_only=True) == 3.0


@pytest.mark.faults
def test_an_export_to_s3_has_the_same_bytes_and_goes_over_itself(
    trained: tuple[Path, dict[str, Any]], s3: str
) -> None:
    root, _ = trained
    out = root / "universal"
    files = {p.relative_to(out).as_posix(): p for p in out.rglob("*") if p.is_file()}
    for _ in range(2):
        export_universal(str(root / "run"), f"{s3}/universal")
    found = objects.list_tree(f"{s3}/universal")
    assert {o.name: o.size for o in found} == {n: p.stat().st_size for n, p in files.items()}


def test_an_export_replaces_nothing_else(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    line = ["checkpoint", "export", str(trained[0] / "run"), "--to", "deepspeed-universal"]
    assert main([*line, "--out", str(tmp_path)]) == 2
    assert "config.json, which is no part of an export" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]

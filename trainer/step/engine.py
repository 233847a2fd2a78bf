"""The DeepSpeed engine of a run: one path for CPU and GPU, every ZeRO stage."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from model.attention import Attention
from model.lxmert import Lxmert, compile_layers
from trainer.config import RunConfig
from trainer.setup import micro_batches
from trainer.step.optimizer import build_optimizer

log = logging.getLogger("lxscale")


def import_deepspeed() -> Any:
    """The deepspeed module, quiet, for the accelerator at hand, and with no build at run time."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    # An engine asks whether its optimizer is Muon, whose module compiles kernels when it is
    # imported: a second and a half of every worker's start for what nothing here uses.
    with patch.object(torch, "compile", lambda function, **_: function):
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")

    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # DeepSpeed would JIT-build a shared-memory op that training never uses, and a worker killed in
    # that build leaves a lock on which the next one hangs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def engine_settings(config: RunConfig, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration. Batch sizes are nominal: slices may differ by one pair, and the
    loss is normalised by global counts before DeepSpeed sees it."""
    bf16 = config.train.precision == "bf16"
    stage = config.train.zero_stage
    accumulation = micro_batches(config, world)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": world * accumulation,
        "gradient_clipping": config.optimizer.clip_norm,
        "bf16": {"enabled": bf16},
        # Stages 0 and 1 accept only their own type here in the layout that zero_state.py reads.
        "data_types": {"grad_accum_dtype": "bf16" if bf16 and stage < 2 else "fp32"},
        "zero_optimization": {"stage": stage, **_offload(config.train.offload)},
        "zero_allow_untested_optimizer": True,
        # It has one of its own for the host, whose code it builds when it is first used.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def _offload(what: str | None) -> dict[str, Any]:
    place = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    parts = {None: (), "optimizer": ("optimizer",), "parameters": ("optimizer", "param")}[what]
    return {f"offload_{part}": place for part in parts}


def build_engine(model: Lxmert, config: RunConfig) -> Any:
    """Wrap a model (fp32, on the CPU) in a DeepSpeed engine; torch.distributed must be up."""
    if config.train.strict:
        # On GPUs, some operations have a quicker way whose sums come in any order.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        # This would fill all fresh memory, for programs that read what they have not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if config.train.activation_checkpointing:
        model.lxmert.encoder.recompute = True
    if config.train.compile and torch.cuda.is_available():
        compile_layers(model)
    elif config.train.compile:
        log.info("train.compile is left out: it gains on GPUs alone")
    optimizer = build_optimizer(model, config.optimizer)
    deepspeed = import_deepspeed()
    if config.train.zero_stage == 3:
        # It reads the weights of its parts without calling them, which is where ZeRO gathers them.
        deepspeed.utils.set_z3_leaf_modules(model, [Attention], raise_if_not_found=False)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=engine_settings(config, dist.get_world_size()),
        dist_init_required=False,
    )
    # Some stages make a dry step with zero gradients; Adam must not count it.
    engine.basic_optimizer.state.clear()
    return engine


def set_learning_rate(engine: Any, rate: float) -> None:
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = rate

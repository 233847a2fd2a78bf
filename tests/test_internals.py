"""Every internal of other packages that this code uses is named here, and is where it was.

When one of these fails after an upgrade, its message says which file uses what: adapt the file, or
keep the version out in pyproject.toml. Nothing else in the tests says it as early or as clearly.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.job_server import _ADDRESS, STOP_WAIT
from tests.conftest import subprocess_environment

ROOT = Path(__file__).parents[1]
PACKAGES = ("model", "shards", "trainer", "cluster")


@dataclass(frozen=True)
class Internal:
    """A name that a package does not promise to keep."""

    file: str
    """Which of our files uses it."""

    name: str
    """module:attributes, joined by dots."""

    parameters: tuple[str, ...] = ()
    """By these it is called, where it is."""

    @property
    def package(self) -> str:
        return self.name.partition(".")[0].partition(":")[0]


SERVER = "cluster/job_server.py"
SESSION, LOCAL, HEAD = "cluster/ray_session.py", "cluster/local_ray.py", "cluster/head.py"
_TOKENS = "ray._private.authentication.authentication_token_setup"
S3, OBJECTS, RETRY = "shards/store/s3.py", "shards/store/objects.py", "shards/store/retry.py"
ZERO, ENGINE = "trainer/checkpoint/zero_state.py", "trainer/step/engine.py"

INTERNALS = (
    Internal(SESSION, "ray._private.worker:print_to_stdstream", ("data", "ignore_prefix")),
    Internal(SESSION, "ray._private.state:state.get_draining_nodes"),
    Internal(
        SERVER, "ray.dashboard.modules.dashboard_sdk:SubmissionClient._do_request", ("kwargs",)
    ),
    Internal(SERVER, "ray.dashboard.modules.dashboard_sdk:logger.setLevel"),
    Internal(SERVER, "ray.dashboard.modules.job.sdk:logger.setLevel"),
    Internal(SERVER, "ray._private.authentication.authentication_token_setup:_enable_token_auth"),
    Internal(SERVER, "ray._private.authentication.authentication_token_setup:AUTH_MODE_ENV_VAR"),
    Internal(SERVER, "ray._raylet:AuthenticationTokenLoader.has_token"),
    Internal(LOCAL, "ray._private.worker:_global_node"),
    Internal(LOCAL, "ray._private.node:Node.dead_processes"),
    Internal(
        LOCAL,
        "ray._private.node:Node.kill_all_processes",
        ("check_alive", "allow_graceful"),
    ),
    Internal(LOCAL, "ray._private.ray_constants:PROCESS_TYPE_GCS_SERVER"),
    Internal(LOCAL, "ray._private.ray_constants:PROCESS_TYPE_RAYLET"),
    Internal(LOCAL, "ray:init", ("_temp_dir",)),
    Internal(LOCAL, "ray._private.ray_constants:ENABLE_RAY_CLUSTERS_ENV_VAR"),
    Internal(LOCAL, "ray._private.ray_constants:ENABLE_RAY_CLUSTER"),
    Internal(HEAD, "ray._private.services:canonicalize_bootstrap_address", ("addr",)),
    Internal(HEAD, "ray._private.services:find_node_ids"),
    Internal(HEAD, "ray._private.grpc_utils:init_grpc_channel", ("address", "options")),
    Internal(HEAD, "ray.core.generated.gcs_service_pb2:CheckAliveRequest"),
    Internal(HEAD, "ray.core.generated.gcs_service_pb2:GetAllNodeInfoRequest"),
    Internal(HEAD, "ray.core.generated.gcs_service_pb2_grpc:NodeInfoGcsServiceStub"),
    Internal(HEAD, f"{_TOKENS}:AUTH_MODE_ENV_VAR"),
    Internal(HEAD, f"{_TOKENS}:AuthenticationTokenLoader.instance"),
    Internal(HEAD, f"{_TOKENS}:_enable_token_auth"),
    Internal(LOCAL, f"{_TOKENS}:Config.initialize"),
    Internal(S3, "s3fs:S3FileSystem._call_s3", ("self", "method")),
    Internal(S3, "s3fs:S3FileSystem.set_session"),
    Internal(S3, "s3fs:S3FileSystem.retries"),
    Internal(OBJECTS, "s3fs:S3FileSystem._info", ("self", "path")),
    Internal(OBJECTS, "s3fs:S3FileSystem._ls", ("self", "path", "detail", "refresh")),
    Internal(OBJECTS, "s3fs:S3FileSystem._pipe_file", ("self", "path", "data")),
    Internal(OBJECTS, "s3fs:S3FileSystem._rm_file", ("self", "path")),
    Internal(ENGINE, "deepspeed.ops:__compatible_ops__"),
    Internal(ENGINE, "deepspeed.runtime.zero.muon.original_muon:compiler.compile"),
    Internal(
        "trainer/data/loader.py",
        "torch.utils.data.dataloader:_MultiProcessingDataLoaderIter._try_get_data",
        ("timeout",),
    ),
    Internal("trainer/data/shared_batches.py", "multiprocessing.reduction:DupFd", ("fd",)),
)

# Attributes of a DeepSpeed engine's objects, by ZeRO stage and precision: what is asked for them,
# given the engine. Those of a parameter are asked of the first one.
ENGINE_ATTRIBUTES = {
    (0, "fp32"): ("optimizer.param_groups",),
    (0, "bf16"): ("optimizer.fp16_groups", "optimizer.fp32_groups"),
    (2, "fp32"): (
        "optimizer.single_partition_of_fp32_groups",
        "optimizer._param_slice_mappings",
        "optimizer.bit16_groups",
        "optimizer.update_lp_params",
        "parameter._hp_mapping.lp_fragment_address.start",
        "slice.start",
        "slice.numel",
    ),
    (3, "fp32"): (
        "optimizer.fp16_groups",
        "optimizer.fp32_partitioned_groups_flat",
        "optimizer.fp16_partitioned_groups_flat",
        "optimizer.persistent_parameters",
        "optimizer.averaged_gradients",
        "parameter.partition_numel",
        "parameter.partition",
        "parameter.all_gather",
        "parameter.ds_numel",
    ),
}
EVERY_ENGINE = (
    "zero_optimization_stage",
    "param_names",
    "basic_optimizer.state",
    "was_step_applied",
)


def sentence(file: str, name: str, problem: str, package: str) -> str:
    version = importlib.metadata.version(package)
    return f"{file} uses {name}, which {problem} in {package} {version}; pin {package} or adapt it"


def resolve(internal: Internal) -> Any:
    """What the name stands for; fails with the sentence where it is gone."""
    module, _, path = internal.name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        package = internal.package
        if package in sys.stdlib_module_names:
            pytest.fail(f"{internal.file} uses {internal.name}, which Python {sys.version} has not")
        pytest.fail(sentence(internal.file, internal.name, "is not there", package))
    return found


@pytest.mark.parametrize("internal", INTERNALS, ids=lambda i: i.name)
def test_it_is_where_it_was(internal: Internal) -> None:
    found = resolve(internal)
    assert internal.name.rpartition(":")[2].rpartition(".")[2].lstrip("_") in (
        (ROOT / internal.file).read_text()
    ), f"{internal.file} does not use {internal.name} any more: take it off this list"
    if internal.parameters:
        given = inspect.signature(found).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in given.values())
        missing = [p for p in internal.parameters if p not in given and not takes_any]
        package = internal.package
        assert not missing, sentence(
            internal.file, internal.name, f"takes no {', '.join(missing)}", package
        )


def test_ray_knows_the_variables_that_are_set() -> None:
    """Misspelt or dropped ones would be ignored without a word."""
    module = importlib.import_module("ray._common.usage.usage_constants")
    known = {value for value in vars(module).values() if isinstance(value, str)}
    text = (ROOT / SESSION).read_text() + (ROOT / LOCAL).read_text()
    name = "RAY_USAGE_STATS_ENABLED"
    assert name in text, f"{name} is not set any more: take this test away"
    assert name in known, sentence(SESSION, name, "is no variable that is read", "ray")
    job = inspect.getsource(importlib.import_module("ray.dashboard.modules.job.job_supervisor"))
    assert STOP_WAIT in job, sentence(SERVER, STOP_WAIT, "is no variable that is read", "ray")
    assert _ADDRESS in vars(importlib.import_module("ray._private.ray_constants")).values()


def test_the_op_that_is_switched_off_is_the_one_that_would_be_built() -> None:
    builder = Internal(ENGINE, "deepspeed.ops.op_builder.cpu:ShareMemCommBuilder")
    assert resolve(builder).NAME == "deepspeed_shm_comm", sentence(
        ENGINE, "deepspeed_shm_comm", "has another name", "deepspeed"
    )


def test_errors_of_the_store_carry_its_answer() -> None:
    translate = resolve(Internal(RETRY, "s3fs.errors:translate_boto_error"))
    cause = OSError("told so")
    cause.response = {"Error": {"Code": "SlowDown"}}  # type: ignore[attr-defined]
    assert getattr(translate(cause).__cause__, "response", None), sentence(
        RETRY, "the cause of an OSError", "has not the store's answer", "s3fs"
    )


_LIST_ATTRIBUTES = """
import json, os, sys
os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
import torch, torch.distributed as dist
from torch import nn
from tests.test_internals import ENGINE_ATTRIBUTES, EVERY_ENGINE
from trainer.config import parse_config
from trainer.step.engine import build_engine, import_deepspeed
import_deepspeed()
store = dist.HashStore()
dist.init_process_group("gloo", store=store, rank=0, world_size=1)

def ask(found, path):
    for part in path.split("."):
        found = getattr(found, part)

for (stage, precision), names in ENGINE_ATTRIBUTES.items():
    tree = {"run": {"name": "x"}, "data": {"train": "x"},
            "train": {"steps": 1, "zero_stage": stage, "precision": precision}}
    engine = build_engine(nn.Linear(4, 4), parse_config(tree, "test"))
    optimizer = engine.optimizer
    parameter = next(engine.module.parameters())
    roots = {"optimizer": optimizer, "parameter": parameter}
    if stage in (1, 2):
        roots["slice"] = optimizer._param_slice_mappings[0][engine.param_names[parameter]]
    for name in EVERY_ENGINE + names:
        root, _, path = name.partition(".")
        try:
            ask(roots[root], path) if root in roots else ask(engine, name)
        except AttributeError:
            print("missing", stage, precision, name)
print("asked")
"""


def test_deepspeeds_engines_have_what_checkpoints_read() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LIST_ATTRIBUTES],
        env=subprocess_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    for line in lines:
        if line.startswith("missing"):
            _, stage, precision, name = line.split()
            where = f"{name} under ZeRO {stage} in {precision}"
            pytest.fail(sentence(ZERO, where, "is not there", "deepspeed"))
    assert "asked" in lines, sentence(ENGINE, "its engine", f"fails: {done.stderr}", "deepspeed")


# --- the list is whole --------------------------------------------------------------------------

# Private by their spelling, but promised: `os._exit` is documented.
DOCUMENTED = {"_exit"}


def own_names(tree: ast.AST) -> set[str]:
    """Underscored names that a module of ours defines."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
    return {n for n in found if n.startswith("_")}


def private_uses(tree: ast.AST) -> set[str]:
    """Underscored attributes, parts of imported modules and keywords that a module uses."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found |= {*(node.module or "").split("."), *(a.name for a in node.names)}
        elif isinstance(node, ast.Import):
            found |= {part for a in node.names for part in a.name.split(".")}
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return {n for n in found if isinstance(n, str) and n.startswith("_") and n[:2] != "__"}


def test_every_internal_is_named_here() -> None:
    trees = {
        path: ast.parse(path.read_text())
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }
    own = set().union(*(own_names(tree) for tree in trees.values()))
    listed = Path(__file__).read_text()
    for path, tree in trees.items():
        for name in sorted(private_uses(tree) - own - DOCUMENTED):
            assert name in listed, (
                f"{path.relative_to(ROOT)} uses {name}, an internal of another package: name it in "
                "tests/test_internals.py, so that it is seen when it moves"
            )

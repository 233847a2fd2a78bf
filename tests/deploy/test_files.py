"""The files of deploy/ are what KubeRay, SkyPilot and this project's own Makefile take."""

from __future__ import annotations

import copy
import gzip
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.cli.main import parse
from trainer.config import RunConfig, load_config

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"

# --- KubeRay ------------------------------------------------------------------------------------


def strict(schema: Any) -> Any:
    """A Kubernetes schema as jsonschema has it. The server drops fields that a structural schema
    does not know, silently: here they are errors."""
    if isinstance(schema, list):
        return [strict(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    found = {
        k: {name: strict(s) for name, s in v.items()} if k == "properties" else strict(v)
        for k, v in schema.items()
    }
    if schema.get("x-kubernetes-int-or-string"):
        found["type"] = ["integer", "string"]
        found.pop("anyOf", None)
    free = schema.get("x-kubernetes-preserve-unknown-fields")
    if "properties" in schema and not free and "additionalProperties" not in schema:
        found["additionalProperties"] = False
    return found


@pytest.fixture(scope="module")
def rayjob_schema(shared_data: Path) -> dict[str, Any]:
    text = gzip.decompress((shared_data / "kuberay_rayjob_crd.yaml.gz").read_bytes())
    crd = yaml.load(text, yaml.CSafeLoader)  # 30,000 lines: the other one takes 15 s
    (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1" and v["served"]]
    schema: dict[str, Any] = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own
    return schema


def rayjob() -> dict[str, Any]:
    job: dict[str, Any] = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())
    return job


def test_the_rayjob_is_what_kuberays_definition_takes(rayjob_schema: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(rayjob_schema)
    assert not list(validator.iter_errors(rayjob()))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda spec: spec.update(submisionMode="HTTPMode"),
        lambda spec: spec.update(backoffLimit="three"),
        lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].pop("maxReplicas"),
        lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"].update(grace=1),
        lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][
            0
        ].update(envfrom=[]),
    ],
)
def test_a_misspelt_field_is_seen(
    spoil: Callable[[Any], Any], rayjob_schema: dict[str, Any]
) -> None:
    job = copy.deepcopy(rayjob())
    spoil(job["spec"])
    assert list(jsonschema.Draft202012Validator(rayjob_schema).iter_errors(job))


def run_of(command: str) -> tuple[Any, RunConfig]:
    """(arguments, configuration) of a line that begins with `lxscale train`."""
    words = shlex.split(command)
    assert words[:2] == ["lxscale", "train"]
    arguments = parse(words[1:])
    return arguments, load_config(ROOT / arguments.config, arguments.overrides)


def test_the_rayjobs_parts_fit_each_other() -> None:
    spec = rayjob()["spec"]
    arguments, config = run_of(spec["entrypoint"])
    assert arguments.ray_address == "auto"
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (
        config.cluster.fewest,
        config.cluster.most,
    )
    assert rayjob()["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] and spec["suspend"] is True
    ray_version = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert ray_version and spec["rayClusterSpec"]["rayVersion"] == ray_version[1]
    for part in (spec["rayClusterSpec"]["headGroupSpec"], group):
        pod = part["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > config.cluster.stop_timeout_s
        (container,) = pod["containers"]
        mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        volumes = {v["name"]: v["emptyDir"] for v in pod["volumes"]}
        assert volumes[mounts["/dev/shm"]]["medium"] == "Memory"
        assert container["envFrom"] == [{"secretRef": {"name": "lxscale-s3"}}]
    cores = float(group["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"])
    assert cores / 2 < config.cluster.cpus_per_worker <= cores  # one worker a pod


# --- SkyPilot -----------------------------------------------------------------------------------


def sky_task() -> dict[str, Any]:
    task: dict[str, Any] = yaml.safe_load((DEPLOY / "sky.yaml").read_text())
    return task


def test_the_sky_task_is_what_skypilots_parser_takes(tmp_path: Path) -> None:
    """Of the Python that SKY_PYTHON names: SkyPilot's pins are not ours."""
    code = f"""
import sky
task = sky.Task.from_yaml({str(DEPLOY / "sky.yaml")!r})
(resources,) = task.resources
print(task.num_nodes, resources.use_spot, resources.job_recovery["recover_on_exit_codes"])
"""
    python = os.environ.get("SKY_PYTHON", sys.executable)
    done = subprocess.run(
        [python, "-c", code],
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if "No module named 'sky'" in done.stderr:
        pytest.skip("needs skypilot: SKY_PYTHON names the Python of an environment that has it")
    assert done.stdout.splitlines()[-1:] == ["4 True [75]"], done.stderr


def test_the_sky_tasks_command_is_one_of_ours() -> None:
    task = sky_task()
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    lines = task["run"].replace("\\\n", " ").splitlines()
    (line,) = [text for text in lines if text.startswith("lxscale train")]
    values = {
        **task["envs"],
        "SKYPILOT_NUM_NODES": str(task["num_nodes"]),
        "head": "10.0.0.1:26379",
    }
    for name, value in values.items():
        line = line.replace(f'"${name}"', value).replace(f"${name}", value)
    assert "$" not in line
    _, config = run_of(line)
    assert (config.cluster.fewest, config.cluster.most) == (1, 4)
    assert config.run.storage == "s3://bucket/runs"
    # Secrets come with the launch, and are in no file.
    assert set(task["secrets"].values()) == {None}


# --- shells -------------------------------------------------------------------------------------


def scripts() -> Iterator[tuple[str, str]]:
    yield "slurm.sbatch", (DEPLOY / "slurm.sbatch").read_text()
    inner = re.search(r"^node='(.*?)'$", (DEPLOY / "slurm.sbatch").read_text(), re.M | re.S)
    assert inner
    yield "its nodes", inner[1]
    yield "sky.yaml", sky_task()["run"]


def test_scripts_are_bash() -> None:
    for name, text in scripts():
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, (name, done.stderr)


# --- the image ----------------------------------------------------------------------------------


def test_the_images_steps_are_the_readmes() -> None:
    """README: `make demo` sets everything up, by the Makefile's rule for this file."""
    steps = (DEPLOY / "Dockerfile").read_text()
    makefile = (ROOT / "Makefile").read_text()
    assert "RUN make .venv/.ready\n" in steps and sky_task()["setup"] == "make .venv/.ready\n"
    dry = subprocess.run(
        ["make", "-n", "-B", ".venv/.ready"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "PIP_CONSTRAINT=constraints.txt" in dry.stdout and "pip install" in dry.stdout
    assert "demo: $(READY)" in makefile and "    make demo" in (ROOT / "README.md").read_text()
    python = re.search(r"^FROM python:([\d.]+)", steps, re.M)
    assert python and f"(Python {python[1]}," in (ROOT / "constraints.txt").read_text()
    assert "ENV PATH=/lxscale/.venv/bin:$PATH" in steps  # README: `. .venv/bin/activate`
    # The image takes the very Makefile and pins; what is left out are a checkout's products.
    assert "COPY . ." in steps
    left_out = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    assert not [f for f in tracked if f.split("/")[0] in left_out]

"""Launch files: valid for the tools that read them, and their commands for tlm."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from helpers import ROOT

from tlm_jax import cli

LAUNCH = ROOT / "launch"
STUB = """#!/bin/sh
for word in "$@"; do printf '%s\\n' "$word"; done >> "$RECORD"
exit "${STATUS:-0}"
"""


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / name).read_text())


class Accepted(Exception):
    """The command line was parsed, which is all that is asked for."""


def accepts(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`tlm` has this verb with these options; it is not run."""
    verb = cli.VERBS[words[0]]
    parse = verb.parse

    def only_parse(*given: Any, **more: Any) -> None:
        parse(*given, **more)
        raise Accepted

    monkeypatch.setattr(verb, "parse", only_parse)
    with pytest.raises(Accepted):
        cli.main(words)


@pytest.mark.parametrize("file", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.stem)
def test_kubernetes_accepts(file: pathlib.Path) -> None:
    """The resource by its schema, and its pods by Kubernetes' own."""
    resource = read(file.name)
    jsonschema.validate(resource, json.loads((ROOT / "tests/golden/crds.json").read_text()))
    spec, inner = resource["spec"], []
    for job in spec.get("replicatedJobs", []):
        inner.append({"apiVersion": "batch/v1", "kind": "Job", "spec": job["template"]["spec"]})
    cluster = spec.get("rayClusterSpec", {})
    for group in filter(None, [cluster.get("headGroupSpec"), *cluster.get("workerGroupSpecs", [])]):
        inner.append({"apiVersion": "v1", "kind": "Pod", "spec": group["template"]["spec"]})
    assert inner
    for one in inner:
        kubernetes_validate.validate({**one, "metadata": {"name": "x"}}, "1.34", strict=True)


def test_jobset_starts_tlm(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pod per host, and arguments for the image's `tlm`."""
    spec = read("gke_jobset.yaml")["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = spec["template"]["spec"]
    container = pod["containers"][0]
    sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = int(sides[0]) * int(sides[1])
    assert spec["parallelism"] == chips / container["resources"]["limits"]["google.com/tpu"]
    accepts(container["args"], monkeypatch)


def started(
    script: str, tool: str, folder: pathlib.Path, **variables: str
) -> tuple[int, list[str]]:
    """The exit status of a launch script, and the words that it calls a stub of a tool with."""
    stub, record = folder / "bin" / tool, folder / f"{tool}.words"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text(STUB)
    stub.chmod(0o755)
    path = f"{stub.parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "RECORD": str(record), "PYTHON": sys.executable}
    environment |= {"CONFIG": "tlm_440m", "WORKDIR": "/shared/runs/a", **variables}
    words = ["bash", str(LAUNCH / script), "--data.path", "/shared/my texts"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=30)
    return done.returncode, record.read_text().splitlines() if record.exists() else []


def test_xpk_starts_tlm(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options reach `tlm train` on the hosts, spaces in them included."""
    variables = {"CLUSTER": "c", "IMAGE": "i", "XPK_WORDS": "--zone z --spot"}
    status, words = started("xpk.sh", "xpk", tmp_path, **variables)
    assert status == 0
    assert words[-3:] == ["--zone", "z", "--spot"]
    command = shlex.split(words[words.index("--command") + 1])
    assert command[:2] == ["exec", "tlm"]
    assert command[-2:] == ["--data.path", "/shared/my texts"]
    accepts(command[2:], monkeypatch)
    assert started("xpk.sh", "xpk", tmp_path, IMAGE="i")[0] == 1  # no cluster named


def test_slurm_starts_tlm_and_requeues(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that was preempted is queued again; one with a mistake is not."""
    started("slurm.sbatch", "scontrol", tmp_path)  # leaves the stub
    job = {"SLURM_JOB_ID": "7"}
    status, words = started("slurm.sbatch", "srun", tmp_path, STATUS="75", **job)
    assert status == 75
    assert words[-2:] == ["requeue", "7"]
    program = words[words.index("tlm_jax") + 1 : -2]
    assert program[-2:] == ["--data.path", "/shared/my texts"]
    accepts(program, monkeypatch)
    (tmp_path / "srun.words").unlink()
    status, words = started("slurm.sbatch", "srun", tmp_path, STATUS="1", **job)
    assert status == 1
    assert "requeue" not in words


def test_image_has_what_the_package_is_built_from() -> None:
    """Every file that pyproject.toml names is copied into the image, and reaches docker."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    needed |= {*wheel["packages"], *wheel["force-include"]}
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = {name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]}
    assert copied == needed
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in kept if line.startswith("!")} == needed
    extras = project["project"]["optional-dependencies"]
    [installed] = [re.search(r"\[\$\{EXTRA\},(.*)\]", line) for line in lines if "pip inst" in line]
    assert installed is not None
    assert {"gcs", "s3"} <= set(installed[1].split(","))  # runs lie in buckets
    assert {"tpu", "cuda", *installed[1].split(",")} <= set(extras)

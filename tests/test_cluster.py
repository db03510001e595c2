"""A Ray cluster of three nodes on this machine, one of which is killed at its work."""

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import ROOT, Fails, contents, environment

from tlm_jax import cli, cluster, files
from tlm_jax.analysis import sweep_report

pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster whose head takes no tasks."""
    import ray
    from ray.cluster_utils import Cluster

    soon = {"health_check_period_ms": 500, "health_check_failure_threshold": 2}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # else a busy machine starves the tasks
        head = {"num_cpus": 0, "_system_config": soon}
        made = Cluster(initialize_head=True, head_node_args=head)
        patch.setenv("RAY_ADDRESS", made.address)
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture
def two(nodes: Any) -> Iterator[list[Any]]:
    """Two nodes of the cluster, of one CPU each."""
    found = [nodes.add_node(num_cpus=1) for _ in range(2)]
    yield found
    for node in found:
        if node in nodes.worker_nodes:
            nodes.remove_node(node)


def _texts(folder: pathlib.Path, count: int) -> pathlib.Path:
    path = folder / "texts.jsonl"
    lines = (json.dumps({"text": f"document {i} " * (i % 90 + 800)}) + "\n" for i in range(count))
    path.write_text("".join(lines))
    return path


def test_text_is_prepared_as_by_processes_while_a_node_is_killed(
    nodes: Any, two: list[Any], tmp_path: pathlib.Path
) -> None:
    text = _texts(tmp_path, 600)
    words = ["prepare", str(text), "--tokenizer", "bytes", "--shard_mb", "1", "--processes", "1"]
    assert cli.main([*words, "--out", str(tmp_path / "here")]) == 0
    out = tmp_path / "there"
    with _started(*words, "--out", out, "--engine", "ray") as process:
        _wait_for(lambda: list(out.glob("parts/*.json")), process)
        assert process.poll() is None, "it ended before the node could be killed"
        nodes.remove_node(two[0], allow_graceful=False)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert contents(out) == contents(tmp_path / "here")


SWEEP = """
from tlm_jax import config_io
from tlm_jax.analysis.sweep import Arm, Sweep


def get_sweep():
    return Sweep(
        name="two",
        base=config_io.load_config({config!r}),
        arms=(
            Arm(name="uniform", changes={{"model.taper.schedule": "uniform"}}),
            Arm(name="cosine", changes={{"name": "small"}}),
        ),
        seeds=(0,),
    )
"""


def test_a_sweep_and_evaluations_run_on_nodes_of_which_one_is_killed(
    nodes: Any,
    two: list[Any],
    finished_run: pathlib.Path,
    config_file: pathlib.Path,
    tmp_path: pathlib.Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    file, folder = tmp_path / "two.py", tmp_path / "sweep"
    file.write_text(SWEEP.format(config=str(config_file)))
    with _started("sweep", file, "--out", folder, "--engine", "ray") as process:
        _wait_for(lambda: list(folder.glob("*/checkpoints/10")), process)
        nodes.remove_node(two[0], allow_graceful=False)
        out, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (0, "")
    assert "[2/2]" in out
    results = {r["arm"]: r["final"]["loss"] for r in sweep_report.read(folder)}
    alone = files.read_lines(finished_run / "metrics.jsonl")
    assert results["cosine"] == [row["loss"] for row in alone if row["kind"] == "eval"][-1]
    with cluster.RayExecutor("ray") as executor:  # a task asked for one CPU, and uses one
        assert executor.submit(os.getenv, "NPROC").result() == "1"
    runs = [str(folder / name) for name in ("uniform-0", "cosine-0", "nowhere")]
    capfd.readouterr()
    assert cli.main(["eval", "--checkpoints", *runs, "--engine", "ray"]) == 1
    out, err = capfd.readouterr()
    assert err == "error: 1 of 3 checkpoints were not evaluated\n"
    assert f"{runs[2]}: failed: {runs[2]} is not a run folder" in out
    for name, loss in results.items():
        record = files.read_json(folder / f"{name}-0" / "eval.json")
        assert record["loss"] == pytest.approx(loss, rel=1e-6)


def test_a_stopped_sweep_saves_its_cells_on_the_cluster(
    two: list[Any], config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    file, folder = tmp_path / "two.py", tmp_path / "sweep"
    long = SWEEP.replace("{{", '{{"training.num_steps": 5000, ')
    file.write_text(long.format(config=str(config_file)))
    with _started("sweep", file, "--out", folder, "--engine", "ray") as process:
        _wait_for(lambda: list(folder.glob("*/metrics.jsonl")), process)
        process.terminate()
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (75, "")
    assert "Stopped in" in out
    assert any(folder.glob("*-0/checkpoints/*"))
    assert not any(folder.glob("*-0/checkpoints/5000"))


def test_what_cannot_be_asked_of_a_cluster(fails: Fails) -> None:
    assert fails("prepare", "x", "--out", "y", "--engine", "dask") == (
        "--engine 'dask' must be local, ray or ray://HOST:PORT"
    )
    assert fails("sweep", "x.py", "--gpus_per_cell", "1").startswith("--gpus_per_cell needs")
    assert fails("eval", "--checkpoints") == "tlm eval --checkpoints needs run folders"


def _started(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tlm_jax", *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def _wait_for(found: Any, process: subprocess.Popen[str]) -> None:
    give_up = time.monotonic() + 90
    while not found():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.01)

"""Sweeps whose seeds are trained in one program: what is refused, killed, and begun before."""

import contextlib
import json
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future

import pytest
from helpers import ROOT, Fails, environment
from rich.console import Console

from tlm_jax import cli, config_io
from tlm_jax.analysis import sweep, sweep_cell, sweep_report, sweep_seeds
from tlm_jax.analysis.sweep import Arm, Sweep
from tlm_jax.config import RunConfig

FILE = """
from tlm_jax import config_io
from tlm_jax.analysis.sweep import Arm, Sweep


def get_sweep():
    base = config_io.load_config({config!r})
    arm = Arm(name="whole", changes={changes!r})
    return Sweep(name="seeds", base=base, arms=(arm,), baseline="whole", seeds=(0, 1))
"""


def _file(config: pathlib.Path, folder: pathlib.Path, **changes: object) -> pathlib.Path:
    path = folder / "sweep.py"
    path.write_text(FILE.format(config=str(config), changes=changes))
    return path


def _text(path: pathlib.Path) -> str:
    return path.read_text() if path.is_file() else ""


def test_a_group_that_was_stopped_resumes(
    finished_run: pathlib.Path,
    config_file: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SIGTERM after a checkpoint, then to the end; seed 0 is the run that all share."""
    file, folder = _file(config_file, tmp_path), tmp_path / "out"
    words = ["sweep", str(file), "--out", str(folder), "--vmap_seeds"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tlm_jax", *words],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    give_up = time.monotonic() + 200
    while not all((folder / f"whole-{seed}" / "checkpoints" / "10").is_dir() for seed in (0, 1)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.01)
    process.terminate()
    out, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (75, "")
    assert "Stopped in" in out
    assert not list(folder.glob("*/result.json"))

    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    capsys.readouterr()
    assert cli.main(words) == 0
    assert "2 cells, 2 here, 2 to run" in capsys.readouterr().out
    assert "Continuing from step 10" in _text(folder / "whole-0" / "log.txt")
    results = sweep_report.read(folder)
    assert [r["seed"] for r in results] == [0, 1]
    alone = [json.loads(line) for line in _text(finished_run / "metrics.jsonl").splitlines()]
    losses = [row["loss"] for row in alone if row["kind"] == "eval"]
    assert [loss for _, loss in results[0]["validation"]] == pytest.approx(losses, abs=1e-5)
    assert results[1]["final"]["loss"] != pytest.approx(losses[-1], abs=1e-3)
    assert results[1]["machine"] == "1 x cpu"
    for seed in (0, 1):
        rows = map(json.loads, _text(folder / f"whole-{seed}" / "metrics.jsonl").splitlines())
        steps = {row["step"] for row in rows if row["kind"] == "train"}
        assert steps == set(range(1, 21))
        assert (folder / f"whole-{seed}" / "checkpoints" / "20").is_dir()
    assert "../whole-0/log.txt" in _text(folder / "whole-1" / "log.txt")


def test_a_seed_that_failed_is_reported_and_the_others_count(
    finished_run: pathlib.Path, config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The process of the group ends with status 1: seed 0 is complete, the others were given up."""

    class Trainer(contextlib.nullcontext[None]):
        def start(self, cells: Mapping[pathlib.Path, RunConfig]) -> Future[sweep_cell.Ended]:
            first, *others = cells
            shutil.copytree(finished_run, first, dirs_exist_ok=True)
            lines = [f"error: {folder.name}: stopped in {folder.name}" for folder in others]
            (first / "log.txt").write_text("\n".join(lines))
            future: Future[sweep_cell.Ended] = Future()
            future.set_result((1, 2.0))
            return future

    base, arm = config_io.load_config(config_file), Arm(name="whole")
    seeds = Sweep(name="s", base=base, arms=(arm,), baseline="whole", seeds=(0, 1, 10))
    console = Console(record=True, width=1000)
    outcome = sweep._run(
        seeds, tmp_path, console, seeds.cells, sweep_cell.Stop(), Trainer(), vmap_seeds=True
    )
    assert outcome.finished == 1
    assert outcome.broken == {
        f"whole-{seed}": f"status 1: error: whole-{seed}: stopped in whole-{seed}"
        for seed in (1, 10)
    }
    assert [r["seed"] for r in sweep_report.read(tmp_path)] == [0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"training.suites": ("lambada",)}, "has training.suites, which seeds in one program"),
        ({"training.teacher": "runs/other"}, "has training.teacher, which"),
        ({"training.tracker": "trackio"}, "has training.tracker, which"),
        ({"mesh.fsdp": 2}, "has a mesh of several devices, which"),
    ],
)
def test_what_seeds_in_one_program_cannot_have_is_refused_at_once(
    changes: dict[str, object],
    says: str,
    config_file: pathlib.Path,
    tmp_path: pathlib.Path,
    fails: Fails,
) -> None:
    file = _file(config_file, tmp_path, **changes)
    message = fails("sweep", file, "--out", tmp_path / "out", "--vmap_seeds")
    assert f"arm 'whole' {says}" in message
    assert not (tmp_path / "out").exists()


def test_other_machines_are_refused(
    config_file: pathlib.Path, tmp_path: pathlib.Path, fails: Fails
) -> None:
    file = _file(config_file, tmp_path)
    assert "--vmap_seeds trains on this machine" in fails(
        "sweep", file, "--vmap_seeds", "--engine", "ray"
    )


def test_cells_of_an_arm_are_one_group_if_they_start_from_the_same_step(
    config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    arms = (Arm(name="uniform"), Arm(name="wide"))
    base = config_io.load_config(config_file)
    cells = Sweep(name="s", base=base, arms=arms, seeds=(0, 1, 2, 3)).cells
    for step in ("wide-1/checkpoints/5", "wide-1/checkpoints/10", "wide-3/checkpoints/10"):
        (tmp_path / step).mkdir(parents=True)
    (tmp_path / "wide-2" / "checkpoints" / "20.orbax-checkpoint-tmp").mkdir(parents=True)
    groups = sweep_seeds.groups(cells, tmp_path)
    assert [[cell.folder for cell in group] for group in groups] == [
        ["uniform-0", "uniform-1", "uniform-2", "uniform-3"],
        ["wide-0", "wide-2"],
        ["wide-1", "wide-3"],
    ]

"""Sweeps: cells at one budget, several at once, broken and killed ones."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers import ROOT, Fails, environment
from rich.console import Console

from tlm_jax import cli, config_io, files
from tlm_jax.analysis import sweep, sweep_cell, sweep_report
from tlm_jax.analysis.sweep import Arm, Sweep
from tlm_jax.config import RunConfig, UserError

UNIFORM = Arm(name="uniform", changes={"model.taper.schedule": "uniform"})
SWEEP = """
import pathlib

from tlm_jax import config_io
from tlm_jax.analysis.sweep import Arm, Sweep


def get_sweep():
    return Sweep(
        name="three",
        base=config_io.load_config({config!r}),
        arms=(
            Arm(name="uniform", changes={{"model.taper.schedule": "uniform"}}),
            Arm(name="broken", changes={{"data.path": "/nowhere"}}),
            Arm(name="cosine 1.5", changes={{"model.taper.start": 1.5}}),
        ),
        seeds=(3,),
    )
"""


def test_cells_of_one_seed_share_parameters_and_data():
    found = Sweep(
        name="s", base=RunConfig(), arms=(UNIFORM, Arm(name="cosine", seeds=(5,))), seeds=(4, 5)
    )
    assert [(c.arm.name, c.seed) for c in found.cells] == [
        ("uniform", 4),
        ("uniform", 5),
        ("cosine", 5),
    ]
    one, other = (found.config(cell) for cell in found.cells[1:])
    assert (one.seed, one.data.seed) == (other.seed, other.data.seed) == (5, 5)
    assert one.model.taper.schedule == "uniform"
    names = ("name", "model.taper.schedule")
    assert [d.split(":")[0] for d in config_io.differences(one, other)] == [*names]


def test_grid_is_every_combination():
    arms = sweep.grid({"model.taper.schedule": ("linear", "cosine"), "model.taper.start": (1, 2)})
    assert [arm.name for arm in arms][1:3] == ["schedule=linear start=2", "schedule=cosine start=1"]
    assert arms[3].changes == {"model.taper.schedule": "cosine", "model.taper.start": 2}


@pytest.mark.parametrize(
    ("arms", "says"),
    [
        ((UNIFORM, UNIFORM), "two cells have one name"),
        ((Arm(name="x"),), "the baseline 'uniform' of arm 'x' is not one of its arms"),
        (
            (UNIFORM, Arm(name="x", changes={"model.taper.strat": 1})),
            "arm 'x': unknown field model.taper.strat; did you mean model.taper.start?",
        ),
        (
            (UNIFORM, Arm(name="x", changes={"model.taper.start": 3.0})),
            "arm 'x': model: a cosine curve from start=3.0 to end=0.5 has mean 1.75, not 1",
        ),
        (
            (UNIFORM, Arm(name="x", changes={"model.mlp_width": 720})),
            "arm 'x' has 7,573,760 parameters, its baseline 'uniform' 7,475,456; cells must have",
        ),
        (
            (UNIFORM, Arm(name="x", changes={"training.num_steps": 1001})),
            "arm 'x' has 4,100,096 tokens, its baseline 'uniform' 4,096,000; cells must have",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(arms, says):
    with pytest.raises(UserError) as error:
        Sweep(name="s", base=RunConfig(), arms=arms, seeds=(0,)).check()
    assert says in str(error.value)


def test_tokens_that_were_spent_before_belong_to_the_budget():
    """Widths from a run of a fifth of the steps: the arm trains for the other four fifths."""
    base = RunConfig()
    steps, tokens = base.training.num_steps, base.data.batch_size * base.data.seq_len
    fewer = {"training.num_steps": steps - steps // 5}
    arm = Arm(name="learned", changes=fewer, tokens_before=steps // 5 * tokens)
    Sweep(name="s", base=base, arms=(UNIFORM, arm)).check()
    with pytest.raises(UserError, match=r"arm 'learned' has .* tokens, its baseline"):
        Sweep(
            name="s", base=base, arms=(UNIFORM, dataclasses.replace(arm, tokens_before=1))
        ).check()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "sweeps").glob("*.py")), ids=lambda p: p.stem
)
def test_the_sweep_files_compare_what_can_be_compared(path: pathlib.Path):
    found = config_io.load(path, "get_sweep", Sweep)
    found.check()
    assert len(found.arms) > 2


def _start(file: pathlib.Path, folder: pathlib.Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tlm_jax", "sweep", str(file), "--out", str(folder), *words],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_and_broken_cells(
    finished_run: pathlib.Path,
    config_file: pathlib.Path,
    tmp_path: pathlib.Path,
    fails: Fails,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """kill -9 in the second whole cell; run again, nothing is repeated or lost, one arm is broken.

    The tapered cell is, but for its seed, the run that all tests share.
    """
    file, folder = tmp_path / "sweep.py", tmp_path / "out"
    file.write_text(SWEEP.format(config=str(config_file)))
    process = _start(file, folder)
    last = folder / "cosine-1.5-3" / "metrics.jsonl"
    give_up = time.monotonic() + 200
    while not (last.is_file() and '"step": 3' in last.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = folder / "uniform-3"
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}
    assert (first / "result.json").is_file()
    # The run was told to stop when its sweep died: it saves, and lets go of its folder.
    while not list((folder / "cosine-1.5-3" / "checkpoints").glob("[0-9]*")):
        assert time.monotonic() < give_up
        time.sleep(0.05)
    time.sleep(1)

    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    again = ["sweep", str(file), "--out", str(folder)]
    capsys.readouterr()
    assert cli.main(again) == 1
    out, err = capsys.readouterr()
    assert "3 cells, 3 here, 2 to run" in out
    assert "broken, seed 3: failed: status 1: error: data.path /nowhere" in " ".join(out.split())
    assert err.startswith("error: 1 cells failed, see log.txt in their folders: broken-3")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "Continuing from step" in (folder / "cosine-1.5-3" / "log.txt").read_text()
    results = sweep_report.read(folder)
    assert [(r["arm"], r["seed"]) for r in results] == [("uniform", 3), ("cosine 1.5", 3)]
    assert [r["widths"] for r in results] == [[64] * 4, [96, 80, 48, 32]]
    steps = [row["step"] for row in map(json.loads, last.read_text().splitlines())
             if row["kind"] == "train"]  # fmt: skip
    assert sorted(set(steps)) == list(range(1, 21))

    assert cli.main(["report", str(folder), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count("data:image/png") == 3
    assert "http" not in page.replace("http-equiv", "")

    file.write_text(file.read_text().replace("1.5}", '1.5, "optimizer.clip_norm": 2.0}'))
    assert (
        "cosine-1.5-3/result.json has another config (optimizer.clip_norm: 1.0 -> 2.0)"
    ) in fails(*again)


def _two_arms(file: pathlib.Path, config: pathlib.Path) -> str:
    text = SWEEP.format(config=str(config))
    text = "".join(line for line in text.splitlines(True) if "broken" not in line)
    file.write_text(text)
    return text


def test_cells_at_once_end_as_they_would_alone(
    finished_run: pathlib.Path, config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Two at a time; the tapered one is the run that all tests share."""
    file, folder = tmp_path / "sweep.py", tmp_path / "out"
    _two_arms(file, config_file)
    process = _start(file, folder, "--parallel", "2", "--seeds", "0")
    out, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (0, "")
    assert "[2/2]" in out
    results = {r["arm"]: r for r in sweep_report.read(folder)}
    assert list(results) == ["uniform", "cosine 1.5"]
    alone = [json.loads(line) for line in _text(finished_run / "metrics.jsonl").splitlines()]
    losses = [row["loss"] for row in alone if row["kind"] == "eval"]
    assert results["cosine 1.5"]["final"]["loss"] == pytest.approx(losses[-1], abs=1e-5)
    assert results["uniform"]["machine"].endswith(" x cpu")


def test_cells_at_once_divide_the_cores_and_stop_together(
    config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Two cells of runs so long that neither ends before it is told to stop; both save."""
    file, folder = tmp_path / "sweep.py", tmp_path / "out"
    text = _two_arms(file, config_file)
    file.write_text(text.replace("changes={", 'changes={"training.num_steps": 100_000, '))
    process = _start(file, folder, "--parallel", "2")
    cells = [folder / "uniform-3", folder / "cosine-1.5-3"]
    give_up = time.monotonic() + 200
    while not all('"step": 2' in _text(cell / "metrics.jsonl") for cell in cells):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.02)
    if hasattr(os, "sched_getaffinity"):
        running = [int(_text(cell / ".lock").split()[1]) for cell in cells]
        shares = [os.sched_getaffinity(number) for number in running]
        if len(here := os.sched_getaffinity(0)) > 1:
            assert shares[0] | shares[1] == here
            assert not shares[0] & shares[1]
    process.terminate()
    out, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (75, "")
    assert out.count("Stopped in") == 1
    assert all(list((cell / "checkpoints").glob("[0-9]*")) for cell in cells)
    assert not list(folder.glob("*/result.json"))


def _text(path: pathlib.Path) -> str:
    return path.read_text() if path.is_file() else ""


def test_a_sweep_told_to_stop_while_its_cell_imports(
    config_file: pathlib.Path, tmp_path: pathlib.Path, fails: Fails
) -> None:
    """Status 75, no cell is called failed and no other begun; a second sweep is kept out."""
    file, folder = tmp_path / "sweep.py", tmp_path / "out"
    file.write_text(SWEEP.format(config=str(config_file)))
    process = _start(file, folder)
    give_up = time.monotonic() + 60
    while not (folder / "uniform-3" / "log.txt").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.01)
    message = fails("sweep", file, "--out", folder)
    assert message.startswith(f"{folder} is in use: process {process.pid} on ")
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (75, "")
    assert "Stopped in" in out
    assert "failed" not in out
    assert [path.name for path in folder.glob("*-3")] == ["uniform-3"]


def test_a_cell_of_an_earlier_call_is_waited_for_and_a_damaged_result_made_again(
    finished_run: pathlib.Path, config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The process of a sweep that was killed still holds the cell for two seconds."""
    shutil.copytree(finished_run, tmp_path / "whole-0")
    whole = Arm(name="whole", changes={"name": "small"})
    base = config_io.load_config(config_file)
    one = Sweep(name="one", base=base, arms=(whole,), baseline="whole", seeds=(0,))
    path = tmp_path / "whole-0" / "result.json"
    path.write_bytes(b'{"sweep": "one", "arm": "wh')
    with contextlib.ExitStack() as holder:
        holder.enter_context(files.locked(tmp_path / "whole-0" / ".lock", "in use"))
        timer = threading.Timer(2.0, holder.close)
        timer.start()
        console = Console(record=True, width=1000)
        outcome = sweep.run(one, tmp_path, console)
        timer.join()
    assert outcome == sweep.Outcome(finished=1, broken={}, stopped=False)
    said = console.export_text()
    assert "result.json is damaged: it is not valid JSON" in said
    assert "it is rebuilt from the cell's run folder" in said
    assert f"Waiting for process {os.getpid()} on " in said

    results = tmp_path / "results.jsonl"
    for damaged in (path, results):
        content = damaged.read_bytes()
        place = content.index(b'"loss": ') + len(b'"loss": ')
        damaged.write_bytes(content[:place] + b"1" + content[place + 1 :])
    with pytest.raises(UserError, match=r"results\.jsonl, line 1 is damaged"):
        sweep_report.read(tmp_path)
    sweep.gather(tmp_path, console)
    assert "do not match its checksum" in console.export_text()
    assert results.read_text() == ""


def test_an_error_of_the_sweep_itself_stops_its_cells():
    """Such as a full disk when results are gathered: cells do not run on for hours."""
    stop = sweep_cell.Stop()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        stop.processes.add(process)
        with pytest.raises(OSError, match="full"), stop.on_error():
            raise OSError("full")
        assert process.wait(30) == -signal.SIGTERM
    assert stop.told

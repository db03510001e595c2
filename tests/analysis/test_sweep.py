"""Sweeps: cells at one budget, broken and killed ones, and what the report makes of results."""

import contextlib
import dataclasses
import json
import math
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
from tlm_jax.analysis import sweep, sweep_merge, sweep_plots, sweep_report
from tlm_jax.analysis.sweep import Arm, Cell, Sweep
from tlm_jax.config import OptimizerConfig, RunConfig, TaperConfig, UserError

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
    finished_run: pathlib.Path, config_file: pathlib.Path, tmp_path: pathlib.Path
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

    process = _start(file, folder)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 1
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
    process = _start(file, folder)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "cosine-1.5-3/result.json has another config (optimizer.clip_norm: 1.0 -> 2.0)" in err


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


def record(arm: str, seed: int, losses: list[float], order: int, **changes) -> dict:
    config = dataclasses.replace(RunConfig(), **changes)
    return {
        "sweep": "made",
        "arm": arm,
        "baseline": "uniform",
        "order": order,
        "seed": seed,
        "config": config_io.to_dict(config),
        "budget": {"parameters": 10},
        "widths": config.model.mlp_widths,
        "validation": [[10 * i, loss] for i, loss in enumerate(losses)],
        "train": [],
        "final": {"loss": losses[-1]},
        "versions": {"jax": "1"},
    }


RECORDS = [
    record("uniform", 0, [9.0, 5.0, 4.0], 0),
    record("uniform", 1, [9.0, 5.2, 4.2], 0),
    record("late", 1, [9.0, 6.0, 5.0], 2),
    record("taper", 0, [9.0, 4.5, 3.5], 1),
    record("taper", 1, [9.0, 4.9, 4.1], 1),
    record("taper", 2, [9.0, 4.9, 4.0], 1),
]


def test_differences_are_of_pairs_with_the_interval_of_students_t():
    uniform, taper, late = sweep_report.findings(RECORDS)
    assert (uniform.difference, taper.seeds, taper.pairs) == (None, [0, 1, 2], 2)
    # Differences -0.5 and -0.1: mean -0.3, deviation 0.2828, over sqrt(2) 0.2, t(1) = 12.706.
    assert taper.difference.mean == pytest.approx(-0.3)
    assert taper.difference.half_width == pytest.approx(12.7062 * 0.2, rel=1e-4)
    assert taper.perplexity_ratio == pytest.approx(math.exp(-0.3))
    # 4.5 to 3.5 passes 4.0 half way between steps 10 and 20; 4.9 to 4.1 passes 4.2 at 18.75.
    assert taper.speed.mean == pytest.approx((15 + 18.75) / 2 / 20)
    assert late.difference == sweep_report.Estimate(mean=pytest.approx(0.8), half_width=None)
    assert late.speed is None
    assert sweep_report.rows([late])[0][-1] == "not reached"


def _write(path: pathlib.Path, records: list[dict]) -> pathlib.Path:
    path.write_text("".join(json.dumps(files.sealed(r)) + "\n" for r in records))
    return path


def test_records_of_two_machines_in_one_file(tmp_path: pathlib.Path) -> None:
    """What both have is kept once; the merged file reports what one sweep of all would."""
    one, other = _write(tmp_path / "a.jsonl", RECORDS[:4]), _write(tmp_path / "b", RECORDS[3:])
    other.rename(tmp_path / "b.jsonl")
    target = tmp_path / "all.jsonl"
    words = ["report", str(one), str(tmp_path / "b.jsonl"), "--merge", str(target)]
    assert cli.main(words) == 0
    whole = sweep_report.read(_write(tmp_path / "whole.jsonl", RECORDS))
    merged = sweep_report.read(target)
    assert sweep_report.rows(sweep_report.findings(merged)) == sweep_report.rows(
        sweep_report.findings(whole)
    )
    before = target.read_bytes()
    assert cli.main(words) == 0
    assert target.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sweep": "another"}, "is of sweep 'another', but .* is of 'made'; merge each sweep"),
        ({"final": {"loss": 3.0}}, "'taper' has two results with seed 0, in .*; run different"),
        ({"seed": 7, "budget": {"parameters": 11}}, "'taper' differs between .*: budget"),
        (
            {"seed": 7, "config": config_io.to_dict(RunConfig(seed=7)) | {"steps_per_call": 2}},
            "unknown field",
        ),
        (
            {
                "seed": 7,
                "config": config_io.to_dict(RunConfig(optimizer=OptimizerConfig(clip_norm=2.0))),
            },
            "'taper' differs between .*: optimizer.clip_norm",
        ),
    ],
)
def test_records_that_do_not_belong_together_are_refused(changes, says, tmp_path: pathlib.Path):
    target = _write(tmp_path / "all.jsonl", RECORDS)
    before = target.read_bytes()
    other = _write(tmp_path / "other.jsonl", [RECORDS[3] | changes])
    with pytest.raises(UserError, match=says):
        sweep_merge.merge(target, [other])
    assert target.read_bytes() == before


def test_primary_comparisons_share_a_level():
    """Two arms that are no baselines too; 97.5% intervals for two of them."""
    pairs = [["taper", "uniform"], ["late", "taper"]]
    text = sweep_report.primary([r | {"primary": pairs} for r in RECORDS])
    # -0.5 and -0.1 as above; t(1) at 1 - 0.05 / 2 / 2 is 25.4517.
    assert "- taper minus uniform: -0.3000 ± 5.0903 (2 pairs)\n" in text
    assert "- late minus taper: +0.9000 (1 pair)\n" in text
    assert "97.5% intervals" in text
    assert sweep_report.primary(RECORDS) == ""
    with pytest.raises(UserError, match="'cosine' in primary is not one of its arms"):
        Sweep(name="s", base=RunConfig(), arms=(UNIFORM,), primary=(("cosine", "uniform"),))


def test_a_page_keeps_what_is_outside_the_marks():
    page = "a\n<!-- made -->\nold\n<!-- end made -->\nb\n"
    assert sweep_report.replace(page, "made", "new") == page.replace("old", "new")
    with pytest.raises(UserError, match="no marks <!-- other -->"):
        sweep_report.replace(page, "other", "new")


def test_the_u_curve_needs_three_ratios(tmp_path: pathlib.Path) -> None:
    def tapered(start: float, order: int) -> dict:
        model = dataclasses.replace(
            RunConfig().model, taper=TaperConfig(start=start, end=2 - start)
        )
        return record(f"cosine {start}", 0, [9.0, 4.0 + abs(start - 1.25)], order, model=model)

    flat = dataclasses.replace(RunConfig().model, taper=TaperConfig(schedule="uniform"))
    records = [record("uniform", 0, [9.0, 4.2], 0, model=flat), tapered(1.25, 1), tapered(1.5, 2)]
    assert "ratios.png" not in {path.name for path in sweep_plots.draw(records, tmp_path / "a")}
    records.append(tapered(1.75, 3))
    assert "ratios.png" in {path.name for path in sweep_plots.draw(records, tmp_path / "b")}


def test_cells_are_shared_out_and_gathered(tmp_path: pathlib.Path) -> None:
    for order, (arm, seed) in enumerate([("b", 1), ("a", 0), ("b", 0)]):
        folder = tmp_path / Cell(arm=Arm(name=arm), seed=seed).folder
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(record(arm, seed, [1.0], order)))
    sweep.gather(tmp_path, Console())
    assert [(r["arm"], r["seed"]) for r in sweep_report.read(tmp_path)] == [
        ("a", 0),
        ("b", 0),
        ("b", 1),
    ]
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]

"""Evaluations while training: none of them costs a step, and those cut short are made up."""

import json
import os
import pathlib
import shutil
import signal
from typing import Any

import pytest
from helpers import DRIVER, NUM_STEPS, run, steps

from tlm_jax import cli, files
from tlm_jax.evaluation import perplexity, suites

SAVED = NUM_STEPS // 2


def _records(folder: pathlib.Path, kind: str) -> dict[int, dict[str, Any]]:
    records = files.read_lines(folder / "metrics.jsonl")
    return {record["step"]: record for record in records if record["kind"] == kind}


@pytest.fixture
def half(finished: pathlib.Path) -> pathlib.Path:
    """A run as it was after step 10."""
    shutil.rmtree(finished / "checkpoints" / str(NUM_STEPS))
    metrics = finished / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if json.loads(line)["step"] <= SAVED))
    return finished


def test_a_hung_evaluation_is_ended_after_the_save_and_a_slow_one_is_not(
    half: pathlib.Path, finished_run: pathlib.Path, config_file: pathlib.Path
) -> None:
    """The next start makes it up, which takes longer in all than the watchdog waits."""
    train = ("train", "--config", config_file, "--workdir", half, "--training.hang_timeout", 4)
    hung = ("--pause-from-scored-batch", 2, "--pause", 60)
    result = run(DRIVER, *hung, *train)
    assert result.returncode == 75, result.stderr
    assert f"while evaluating step {NUM_STEPS} (training.hang_timeout=4)" in result.stderr
    assert steps(half) == [SAVED, NUM_STEPS]
    assert list(_records(half, "eval")) == [0, SAVED]

    batches = half.with_suffix(".batches")
    slow = ("--pause-from-scored-batch", 1, "--pause", 2, "--record", batches)
    result = run(DRIVER, *slow, *train)
    assert result.returncode == 0, result.stderr
    assert f"Step {NUM_STEPS} has not been evaluated (eval); that comes first." in result.stdout
    assert not batches.exists()  # no step was trained
    assert _records(half, "eval") == _records(finished_run, "eval")
    assert _records(half, "eval")[NUM_STEPS]["sequences"] > 2 * 8  # three batches


def test_a_stop_in_the_last_evaluation_is_not_the_end(
    half: pathlib.Path,
    finished_run: pathlib.Path,
    config_file: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Status 75, and the same command evaluates the saved step."""
    train = ["train", "--config", str(config_file), "--workdir", str(half)]
    place = perplexity.to_devices

    def stop(*words: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(perplexity, "to_devices", place)
        return place(*words)

    monkeypatch.setattr(perplexity, "to_devices", stop)
    assert cli.main(train) == 75
    said = f"Stopped by SIGTERM at step {NUM_STEPS}, and saved; the same command resumes."
    assert said in capsys.readouterr().out.splitlines()
    assert steps(half) == [SAVED, NUM_STEPS]
    assert list(_records(half, "eval")) == [0, SAVED]

    assert cli.main(train) == 0
    loss = _records(half, "eval")[NUM_STEPS]["loss"]
    assert loss == pytest.approx(_records(finished_run, "eval")[NUM_STEPS]["loss"], rel=1e-3)
    assert f"complete at step {NUM_STEPS}, validation loss {loss:.4f}" in capsys.readouterr().out


def test_a_failing_suite_costs_no_step(
    finished: pathlib.Path,
    config_file: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Missing data and errors of lm-eval are a line; the next start tries again.

    So it does after a signal to stop, which a suite heeds between two answers.
    """
    data = tmp_path / "sets"
    last = NUM_STEPS + 2
    train = ["train", "--config", str(config_file), "--workdir", str(finished)]
    train += ["--training.num_steps", str(last), "--training.suites", "piqa"]
    train += ["--training.suites_every", "1", "--training.suites_data_dir", str(data)]
    assert cli.main(train) == 0
    said = [x for x in capsys.readouterr().out.splitlines() if "suites failed" in x]
    assert [line.split()[1] for line in said] == [str(NUM_STEPS + i) for i in range(3)]
    assert f"{data / 'piqa'} has no SPLIT.jsonl" in said[-1]
    assert max(steps(finished)) == last

    (data / "piqa").mkdir(parents=True)
    row = {"goal": "Sit", "sol1": "on a chair.", "sol2": "on a cloud.", "label": 0}
    (data / "piqa" / "validation.jsonl").write_text(json.dumps(row))
    with monkeypatch.context() as patch:
        patch.setattr(suites, "run", lambda *_, **__: 1 / 0)
        assert cli.main(train) == 0
    out = capsys.readouterr().out
    assert f"step {last}  the suites failed, and training continues: ZeroDivisionError: div" in out

    def stop(model: Any, *_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        model._advance("scored", 1, 2)

    with monkeypatch.context() as patch:
        patch.setattr(suites, "run", stop)
        assert cli.main(train) == 75
    assert f"Stopped by SIGTERM at step {last}" in capsys.readouterr().out
    assert _records(finished, "suites") == {}
    assert cli.main(train) == 0
    assert list(_records(finished, "suites")) == [last]

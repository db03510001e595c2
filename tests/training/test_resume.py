"""A run that is killed, stopped or ended goes on exactly where it was."""

import json
import math
import pathlib
import shutil
import signal
import subprocess
import time
import warnings
from typing import Any

import numpy as np
import pytest
from helpers import (
    DRIVER,
    NUM_STEPS,
    command,
    contents,
    environment,
    only_error,
    run,
    steps,
    unfinished,
)

from tlm_jax import cli, files

SAVED = NUM_STEPS // 2
KILLED = SAVED + 3


def _records(folder: pathlib.Path, kind: str) -> dict[int, dict[str, Any]]:
    """Newest record of each step, without what depends on the clock."""
    found = [r for r in files.read_lines(folder / "metrics.jsonl") if r["kind"] == kind]
    clock = ("tokens_per_second", "mfu", "goodput")
    return {r["step"]: {k: v for k, v in r.items() if k not in clock} for r in found}


def _arrays(folder: pathlib.Path, step: int) -> dict[str, bytes]:
    """Type, shape and bytes of everything in the state of a checkpoint."""
    import jax
    from orbax.checkpoint import v1 as ocp

    path = folder / "checkpoints" / str(step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no shardings are given: whole arrays
        state = ocp.load_checkpointables(path, {"state": None})["state"]
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.asarray(leaf)
        kind = f"{array.dtype} {array.shape} ".encode()
        found[jax.tree_util.keystr(path)] = kind + array.tobytes()
    return found


def _same_run(first: pathlib.Path, second: pathlib.Path) -> None:
    """Both runs have the same losses, and equal bytes in their last checkpoints."""
    train = _records(first, "train")
    assert list(train) == list(range(1, NUM_STEPS + 1))
    assert _records(second, "train") == train
    assert _records(second, "eval") == _records(first, "eval")
    arrays, others = _arrays(first, NUM_STEPS), _arrays(second, NUM_STEPS)
    assert arrays.keys() == others.keys()
    assert [name for name in arrays if arrays[name] != others[name]] == []
    for part in ("params", "opt_state", "step"):
        assert any(part in name for name in arrays)
    data = f"checkpoints/{NUM_STEPS}/data"
    assert contents(first / data, but=["commit_success.txt"]) == contents(
        second / data, but=["commit_success.txt"]
    )


@pytest.mark.parametrize(("workers", "devices", "mesh"), [(0, 1, ()), (2, 2, ("--mesh.fsdp", "2"))])
def test_killed_and_resumed_equals_straight(
    workers: int,
    devices: int,
    mesh: tuple[str, ...],
    finished_run: pathlib.Path,
    config_file: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    """20 steps = 13 steps, kill -9, and 10 more from the checkpoint of step 10.

    Losses, parameters, moments and batches, bit for bit; with reader processes and a
    sharded state too.
    """
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    layout = (*mesh, "--data.num_workers", workers)
    train = ("train", "--config", config_file, *layout, "--workdir")
    if workers == 0:
        straight = finished_run
    else:
        record = straight.with_suffix(".batches")
        result = run(DRIVER, "--record", record, *train, straight, devices=devices)
        assert result.returncode == 0, result.stderr
    harm = ("--at-batch", KILLED + 1, "SIGKILL")
    harm = (*harm, "--when-exists", killed / "checkpoints" / str(SAVED))
    first = tmp_path / "first.batches"
    result = run(DRIVER, "--record", first, *harm, *train, killed, devices=devices)
    assert result.returncode == -signal.SIGKILL, result.stderr
    second = tmp_path / "second.batches"
    # Once without what the killed process compiled, as on another machine.
    result = run(DRIVER, "--record", second, *train, killed, devices=devices, cache=workers > 0)
    assert result.returncode == 0, result.stderr
    assert f"Continuing from step {SAVED}" in result.stdout

    batches = straight.with_suffix(".batches").read_text().splitlines()
    assert len(set(batches)) == NUM_STEPS
    assert first.read_text().splitlines() == batches[:KILLED]
    assert second.read_text().splitlines() == batches[SAVED:]
    _same_run(straight, killed)


def test_killed_in_the_middle_of_a_save(config_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A kill while a checkpoint is being written leaves the one before, and that is used."""
    folder = tmp_path / "run"
    big = ("--model.d_model", "256", "--model.vocab_size", "16384")  # 55 MB of state
    small = ("--model.num_layers", "1", "--model.taper.schedule", "uniform")  # to compile
    every = ("--training.num_steps", "6", "--training.checkpoint_every", "2")
    train = ("train", "--config", config_file, *big, *small, *every, "--workdir", folder)
    with subprocess.Popen(
        command("train.py", *train[1:]),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            give_up = time.monotonic() + 90
            while not (whole := steps(folder)) or not (half := unfinished(folder)):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < give_up
                time.sleep(0.001)
        finally:
            process.kill()
    assert unfinished(folder) == half, "the kill came too late; make the state bigger"
    (interrupted,), newest = half, max(whole)
    assert interrupted > newest

    result = run("train.py", *train[1:])
    assert result.returncode == 0, result.stderr
    assert (
        f"The save of step {interrupted} was interrupted; "
        f"using the last complete checkpoint, step {newest}." in result.stdout.splitlines()
    )
    assert f"Continuing from step {newest}" in result.stdout
    assert unfinished(folder) == []
    assert max(steps(folder)) == 6


@pytest.mark.parametrize(("name", "workers"), [("SIGTERM", 0), ("SIGINT", 2)])
def test_stop_signal_saves_and_the_same_command_continues(
    name: str,
    workers: int,
    finished_run: pathlib.Path,
    config_file: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    """A polite stop in the middle of training: saved there, status 75, nothing lost.

    Ctrl-C goes to the reader processes as well, which have to leave it to the parent.
    """
    folder = tmp_path / "run"
    train = ("train", "--config", config_file, "--workdir", folder, "--data.num_workers", workers)
    result = run(DRIVER, "--at-batch", 7, name, *train)
    assert result.returncode == 75, result.stderr
    stopped = f"Stopped by {name} at step 7, and saved; the same command resumes."
    assert stopped in result.stdout.splitlines()
    assert result.stderr == ""
    assert steps(folder) == [7]
    result = run("train.py", *train[1:])
    assert result.returncode == 0, result.stderr
    assert "Continuing from step 7" in result.stdout
    assert list(_records(folder, "train")) == list(range(1, NUM_STEPS + 1))
    if workers == 0:
        _same_run(finished_run, folder)


def test_stop_signal_during_evaluation(
    finished_run: pathlib.Path, config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """An evaluation is given up at once, its numbers are not kept, and the step is saved."""
    folder, scored = tmp_path / "run", tmp_path / "scored"
    train = ("train", "--config", config_file, "--workdir", folder)
    whole = ("--training.eval_batches", "None")
    # All batches are scored before the first step, and would be again after step 10.
    one = math.ceil(_records(finished_run, "eval")[NUM_STEPS]["sequences"] / 8)
    harm = ("--at-scored-batch", one + 2, "SIGTERM", "--scored", scored)
    result = run(DRIVER, *harm, *train, *whole)
    assert result.returncode == 75, result.stderr
    assert f"Stopped by SIGTERM at step {SAVED}, and saved" in result.stdout
    assert len(scored.read_text().splitlines()) == one + 2 < 2 * one
    assert list(_records(folder, "eval")) == [0]
    assert steps(folder) == [SAVED]


@pytest.fixture
def finished(finished_run: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A finished run to be written to."""
    return shutil.copytree(finished_run, tmp_path / "finished")


def test_same_command_after_the_end_changes_nothing(
    finished: pathlib.Path, config_file: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A complete run says so, with its validation loss, and leaves all files alone."""
    before = contents(finished)
    assert cli.main(["train", "--config", str(config_file), "--workdir", str(finished)]) == 0
    loss = _records(finished, "eval")[NUM_STEPS]["loss"]
    said = f"The run in {finished} is complete at step {NUM_STEPS}, validation loss {loss:.4f}."
    assert said in capsys.readouterr().out.splitlines()
    assert contents(finished) == before


def test_more_steps_continue_a_complete_run(
    finished: pathlib.Path, config_file: pathlib.Path
) -> None:
    """More `num_steps` goes on from the last checkpoint, and says what that means."""
    before = _records(finished, "train")
    train = ("train.py", "--config", config_file, "--workdir", finished)
    result = run(*train, "--training.num_steps", NUM_STEPS + 2)
    assert result.returncode == 0, result.stderr
    assert f"Continuing from step {NUM_STEPS}" in result.stdout
    said = f"num_steps: {NUM_STEPS} -> {NUM_STEPS + 2}; the learning rate follows"
    assert said in result.stdout
    after = _records(finished, "train")
    assert list(after) == [*before, NUM_STEPS + 1, NUM_STEPS + 2]
    assert {step: after[step] for step in before} == before
    assert max(steps(finished)) == NUM_STEPS + 2


def test_eval_gives_the_loss_that_training_printed(
    finished: pathlib.Path, finished_run: pathlib.Path
) -> None:
    """`eval.py --checkpoint RUN` agrees with the end of training to 1e-6."""
    result = run("eval.py", "--checkpoint", finished)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    trained = _records(finished, "eval")[NUM_STEPS]
    assert trained["complete"] == 1
    assert found["step"] == NUM_STEPS
    assert found["loss"] == pytest.approx(trained["loss"], abs=1e-6)
    assert found["tokens"] == trained["tokens"]
    printed = finished_run.with_suffix(".out").read_text()
    assert f"complete at step {NUM_STEPS}, validation loss {found['loss']:.4f}." in printed
    assert files.read_json(finished / "eval.json") == found


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--optimizer.learning_rate", "0.002"), "optimizer.learning_rate: 0.004 -> 0.002"),
        (("--model.taper.start", "1.25"), "model.taper.start: 1.5 -> 1.25"),
        (("--data.num_workers", "1"), "data.num_workers: 0 -> 1"),
        (("--data.seq_len", "32"), "data.seq_len: 64 -> 32"),
        (("--data.batch_size", "16"), "data.batch_size: 8 -> 16"),
        (("--data.readers", "2"), "data.readers: 1 -> 2"),
        (("--data.seed", "1"), "data.seed: 0 -> 1"),
        (("--seed", "1"), "seed: 0 -> 1"),
    ],
)
def test_another_config_is_refused_by_name(
    change: tuple[str, str],
    named: str,
    finished: pathlib.Path,
    config_file: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A changed field stops the run before it starts, named with both values."""
    before = contents(finished)
    more = ["--training.num_steps", str(NUM_STEPS + 2), *change]
    command = ["train", "--config", str(config_file), "--workdir", str(finished), *more]
    if change[0] == "--model.taper.start":
        command += ["--model.taper.end", "0.75"]
    assert cli.main(command) == 1
    message = only_error(capsys.readouterr().err)
    assert named in message
    assert str(finished) in message
    assert "--allow_config_change" in message
    assert contents(finished) == before


def test_allow_config_change_continues_with_the_new_config(
    finished: pathlib.Path, config_file: pathlib.Path
) -> None:
    """The same change is accepted when it is asked for, said aloud, and saved."""
    train = ("train.py", "--config", config_file, "--workdir", finished)
    change = ("--optimizer.learning_rate", "0.002", "--allow_config_change")
    result = run(*train, "--training.num_steps", NUM_STEPS + 1, *change)
    assert result.returncode == 0, result.stderr
    out = result.stdout.splitlines()
    assert "Config change: optimizer.learning_rate: 0.004 -> 0.002" in out
    assert f"Continuing from step {NUM_STEPS} in {finished}." in out
    saved = json.loads((finished / "config.json").read_text())
    assert saved["config"]["optimizer"]["learning_rate"] == 0.002
    assert max(steps(finished)) == NUM_STEPS + 1


def test_another_tokenizer_is_refused_by_name(
    finished: pathlib.Path, config_file: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer's content counts, not only its name in the config."""
    model = ["--model.vocab_size", "4096"]
    train = ["train", "--config", str(config_file), "--workdir", str(finished), *model]
    assert cli.main([*train, "--data.tokenizer", "None"]) == 1
    message = only_error(capsys.readouterr().err)
    assert "data.tokenizer: 'bytes' -> None" in message
    assert "model.vocab_size: 257 -> 4096" in message
    assert "data layout, dataset" in message


def test_other_shapes_are_refused_even_when_changes_are_allowed(
    finished: pathlib.Path, config_file: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint cannot fill a wider MLP: parameters and both shapes are named."""
    before = contents(finished)
    train = ["train", "--config", str(config_file), "--workdir", str(finished)]
    assert cli.main([*train, "--model.mlp_width", "128", "--allow_config_change"]) == 1
    message = only_error(capsys.readouterr().err)
    assert "do not fit this config" in message
    assert "mlp" in message
    assert "[1, 32, 96] -> [1, 32, 192]" in message or "[1, 96, 32] -> [1, 192, 32]" in message
    assert contents(finished) == before


def test_other_readers_are_refused_even_when_changes_are_allowed(
    finished: pathlib.Path, config_file: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No position of one number of readers is a position of another; nothing is set aside."""
    before = contents(finished)
    train = ["train", "--config", str(config_file), "--workdir", str(finished)]
    assert cli.main([*train, "--data.readers", "2", "--allow_config_change"]) == 1
    message = only_error(capsys.readouterr().err)
    assert "data.readers=1" in message
    assert contents(finished) == before


def test_a_run_from_before_there_were_readers_goes_on(
    finished: pathlib.Path, config_file: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished / "checkpoints" / str(NUM_STEPS) / "_CHECKPOINT_METADATA"
    record = json.loads(path.read_text())
    saved = record["custom_metadata"]
    del saved[files.CHECKSUM], saved["config"]["data"]["readers"], saved["data_layout"]["readers"]
    path.write_text(json.dumps(record | {"custom_metadata": files.sealed(saved)}))
    assert cli.main(["train", "--config", str(config_file), "--workdir", str(finished)]) == 0
    assert f"is complete at step {NUM_STEPS}" in capsys.readouterr().out

"""Damaged checkpoints, full disks, folders not to be written: one line, and nothing is lost."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest
from helpers import DRIVER, NUM_STEPS, Fails, contents, only_error, run, steps, unfinished

from tlm_jax import cli

SAVED = NUM_STEPS // 2


def _largest(folder: pathlib.Path) -> pathlib.Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def _truncate_arrays(checkpoint: pathlib.Path) -> None:
    largest = _largest(checkpoint)
    os.truncate(largest, largest.stat().st_size // 2)


def _truncate_metadata(checkpoint: pathlib.Path) -> None:
    os.truncate(checkpoint / "_CHECKPOINT_METADATA", 1000)


def _remove_metadata(checkpoint: pathlib.Path) -> None:
    (checkpoint / "_CHECKPOINT_METADATA").unlink()


def _truncate_tree(checkpoint: pathlib.Path) -> None:
    os.truncate(checkpoint / "state" / "_METADATA", 1000)


def _truncate_data(checkpoint: pathlib.Path) -> None:
    (position,) = (checkpoint / "data").glob("*.json")
    os.truncate(position, 10)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
@pytest.mark.parametrize(
    "damage",
    [_truncate_arrays, _truncate_metadata, _remove_metadata, _truncate_tree, _truncate_data],
)
def test_damaged_checkpoint(
    damage: Callable[[pathlib.Path], None],
    finished: pathlib.Path,
    config_file: pathlib.Path,
    fails: Fails,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is set aside, untouched, and the one before is used; the last one is never moved."""
    train = ("train", "--config", config_file, "--workdir", finished)
    newest, before = (finished / "checkpoints" / str(s) for s in (NUM_STEPS, SAVED))
    damage(newest)
    kept = contents(newest)
    assert cli.main([str(w) for w in (*train, "--training.num_steps", SAVED)]) == 0
    output = capsys.readouterr().out
    back = f"mv {finished}/damaged/20 {newest}"
    assert re.search(rf"{newest} is damaged: .*; set aside \(to bring it back: {back}\)\.", output)
    assert f"complete at step {SAVED}" in output
    assert contents(finished / "damaged" / str(NUM_STEPS)) == kept
    assert steps(finished) == [SAVED]
    damage(before)
    kept = contents(finished)
    message = fails(*train)
    assert message.startswith(f"no usable checkpoint is left in {finished} (checkpoint {before} is")
    assert "nothing was moved" in message
    assert contents(finished, but=[".lock"]) == {k: v for k, v in kept.items() if k != ".lock"}


def test_damaged_checkpoint_as_a_user_sees_it(
    finished: pathlib.Path, config_file: pathlib.Path
) -> None:
    """Evaluation says it in one line; training sets it aside and goes on from the one before."""
    newest = finished / "checkpoints" / str(NUM_STEPS)
    _truncate_arrays(newest)
    kept = contents(newest)
    result = run("eval.py", "--checkpoint", finished)
    assert result.returncode == 1
    message = only_error(result.stderr)
    assert f"checkpoint {newest} is damaged: " in message
    assert message.endswith(f"use --step {SAVED}")
    train = ("--config", config_file, "--workdir", finished, "--training.num_steps", 22)
    result = run("train.py", *train)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    said = f"{newest} is damaged: .*; set aside .*mv {finished}/damaged/{NUM_STEPS} {newest}"
    assert re.search(said, result.stdout)
    assert f"Continuing from step {SAVED}" in result.stdout
    assert max(steps(finished)) == 22
    assert contents(finished / "damaged" / str(NUM_STEPS)) == kept


@contextlib.contextmanager
def _mounted(folder: pathlib.Path, size: str) -> Iterator[None]:
    """A small file system of its own in `folder`; skips the test where that is forbidden."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        pytest.skip(f"a file system cannot be mounted here: {str(reason).splitlines()[0]}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _at_half(finished: pathlib.Path, folder: pathlib.Path) -> dict[str, str]:
    """Copies a run as it was after step 10; returns the contents of that checkpoint."""
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "checkpoints" / str(NUM_STEPS))
    return contents(folder / "checkpoints" / str(SAVED))


def test_full_disk(
    finished_run: pathlib.Path, config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The disk fills up in the middle of a run, which then ends with one line, and soon.

    The last whole checkpoint stays, although only one is to be kept, and with room
    again the same command resumes from it.
    """
    disk = tmp_path / "disk"
    with _mounted(disk, "4m"):
        folder, filler = disk / "run", disk / "filler"
        kept = _at_half(finished_run, folder)
        train = ("--config", config_file, "--workdir", folder, "--training.keep_last", "1")
        result = run(DRIVER, "--at-batch", "2", filler, "train", *train)
        assert result.returncode == 1
        message = only_error(result.stderr)
        assert message == (
            f"cannot save step {NUM_STEPS} in {folder}/checkpoints: No space left on device; "
            f"step {SAVED} is complete, and the same command resumes from there"
        )
        assert "cannot write metrics" in result.stdout  # and no reason to stop
        assert steps(folder) == [SAVED]
        assert contents(folder / "checkpoints" / str(SAVED)) == kept

        start = only_error(run("train.py", *train).stderr)
        assert start == f"cannot write to run folder {folder}: No space left on device"
        filler.unlink()
        result = run("train.py", *train)
        assert result.returncode == 0, result.stderr
        assert f"The save of step {NUM_STEPS} was interrupted" in result.stdout
        assert f"Continuing from step {SAVED}" in result.stdout
        assert steps(folder) == [NUM_STEPS]
        assert unfinished(folder) == []


def test_file_that_cannot_grow(
    finished_run: pathlib.Path, config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The same where nothing can be mounted: the system refuses large files."""
    folder = tmp_path / "run"
    kept = _at_half(finished_run, folder)
    limit = _largest(folder / "checkpoints").stat().st_size // 2
    train = ("train", "--config", config_file, "--workdir", folder)
    result = run(DRIVER, "--file-limit", limit, *train)
    assert result.returncode == 1
    assert only_error(result.stderr) == (
        f"cannot save step {NUM_STEPS} in {folder}/checkpoints: File too large; "
        f"step {SAVED} is complete, and the same command resumes from there"
    )
    assert contents(folder / "checkpoints" / str(SAVED)) == kept


def test_failed_first_save_ends_the_run_before_the_next(
    config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """A save that fails in the background stops the run at once, not at the next save."""
    folder = tmp_path / "run"
    train = ("train", "--config", config_file, "--workdir", folder)
    harm = ("--file-limit", "100000", "--pause-from-batch", SAVED + 2)
    result = run(DRIVER, *harm, *train, "--training.num_steps", "100000", cache=False)
    assert result.returncode == 1
    message = only_error(result.stderr)
    assert message.startswith(f"cannot save step {SAVED} in {folder}/checkpoints: File too large;")
    assert message.endswith("no earlier checkpoint, and the same command starts over")
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] < 2 * SAVED


def test_read_only_run_folder(
    finished_run: pathlib.Path, config_file: pathlib.Path, fails: Fails, tmp_path: pathlib.Path
) -> None:
    """Training says so before it starts; evaluation needs to write nothing."""
    disk = tmp_path / "disk"
    with _mounted(disk, "4m"):
        folder = shutil.copytree(finished_run, disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for workdir in (folder, disk / "new"):
            message = fails("train", "--config", config_file, "--workdir", workdir)
            assert message == f"cannot write to run folder {workdir}: Read-only file system"
        result = run("eval.py", "--checkpoint", folder)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout.splitlines()[-1])["step"] == NUM_STEPS


def test_run_folder_that_cannot_be(
    config_file: pathlib.Path, fails: Fails, tmp_path: pathlib.Path
) -> None:
    """A run folder that is a file, below a file, or without permission."""
    file = tmp_path / "file"
    file.touch()
    train = ("train", "--config", config_file, "--workdir")
    assert fails(*train, file) == f"cannot write to run folder {file}: it is a file"
    message = fails(*train, file / "run")
    assert message == f"cannot write to run folder {file / 'run'}: Not a directory"
    assert fails(*train, "/proc/run").startswith("cannot write to run folder /proc/run: ")
    if os.geteuid() != 0:  # root may write anywhere
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o555)
        message = fails(*train, locked)
        assert message == f"cannot write to run folder {locked}: Permission denied"

"""What is printed: nobody reads it, the disk is full, the encoding is small, the names are odd."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from helpers import NUM_STEPS, ROOT, environment, only_error

from tlm_jax import cli

PLAN = ("tlm_jax", "plan", "--config", "configs/tiny.py", "--png")


def _shell(redirect: str, *words: object, variables: dict[str, str] | None = None) -> tuple:
    """Runs a Python module with its output redirected by a shell: (status, stdout, stderr)."""
    result = subprocess.run(
        [
            "bash",
            "-o",
            "pipefail",
            "-c",
            f'"$0" -m "$@" {redirect}',
            sys.executable,
            *map(str, words),
        ],
        cwd=ROOT,
        env=environment() | (variables or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=300,
    )
    return result.returncode, result.stdout.decode(), result.stderr.decode()


def test_a_run_outlives_its_log(config_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Output on a full disk, errors closed, ASCII only, and a folder that looks like markup."""
    folder = tmp_path / "[/x] :smile: é"
    train = ("tlm_jax", "train", "--config", config_file, "--workdir", folder)
    few = ("--training.num_steps", 2, "--training.sample_tokens", 8)
    variables = {"PYTHONIOENCODING": "ascii"}
    assert _shell(">/dev/full 2>&-", *train, *few, variables=variables) == (0, "", "")
    assert (folder / "curves.png").is_file()
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["2"]
    assert (folder / "samples.txt").stat().st_size > 0


@pytest.mark.parametrize("redirect", [">/dev/full", "| true", ">&-"])
def test_a_log_that_cannot_be_written_is_left_out(redirect: str, tmp_path: pathlib.Path) -> None:
    """`tlm prepare`: what it prints is a log, its result lies in a folder."""
    (tmp_path / "text.txt").write_text("One text.\n\nAnother one.\n" * 200)
    prepare = ("tlm_jax", "prepare", tmp_path / "text.txt", "--tokenizer", "bytes")
    prepare += ("--validation_fraction", 0.5, "--processes", 1)
    status, _, errors = _shell(redirect, *prepare, "--out", tmp_path / "out")
    assert (status, "Traceback" in errors) == (0, False), errors
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_a_result_that_cannot_be_written_is_an_error(tmp_path: pathlib.Path) -> None:
    """`tlm plan`: what it prints is the result. A reader that has seen enough is no error."""
    words = (*PLAN, tmp_path / "plan.png")
    status, _, errors = _shell(">/dev/full", *words)
    assert status == 1
    assert only_error(errors) == "standard output: No space left on device"
    status, _, errors = _shell("| true", *words)
    assert (status, errors) == (141, "")


def test_an_encoding_without_a_character_shows_an_escape(tmp_path: pathlib.Path) -> None:
    name = "nai\u0308ve \u2192"
    words = (*PLAN, tmp_path / "plan.png", "--name", name)
    status, output, errors = _shell("", *words, variables={"PYTHONIOENCODING": "ascii"})
    assert (status, errors) == (0, "")
    assert "nai\\u0308ve \\u2192" in output


def test_names_are_not_read_as_markup(
    finished_run: pathlib.Path,
    config_file: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(finished_run, tmp_path / "[/x]" / "[red]:smile:")
    assert cli.main(["train", "--config", str(config_file), "--workdir", str(folder)]) == 0
    assert f"The run in {folder} is complete at step {NUM_STEPS}" in capsys.readouterr().out
    assert cli.main(["eval", "--checkpoint", str(folder)]) == 0
    assert "[/x]/[red]:smile:, step" in capsys.readouterr().out.replace("\n", "")


def test_no_message_holds_markup() -> None:
    """Consoles print text as it is (`tlm_jax.output`): colour is given with `style`."""
    pattern = re.compile(r"\[/\w*\]")
    found = [
        f"{path}: {line.strip()}"
        for path in sorted((ROOT / "tlm_jax").rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if pattern.search(line) and "TextColumn(" not in line  # constant text of a bar
    ]
    assert found == []

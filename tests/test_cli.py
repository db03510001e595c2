"""Help, entry points and `tlm plan` on the command line."""

import importlib
import pathlib
import subprocess
import sys
import time
import tomllib

import pytest
from helpers import ROOT, environment, only_error, run

from tlm_jax import cli, config_io


def test_help_of_train_without_a_config() -> None:
    """`python train.py --help` says which file it needs and how to see the options."""
    result = run("train.py", "--help")
    assert result.returncode == 0
    assert result.stderr == ""
    assert result.stdout.startswith("usage: train.py --config PATH [OPTIONS]")
    assert "train.py --config configs/tiny.py --help" in result.stdout


def test_help_of_train_with_a_config_explains_every_field() -> None:
    """Options with the config's own defaults and the fields' docstrings, in seconds."""
    start = time.monotonic()
    result = run("train.py", "--config", "configs/tiny.py", "--help")
    assert time.monotonic() - start < 10
    assert result.returncode == 0
    assert result.stderr == ""
    text = " ".join(result.stdout.replace("│", " ").split())
    assert text.startswith("usage: train.py")
    config = config_io.load_config(ROOT / "configs" / "tiny.py")
    fields = [name for name in config_io.flatten(config) if not name.endswith(".kind")]
    options = [f"--{name}" for name in fields]
    assert [option for option in options if option not in text] == []
    for expected in (
        "--workdir",
        "--allow_config_change",
        "Width of the first layer",
        "(default: 1.5)",
        "Reader processes; batches depend on it",
        "raise it to continue a finished run",
        "(default: 0.0025)",
    ):
        assert expected in text
    assert "run.model" not in text


def test_help_of_eval() -> None:
    """`python eval.py --help` says which folder it needs."""
    result = run("eval.py", "--help")
    assert result.returncode == 0
    assert "eval.py --checkpoint PATH" in result.stdout


@pytest.mark.parametrize("words", [["--help"], ["-h"], []])
def test_help_of_tlm_lists_the_verbs(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Each verb with a line on what it does."""
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    for verb, module in cli.VERBS.items():
        assert f"tlm {verb}" in out
        assert (module.Command.__doc__ or "").splitlines()[0] in out


def test_tlm_is_installed_as_a_script() -> None:
    """The entry point in pyproject.toml is the function that `train.py` calls."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts["tlm"].split(":")
    assert getattr(importlib.import_module(module), function) is cli.main


def test_plan_is_quick_and_needs_no_jax(tmp_path: pathlib.Path) -> None:
    """`tlm plan` of the 440M config: a table and a picture within 10 s, jax not imported."""
    picture = tmp_path / "plan.png"
    config = ROOT / "configs" / "tlm_440m.py"
    script = (
        "import sys\nfrom tlm_jax import cli\n"
        f"status = cli.main(['plan', '--config', {str(config)!r}, '--png', {str(picture)!r}])\n"
        "assert 'jax' not in sys.modules\nsys.exit(status)\n"
    )
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert time.monotonic() - start < 10
    assert result.returncode == 0, result.stderr
    assert "435,471,360" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plan_that_cannot_draw(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture below a file: one line, after the table."""
    file = tmp_path / "file"
    file.touch()
    picture = file / "plan.png"
    assert cli.main(["plan", "--config", str(ROOT / "configs/tiny.py"), "--png", str(picture)]) == 1
    captured = capsys.readouterr()
    assert only_error(captured.err).startswith(f"cannot write {picture}: ")
    assert "parameters" in captured.out

"""Help, entry points and `tlm plan` on the command line."""

import importlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import time
import tomllib

import pytest
from helpers import ROOT, Fails, environment, only_error, run

import tlm_jax
from tlm_jax import cli, config_io
from tlm_jax.cli import large_pages


def test_help_of_train_without_a_config() -> None:
    """`python train.py --help` says which file it needs and how to see the options."""
    result = run("train.py", "--help")
    assert result.returncode == 0
    assert result.stderr == ""
    assert result.stdout.startswith("usage: train.py --config PATH [OPTIONS]")
    assert "train.py --config tiny --help" in result.stdout


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


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`tlm --version` names the package and what it stands on; the citation is of that version."""
    assert cli.main(["--version"]) == 0
    out = capsys.readouterr().out
    jax = importlib.metadata.version("jax")
    assert out.startswith(f"tlm-jax {tlm_jax.__version__} (Python 3.")
    assert f"jax {jax}," in out
    assert f"\nversion: {tlm_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_configs_that_ship_have_names(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    """Bare names work in any folder; one that nobody has gets the list in one line."""
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "tiny:titans"):
        file, _, word = name.partition(":")
        path = f"{ROOT}/configs/{file}.py" + f":{word}" * bool(word)
        assert config_io.load_config(name) == config_io.load_config(path)
    assert "needle, study, tiny, tlm_1_3b, tlm_440m" in fails("plan", "--config", "huge:titans")
    assert fails("sweep", "configs").startswith("config configs does not exist; give a Python file")
    assert "schedules, shapes" in fails("sweep", "tiny.py")
    assert fails("sweep", "ladder:tpu").endswith("unknown sizes 'tpu'; one of cpu, gpu")


def test_tlm_is_installed_as_a_script() -> None:
    """The entry point in pyproject.toml is the function that `train.py` calls."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts["tlm"].split(":")
    assert getattr(importlib.import_module(module), function) is cli.program


def test_plan_is_quick(tmp_path: pathlib.Path) -> None:
    """`tlm plan` of the 440M config: a table and a picture within 20 s of processor time."""
    picture = tmp_path / "plan.png"
    config = ROOT / "configs" / "tlm_440m.py"
    script = (
        "import sys\nfrom tlm_jax import cli\n"
        f"status = cli.main(['plan', '--config', {str(config)!r}, '--png', {str(picture)!r}])\n"
        "sys.exit(status)\n"
    )
    before = os.times()
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    after = os.times()
    seconds = after.children_user + after.children_system
    assert seconds - before.children_user - before.children_system < 20
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


@pytest.mark.parametrize(
    ("words", "setting", "starts"),
    [
        (["eval", "--checkpoint", "/nowhere"], None, [None, large_pages.VALUE]),
        (["eval", "--checkpoint", "/nowhere"], "", [""]),
        (["plan", "--num_layers", "x"], None, [None]),
    ],
    ids=["begins anew", "not if it is set", "not without arrays"],
)
def test_large_pages_are_asked_for(
    tmp_path: pathlib.Path, words: list[str], setting: str | None, starts: list[str | None]
):
    log = tmp_path / "starts"
    (tmp_path / "sitecustomize.py").write_text(
        "import json, os\n"
        f"with open({str(log)!r}, 'a') as log:\n"
        f"    value = os.environ.get({large_pages.VARIABLE!r})\n"
        "    print(json.dumps([os.getpid(), value]), file=log)\n"
    )
    env = environment() | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    env.pop(large_pages.VARIABLE, None)
    if setting is not None:
        env[large_pages.VARIABLE] = setting
    done = subprocess.run(
        [sys.executable, "-m", "tlm_jax", *words], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode in (1, 2)
    assert done.stderr.count("error:") == 1
    if "[madvise]" not in large_pages.SETTING.read_text():
        starts = starts[:1]
    found = [json.loads(line) for line in log.read_text().splitlines()]
    assert [value for _, value in found] == starts
    assert len({pid for pid, _ in found}) == 1

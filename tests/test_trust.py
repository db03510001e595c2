"""What is data runs no code: mixers of one's own are found, and loaded only if they are trusted."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, Fails, environment, run
from safetensors.numpy import save_file

from tlm_jax import cli, config_io
from tlm_jax.config import ModelConfig, UserError
from tlm_jax.config_io import from_dict, to_dict
from tlm_jax.mixers import AttentionConfig, MixerConfig

MIXER = """
import dataclasses, pathlib
from tlm_jax.mixers import AttentionConfig

pathlib.Path({marker!r}).touch()


@dataclasses.dataclass(frozen=True, kw_only=True)
class {name}(AttentionConfig):
    pass
"""
CONFIG = """
import dataclasses
from {module} import {name}
from tlm_jax.config_io import load_config


def get_config():
    small = load_config({small!r})
    model = dataclasses.replace(small.model, mixer={name}(num_heads=2))
    training = dataclasses.replace(small.training, num_steps=1)
    return dataclasses.replace(small, model=model, training=training)
"""


def _own_mixer(folder: pathlib.Path, module: str, name: str, small: pathlib.Path) -> pathlib.Path:
    """A module with a mixer that touches `ran` when it is imported, and a config beside it."""
    text = MIXER.format(marker=str(folder / "ran"), name=name)
    (folder / f"{module}.py").write_text(text)
    config = folder / "mine.py"
    config.write_text(CONFIG.format(module=module, name=name, small=str(small)))
    return config


def test_reading_a_run_runs_no_code(
    config_file: pathlib.Path,
    fails: Fails,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
) -> None:
    """A run whose mixer lies in the working directory is refused by every verb until trusted."""
    folder, run_folder = tmp_path / "code", tmp_path / "run"
    folder.mkdir()
    config, ran = _own_mixer(folder, "unknown_code", "Harm", config_file), folder / "ran"
    own = ("--config", config, "--workdir", run_folder, "--training.num_steps")
    trained = run("train.py", *own, 1)
    assert trained.returncode == 0, trained.stderr
    ran.unlink()

    monkeypatch.chdir(folder)
    saved = json.loads((run_folder / "config.json").read_text())
    model = tmp_path / "model"
    model.mkdir()
    room = {f"t{i}": np.zeros((300, 300), np.float32) for i in range(8)}  # for all sizes
    save_file(room, model / "model.safetensors")
    ours = {"config": saved["config"], "format": "native", "data_layout": {}}
    (model / "config.json").write_text(json.dumps({"tlm_jax": ours}))
    given, out = ("--checkpoint", run_folder), ("--out", tmp_path / "out")
    verbs = (
        ("eval", *given),
        ("generate", *given),
        ("align", *given),
        ("export", *given, *out),
        ("import", "--model", model, *out),
        ("plan", "--config", run_folder / "config.json"),
        ("train", "--config", config_file, "--workdir", run_folder),
        ("eval", *given, "--trust_module", "another_module"),
    )
    for verb in verbs:
        message = fails(*verb)
        assert "'unknown_code:Harm'" in message
        assert "runs the code of the module unknown_code" in message
        assert "add --trust_module unknown_code " in message
        assert not ran.exists(), verb

    assert cli.main(["export", *map(str, (*given, *out)), "--trust_module=unknown_code"]) == 0
    assert ran.exists()
    # A config of the user's own is trusted, so that a run with it goes on.
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *map(str, own), "1"]) == 0
    assert "has no tensor embedding" in fails("import", "--model", model, "--out", "x")


def test_installed_packages_come_before_the_working_directory(tmp_path: pathlib.Path) -> None:
    """Files named as packages that are imported at the start, and late, lie there to be run."""
    ran = tmp_path / "ran"
    for name in ("tyro", "difflib", "matplotlib"):
        (tmp_path / f"{name}.py").write_text(f"open({str(ran)!r}, 'a').write({name!r})\n")
    plan = ("plan", "--config", ROOT / "configs" / "tiny.py")
    done = subprocess.run(
        [sys.executable, "-m", "tlm_jax", *map(str, plan)],
        cwd=tmp_path,
        env=environment(1),
        capture_output=True,
        text=True,
    )
    assert not ran.exists(), ran.read_text()
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tiny_plan.png").is_file()


def test_a_mixer_in_the_config_file_itself(
    config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Annotations may be strings; its kind names the file, which another process may trust."""
    path = tmp_path / "in_one_file.py"
    text = MIXER.format(marker=str(tmp_path / "ran"), name="Inside")
    text = "from __future__ import annotations\n" + text.replace("pass", "extra: int = 3")
    path.write_text(
        text
        + "from tlm_jax.config import ModelConfig, RunConfig\n"
        + "def get_config():\n"
        + "    return RunConfig(model=ModelConfig(mixer=Inside()))\n"
    )
    config = config_io.load_config(path)
    values = to_dict(config)
    assert values["model"]["mixer"]["kind"] == "in_one_file:Inside"
    assert from_dict(values) == config
    assert config_io.trust_options(config) == ["--trust_module", str(path)]
    marker = tmp_path / "ran"
    marker.unlink()
    written = tmp_path / "cell.json"
    written.write_text(json.dumps(values))
    program = "import sys; from tlm_jax import cli; sys.exit(cli.main(sys.argv[1:]))"
    plan = [sys.executable, "-c", program, "plan", "--config", written.name]
    for options, status in (([], 1), (config_io.trust_options(config), 0)):
        done = subprocess.run([*plan, *options], cwd=tmp_path, env=environment(1))
        assert done.returncode == status
        assert marker.exists() == (status == 0)
    assert config_io.trust_options(config_io.load_config(config_file)) == []


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (None, "model.mixer has the kind 'None'; it must be module:Class"),
        (["os"], "it must be module:Class"),
        ("os.system", "it must be module:Class"),
        ("a b:C", "it must be module:Class"),
        ("\x1b[2J" + 300 * "x", "it must be module:Class"),
        ("os:system", "add --trust_module os "),
        ("tlm_jax.mlp:MLPConfig", "add --trust_module tlm_jax.mlp "),
    ],
)
def test_kinds_that_are_none(kind: object, message: str) -> None:
    values = to_dict(ModelConfig()) | {"mixer": {"kind": kind}}
    with pytest.raises(UserError) as caught:
        from_dict(values, ModelConfig, "model.")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 250
    assert str(caught.value).isprintable()


def test_only_mixers_have_a_kind() -> None:
    """A kind elsewhere does not make something else of a config."""
    with pytest.raises(UserError, match=r"unknown field model\.kind"):
        from_dict({"model": {"kind": "tlm_jax.mixers:AttentionConfig"}})


def test_trusted_modules_that_are_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """Not there, without the class, failing: a line each."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "empty_module.py").touch()
    (tmp_path / "failing_module.py").write_text("1 / 0\n")

    def complaint(module: str) -> str:
        config_io.trust([module])
        with pytest.raises(UserError) as caught:
            from_dict({"kind": f"{module}:C"}, MixerConfig)
        return str(caught.value)

    assert "run from the folder that has it" in complaint("nowhere_module")
    assert "empty_module has no such MixerConfig" in complaint("empty_module")
    assert "failing_module: ZeroDivisionError" in complaint("failing_module")
    with pytest.raises(UserError, match=r"nowhere.py: the file does not exist"):
        config_io.trust(["nowhere.py"])
    config_io.trust([])


def test_loaded_mixers_need_no_trust() -> None:
    mixer = AttentionConfig(num_heads=3)
    assert from_dict(to_dict(mixer), MixerConfig) == mixer


def test_a_working_directory_that_is_gone(
    fails: Fails, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    (folder := tmp_path / "gone").mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    message = fails("plan", "--config", ROOT / "configs" / "tiny.py")
    os.chdir(tmp_path)
    assert message == "the working directory no longer exists; cd to one that does"


def test_the_option_needs_a_value(fails: Fails) -> None:
    message = "--trust_module needs the name of a module, or its file"
    assert fails("plan", "--trust_module") == message
    assert fails("plan", "--trust-module=", "x") == message

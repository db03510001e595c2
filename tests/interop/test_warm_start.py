"""`--init_from`: another run's parameters, everything else fresh; resuming; what does not fit."""

import json
import pathlib
import shutil

import pytest
from folders import assert_bit_equal, read_run, write_llama
from helpers import Fails, steps

from tlm_jax import cli
from tlm_jax.data import load_tokenizer
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.interop import importing
from tlm_jax.models import skeleton
from tlm_jax.training import restore


def _params(folder: pathlib.Path, step: int):
    """The parameters of a run folder's checkpoint, and its metadata."""
    _, metadata = restore.saved_metadata(folder, step)
    config = restore.saved_config(metadata)
    mesh = mesh_lib.single_device_mesh()
    tokenizer = load_tokenizer(config.data.tokenizer)
    return restore.load_params(folder, step, skeleton(config.model), tokenizer, mesh), metadata


def _losses(folder: pathlib.Path, kind: str) -> dict[int, float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if row["kind"] == kind}


def test_a_run_goes_on_from_another_with_a_fresh_optimizer_and_resumes_without_it(
    finished: pathlib.Path,
    config_file: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its first evaluation is the other's last; interrupted, it no longer needs the other."""
    words = ["train", "--config", str(config_file), "--init_from", str(finished)]
    words += ["--training.log_every", "1", "--training.checkpoint_every", "2"]
    words += ["--optimizer.learning_rate", "1e-4", "--optimizer.final_learning_rate", "1e-5"]
    words += ["--training.eval_batches", "None", "--workdir"]  # all, as at the end of a run
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert cli.main([*words, str(straight), "--training.num_steps", "4"]) == 0
    assert f"Starting from the parameters of step 20 in {finished}." in " ".join(
        capsys.readouterr().out.split()
    )
    before = _losses(finished, "eval")
    assert _losses(straight, "eval")[0] == pytest.approx(before[20], abs=1e-6)
    assert steps(straight) == [2, 4]
    _, metadata = restore.saved_metadata(straight, 4)
    assert metadata["init_from"]["step"] == 20

    short = [str(broken), "--training.num_steps", "4"]
    assert cli.main([*words, *short, "--profile", "0:1"]) == 0
    shutil.rmtree(broken / "checkpoints" / "4")  # as if it had been killed after step 2
    shutil.rmtree(finished)
    assert cli.main([*words, *short]) == 0
    assert "Continuing from step 2" in capsys.readouterr().out
    assert_bit_equal(_params(straight, 4)[0], _params(broken, 4)[0])
    assert restore.saved_metadata(broken, 4)[1]["init_from"] == metadata["init_from"]


def test_an_imported_model_keeps_its_special_tokens_and_its_template(
    bpe: pathlib.Path, text_folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Two steps with a rate near zero leave the weights nearly as they were."""
    source = write_llama(tmp_path / "llama", bpe, bos_token_id=1, eos_token_id=2)
    settings = {"chat_template": "{{ messages }}", "bos_token": "<|im_start|>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    importing.import_model(source, tmp_path / "run", None, mesh_lib.single_device_mesh())
    config = tmp_path / "run" / "config.json"
    words = ["train", "--config", str(config), "--init_from", str(tmp_path / "run")]
    words += ["--data.path", str(text_folder), "--data.batch_size", "8", "--data.seq_len", "32"]
    words += ["--training.num_steps", "2", "--training.eval_batches", "1"]
    words += ["--optimizer.learning_rate", "1e-9", "--optimizer.final_learning_rate", "0"]
    assert cli.main([*words, "--workdir", str(tmp_path / "tuned")]) == 0
    params, metadata = _params(tmp_path / "tuned", 2)
    _, before = restore.saved_metadata(tmp_path / "run", 0)
    assert metadata["special_tokens"] == before["special_tokens"]
    assert metadata["chat_template"] == before["chat_template"] == "{{ messages }}"
    assert metadata.get("parameters_only") is None
    _, old = read_run(tmp_path / "run")
    import jax
    import numpy as np

    apart = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), old, params
    )
    assert 0 < max(jax.tree.leaves(apart)) < 1e-6


def test_what_does_not_fit_is_one_line(
    finished: pathlib.Path, config_file: pathlib.Path, tmp_path: pathlib.Path, fails: Fails
) -> None:
    """Another model, another tokenizer, no run; nothing is saved."""
    words = ("train", "--config", config_file, "--workdir", tmp_path / "new", "--init_from")
    message = fails(*words, finished, "--model.taper.start", "1.25", "--model.taper.end", "0.75")
    assert message.startswith(f"--init_from {finished} has another model (model.taper.")
    assert message.endswith(f"--config {finished / 'config.json'} names its own")
    message = fails(*words, finished, "--model.mixer.rope_theta", "500")
    assert "has another model (model.mixer.rope_theta: 10000.0 -> 500.0)" in message
    message = fails(*words, tmp_path)
    assert message == f"{tmp_path} is not a run folder: it has no checkpoints/"
    metadata = finished / "checkpoints" / "20"
    shutil.rmtree(metadata)
    shutil.rmtree(finished / "checkpoints" / "10", ignore_errors=True)
    assert "has no complete checkpoint" in fails(*words, finished)
    assert not steps(tmp_path / "new")

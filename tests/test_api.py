"""`import tlm_jax`: cheap, and what it offers agrees with the commands."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import NUM_STEPS, environment, steps

import tlm_jax
from tlm_jax import cli, config_io
from tlm_jax.api import LoadedModel
from tlm_jax.models import skeleton
from tlm_jax.training import metrics


def test_importing_costs_nothing() -> None:
    """Less than 0.3 s of CPU, and neither jax nor flax; names are there all the same."""
    program = (
        "import sys, time; before = time.process_time(); import tlm_jax; "
        "assert time.process_time() - before < 0.3; "
        "heavy = {'jax', 'flax', 'numpy', 'optax', 'orbax'} & set(sys.modules); "
        "assert not heavy, heavy; "
        "print(tlm_jax.layer_widths.__module__, 'train' in dir(tlm_jax)); "
        "assert 'jax' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(1), capture_output=True, text=True
    )
    assert done.stdout.split() == ["tlm_jax.taper", "True"], done.stderr


def test_every_name_is_there() -> None:
    for name in tlm_jax._HOMES:
        assert getattr(tlm_jax, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tlm_jax.nothing


@pytest.fixture(scope="module")
def loaded(finished_run: pathlib.Path) -> LoadedModel:
    return tlm_jax.load(finished_run)


def test_load_and_generate(finished_run: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The example of the README; the text is that of `tlm generate`."""
    model = tlm_jax.load(finished_run)
    text = model.generate("early layer", num_tokens=12, temperature=0)

    assert text.startswith("early layer")
    words = ["--checkpoint", str(finished_run), "--prompt", "early layer", "--num_tokens", "12"]
    capsys.readouterr()
    assert cli.main(["generate", *words, "--temperature", "0"]) == 0
    assert text in capsys.readouterr().out


def test_logits_and_scores_are_the_model_s(loaded: LoadedModel) -> None:
    model = skeleton(loaded.config.model).merge(loaded.params)
    text = "late width model"
    ids = loaded.encode(text)
    hidden, _ = model(jnp.asarray([ids]))
    direct = np.asarray(model.logits(hidden)[0])
    found = loaded.logits(text)
    assert found.shape == (len(ids), loaded.config.model.vocab_size)
    np.testing.assert_allclose(found, direct, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(loaded.logits(ids), found)
    log_probs = jax.nn.log_softmax(direct)
    expected = sum(float(log_probs[i, token]) for i, token in enumerate(ids[1:]))
    assert loaded.score([text, ""]) == [pytest.approx(expected, abs=1e-3), 0.0]
    with pytest.raises(tlm_jax.api.UserError, match="at least one token"):
        loaded.logits([])


def test_evaluate_is_that_of_training(loaded: LoadedModel, finished_run: pathlib.Path) -> None:
    """And so that of `tlm eval`, which tests/training/test_resume.py compares with it."""
    last = metrics.last_record(finished_run, "eval")
    assert last is not None
    score = loaded.evaluate()
    assert score.loss == pytest.approx(last["loss"], abs=1e-6)
    assert loaded.step == last["step"] == NUM_STEPS


def _without_evaluation(config_file: pathlib.Path, num_steps: int) -> tlm_jax.RunConfig:
    config = config_io.load_config(config_file)
    training = dataclasses.replace(
        config.training, num_steps=num_steps, eval_every=0, checkpoint_every=2
    )
    model = dataclasses.replace(config.model, num_layers=2)
    return dataclasses.replace(config, model=model, training=training)


def test_train_with_parts_of_a_user_s_own(
    config_file: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Optimizer, loss and hooks; a resumed run equals one that was not interrupted."""
    seen: list[tuple[int, float]] = []

    def watch(step: int, values: dict) -> None:
        seen.append((step, values["loss"]))

    def fail(step: int, values: dict) -> None:
        raise RuntimeError(f"no disk for step {step}")

    def twice(model, batch):
        hidden, _ = model(
            batch["inputs"], positions_BL=batch["positions"], document_ids_BL=batch["document_ids"]
        )
        log_probs = jax.nn.log_softmax(model.logits(hidden))
        return -2 * jnp.take_along_axis(log_probs, batch["targets"][..., None], axis=-1)[..., 0]

    def train(folder: str, num_steps: int, **options):
        config = _without_evaluation(config_file, num_steps)
        own = {"optimizer": optax.sgd(0.1, momentum=0.9), "loss": twice}
        return tlm_jax.train(config, tmp_path / folder, **own, **options)

    outcome = train("whole", 4, hooks=[fail, watch])
    assert (outcome.step, outcome.stopped_by) == (4, None)
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    lines = (tmp_path / "whole" / metrics.METRICS_FILE).read_text().splitlines()
    first = next(r for r in map(json.loads, lines) if r["kind"] == "eval")
    assert seen[0][1] == pytest.approx(2 * first["loss"], rel=0.02)
    assert seen[-1][1] < seen[0][1]
    said = capsys.readouterr()
    assert (said.out + said.err).count("no disk for step 1") == 1
    assert "no disk for step 2" not in said.out + said.err

    train("parts", 2, quiet=True)
    train("parts", 4, quiet=True)
    assert not capsys.readouterr().out
    assert steps(tmp_path / "parts") == steps(tmp_path / "whole")
    params = [tlm_jax.load(tmp_path / folder).params for folder in ("whole", "parts")]
    jax.tree.map(np.testing.assert_array_equal, *params)

"""A teacher in the train step: gradients by an oracle, resuming, and what is refused."""

import dataclasses
import json
import pathlib
import shutil

import batches
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Fails

import tlm_jax
from tlm_jax import cli
from tlm_jax import config as c
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.distributed.sharding import to_devices
from tlm_jax.models import skeleton
from tlm_jax.training import checkpoint, distillation, restore, step
from tlm_jax.training.updates import About, make_optimizer

MODEL = c.ModelConfig(
    vocab_size=64,
    num_layers=2,
    d_model=16,
    mlp_width=32,
    mixer=c.AttentionConfig(num_heads=2),
    compute_dtype="float32",
)
CONFIG = c.RunConfig(
    model=MODEL,
    data=c.DataConfig(seq_len=8, batch_size=8),
    optimizer=c.OptimizerConfig(warmup_steps=0, learning_rate=1e-2),
    training=c.TrainingConfig(loss_chunk=4, z_loss=0.1, teacher="original", teacher_weight=0.3),
)
TEACHER = skeleton(dataclasses.replace(MODEL, d_model=32, taper=c.TaperConfig(schedule="uniform")))


def _batch() -> dict[str, np.ndarray]:
    return batches.batch([[5], *[[8]] * 7], 8, vocab=64)


def _stepped(config: c.RunConfig, devices: int):
    """State and metrics after a step from fixed parameters, on a mesh."""
    model = skeleton(config.model)
    tx = make_optimizer(config.optimizer, 10, About.of(model), config.model.mlp)
    mesh = mesh_lib.make_mesh(config, jax.devices()[:devices])
    program = step.lower_train_step(config, model, tx, mesh, teacher=TEACHER).compile()
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, step.abstract_state(model, tx, mesh))
        state = jax.jit(
            lambda: step.init_state(model, tx, jax.random.key(0)), out_shardings=shardings
        )()
        where = jax.tree.map(lambda leaf: leaf.sharding, step.abstract_params(TEACHER, mesh))
        taught = jax.jit(lambda: TEACHER.init(jax.random.key(1)), out_shardings=where)()
        return program(state, to_devices(_batch(), mesh), taught)


def test_gradient_and_metrics_are_those_of_whole_logits() -> None:
    """Against all logits at once, with plain softmaxes; padding counts for nothing."""
    batch = jax.tree.map(jnp.asarray, _batch())
    taught = TEACHER.init(jax.random.key(1))
    model = skeleton(MODEL)

    def log_p(of, params):
        merged = of.merge(params)
        hidden, _ = merged(batch["inputs"], document_ids_BL=batch["document_ids"])
        return merged.logits(hidden)

    def oracle(params):
        logits, wanted = log_p(model, params), jax.nn.softmax(log_p(TEACHER, taught))
        own = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(own, batch["targets"][..., None], -1)[..., 0]
        divergence = jnp.sum(wanted * (jnp.log(wanted) - own), -1)
        scored = batch["document_ids"] > 0
        nll, divergence, z = (
            jnp.where(scored, x, 0.0).sum() / scored.sum()
            for x in (nll, divergence, jax.nn.logsumexp(logits, -1) ** 2)
        )
        return 0.3 * divergence + 0.7 * nll + 0.1 * z, (nll, divergence)

    params = model.init(jax.random.key(0))
    (_, (nll, divergence)), grads = jax.value_and_grad(oracle, has_aux=True)(params)
    norm = np.sqrt(sum(float(jnp.sum(g * g)) for g in jax.tree.leaves(grads)))
    for config, devices in (
        (CONFIG, 1),
        (
            dataclasses.replace(
                CONFIG,
                mesh=c.MeshConfig(data=2, fsdp=2, tensor=2),
                training=dataclasses.replace(CONFIG.training, grad_accumulation=2),
            ),
            8,
        ),
    ):
        _, metrics = _stepped(config, devices)
        assert float(metrics["loss"]) == pytest.approx(float(nll), rel=1e-5)
        assert float(metrics["divergence"]) == pytest.approx(float(divergence), rel=1e-5)
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)


def test_a_run_heals_towards_its_teacher_and_resumes_exactly(
    finished: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a pruned copy; interrupted, the parameters are equal; checkpoints hold no teacher."""
    pruned = tmp_path / "pruned"
    words = ["retaper", str(finished), "--out", str(pruned), "--schedule", "uniform"]
    assert cli.main([*words, "--base_width", "32", "--rows", "8"]) == 0
    words = ["train", "--config", str(pruned / "config.json"), "--init_from", str(pruned)]
    words += ["--training.teacher", str(finished), "--training.num_steps", "8"]
    words += ["--training.log_every", "1", "--training.checkpoint_every", "4", "--workdir"]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert cli.main([*words, str(straight)]) == 0
    assert f"Learning from step 20 in {finished}." in " ".join(capsys.readouterr().out.split())
    lines = map(json.loads, (straight / "metrics.jsonl").read_text().splitlines())
    apart = [line["divergence"] for line in lines if line["kind"] == "train"]
    assert 0 < apart[-1] < 0.8 * apart[0]
    _, saved = restore.saved_metadata(straight, 8)
    assert saved["teacher"]["step"] == 20
    without = restore.saved_metadata(finished, 20)[1]["state_shapes"]  # trained without one
    parts = {name.split("/")[0] for name in saved["state_shapes"]}
    assert parts == {name.split("/")[0] for name in without}
    assert sum(name.startswith("params/") for name in saved["state_shapes"]) == len(
        saved["param_shapes"]
    )

    shutil.copytree(straight, broken)
    shutil.rmtree(broken / "checkpoints" / "8")  # as if it had been killed after step 4
    assert cli.main([*words, str(broken)]) == 0
    assert "Continuing from step 4" in capsys.readouterr().out
    same = restore.saved_metadata(broken, 8)[1]
    assert checkpoint.params_id(same) == checkpoint.params_id(saved)


def test_what_cannot_teach_is_one_line(
    finished: pathlib.Path, train: tuple[str, ...], tmp_path: pathlib.Path, fails: Fails
) -> None:
    assert fails(*train, "--training.teacher", tmp_path) == (
        f"{tmp_path} is not a run folder: it has no checkpoints/"
    )
    assert fails(*train, "--training.teacher", finished, "--model.vocab_size", "300") == (
        f"training.teacher {finished} has a vocabulary of 257 tokens and the model one of 300; "
        "a teacher needs the same"
    )
    message = fails(
        *train,
        *("--training.teacher", finished, "--model.mlp.periods", 1, 1),
        *("--model.taper.multiple_of", 32, "--model.mlp.online_chunks", 0, 16),
        "--model.mlp.online_in_training",
    )
    assert message.startswith("training.teacher does not work with mlp.online_in_training")
    config = restore.saved_config(restore.saved_metadata(finished, 20)[1])
    taught = dataclasses.replace(config.training, teacher=str(finished))
    config = dataclasses.replace(config, training=taught)
    with pytest.raises(c.UserError, match="a custom loss exclude each other"):
        tlm_jax.train(config, tmp_path / "new", loss=lambda model, batch: 0.0, quiet=True)
    other = {"teacher": {"params": "0", "step": 3}}
    with pytest.raises(c.UserError, match=r"learned from so far \(those of step 3\)"):
        distillation.require_same(distillation.find(config), other)

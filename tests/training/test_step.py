"""The train step: accumulation, clipping, decay, skipped updates, meshes."""

import dataclasses
import pathlib

import batches
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tlm_jax.config import (
    AttentionConfig,
    DataConfig,
    MeshConfig,
    MLPConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TaperConfig,
    TrainingConfig,
    UserError,
)
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.distributed.sharding import ShardingRules, to_devices
from tlm_jax.mixers import TitansConfig
from tlm_jax.models import skeleton
from tlm_jax.training import checkpoint, step
from tlm_jax.training.updates import About, learning_rate, make_optimizer

CONFIG = RunConfig(
    model=ModelConfig(
        vocab_size=64,
        num_layers=3,
        d_model=32,
        mlp_width=64,
        taper=TaperConfig(schedule="explicit", widths=(96, 48, 48)),
        mixer=AttentionConfig(num_heads=4, num_kv_heads=4),
        compute_dtype="float32",
    ),
    data=DataConfig(seq_len=16, batch_size=8),
    # A large eps: without it AdamW turns rounding noise in tiny gradients into full steps.
    optimizer=OptimizerConfig(
        learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=2, eps=1e-3
    ),
    training=TrainingConfig(num_steps=10, loss_chunk=8, z_loss=1e-4),
)


def changed(**training) -> RunConfig:
    return dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, **training))


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Rows with two documents and some padding, but for the first."""
    return batches.batch([[16], *[[7, 6]] * 7], 16, vocab=64, seed=seed)


def train(config: RunConfig, num_devices: int = 1, steps: int = 3, batches=None):
    """Final state and the metrics of each step."""
    model = skeleton(config.model)
    tx = make_optimizer(config.optimizer, config.training.num_steps, About.of(model))
    mesh = mesh_lib.make_mesh(config, jax.devices()[:num_devices])
    with jax.set_mesh(mesh):
        shardings = step.state_shardings(model, tx, mesh)
        init = jax.jit(lambda key: step.init_state(model, tx, key), out_shardings=shardings)
        state = init(jax.random.key(0))
        run = jax.jit(step.make_train_step(config, model, tx), out_shardings=(shardings, None))
        history = []
        for index in range(steps):
            data = batch(index) if batches is None else batches[index]
            state, metrics = run(state, to_devices(data, mesh))
            history.append({k: v.item() for k, v in jax.device_get(metrics).items()})
    return state, history


def assert_close(a, b, tolerance: float = 2e-5):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=str(path))


@pytest.fixture(scope="module")
def reference():
    return train(CONFIG)


def test_training_lowers_the_loss_on_a_batch_it_repeats():
    _, history = train(changed(num_steps=40), steps=40, batches=[batch()] * 40)
    assert history[0]["loss"] == pytest.approx(np.log(64), abs=0.7)
    assert history[-1]["loss"] < history[0]["loss"] - 1.5
    assert history[0]["tokens"] == 16 + 7 * 13


def test_accumulated_parts_equal_the_whole_batch(reference):
    """Parts with unequal numbers of tokens still weigh every token alike."""
    state, history = train(changed(grad_accumulation=4))
    assert_close(state.params, reference[0].params, 1e-4)
    for a, b in zip(history, reference[1], strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_steps_on_eight_devices_equal_those_on_one(reference):
    """Losses and gradients on other meshes and of other mixers: tests/distributed."""
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    state, history = train(dataclasses.replace(CONFIG, mesh=mesh), num_devices=8)
    for a, b in zip(history, reference[1], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert_close(state.params, reference[0].params, 1e-4)
    gate = state.params["segments"]["001"]["mlp"]["0"]["gate"]
    shards = {shard.data.shape for shard in gate.addressable_shards}
    assert shards == {(2, 32 // mesh.fsdp, 48 // mesh.tensor)}
    moments = jax.tree.leaves(state.opt_state[1][0].mu["segments"]["001"]["mlp"]["0"]["gate"])[0]
    assert moments.sharding == gate.sharding


def test_a_non_finite_gradient_skips_the_update_and_is_counted():
    """The state after a bad batch is that before it, but for the counters."""
    model = skeleton(CONFIG.model)
    tx = make_optimizer(CONFIG.optimizer, 10, About.of(model))
    state = step.init_state(model, tx, jax.random.key(0))
    run = jax.jit(step.make_train_step(CONFIG, model, tx))
    state, _ = run(state, batch())
    scale = state.params["final_norm"]["scale"]
    broken = dataclasses.replace(
        state, params=state.params | {"final_norm": {"scale": scale.at[3].set(jnp.nan)}}
    )
    after, metrics = run(broken, batch())
    assert_close(after.params["segments"], state.params["segments"], 0)
    assert_close(after.opt_state, state.opt_state, 0)
    assert not np.isfinite(metrics["loss"])
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (2, 1, 1)
    after, _ = run(dataclasses.replace(after, params=state.params), batch())
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (3, 1, 0)
    assert not np.array_equal(after.params["embedding"], state.params["embedding"])


def test_a_spike_is_skipped_if_asked_and_counted(monkeypatch: pytest.MonkeyPatch):
    """A gradient many times as long as those before, once there are enough of these."""
    monkeypatch.setattr(step, "_NORM_STEPS", 3)
    config = changed(skip_spikes=4.0)
    model = skeleton(config.model)
    tx = make_optimizer(config.optimizer, 10, About.of(model))
    run = jax.jit(step.make_train_step(config, model, tx))
    state = step.init_state(model, tx, jax.random.key(0))
    norms = []
    for index in range(3):
        state, metrics = run(state, batch(index))
        norms.append(float(metrics["grad_norm"]))
    assert float(state.typical_norm) == pytest.approx(np.mean(norms), rel=1e-4)
    # A larger scale at the end makes the model very sure of itself, and very wrong.
    sure = jax.tree.map(lambda a: a, state.params)
    sure["final_norm"]["scale"] = 100 * sure["final_norm"]["scale"]
    before = dataclasses.replace(state, params=sure)
    after, metrics = run(before, batch(3))
    assert float(metrics["grad_norm"]) > 4 * np.mean(norms)
    assert int(metrics["skipped"]) == 1
    assert_close(after.params, before.params, 0)
    assert float(after.typical_norm) == float(before.typical_norm)
    plain = jax.jit(step.make_train_step(CONFIG, model, tx))
    assert int(plain(before, batch(3))[1]["skipped"]) == 0


@pytest.mark.parametrize("periods", [(1,), (1, 4)])
def test_skipped_updates_count_neither_in_the_learning_rate_nor_in_the_typical_norm(periods):
    """Two batches are skipped at the start; the next update is then the first."""
    config = dataclasses.replace(
        CONFIG, model=dataclasses.replace(CONFIG.model, mlp=MLPConfig(periods=periods))
    )
    model = skeleton(config.model)
    tx = make_optimizer(config.optimizer, 10, About.of(model), config.model.mlp)
    schedule = learning_rate(config.optimizer, 10)
    run = jax.jit(step.make_train_step(config, model, tx))
    state = step.init_state(model, tx, jax.random.key(0))
    scale = state.params["final_norm"]["scale"]
    bad = state.params | {"final_norm": {"scale": scale.at[3].set(jnp.nan)}}
    good = state.params
    norms = []
    for index, params in enumerate((bad, bad, good, good, bad, good)):
        made = sum(np.isfinite(norms))
        state, metrics = run(dataclasses.replace(state, params=params), batch(index))
        assert float(metrics["learning_rate"]) == pytest.approx(float(schedule(made)), rel=1e-6)
        norms.append(float(metrics["grad_norm"]))
    finite = [norm for norm in norms if np.isfinite(norm)]
    assert len(finite) == 3
    assert float(state.typical_norm) == pytest.approx(np.mean(finite), rel=1e-5)


def test_only_matrices_decay():
    """Weight decay moves parameters without a gradient, and norm scales not at all."""
    config = dataclasses.replace(
        CONFIG.optimizer, weight_decay=0.5, warmup_steps=0, learning_rate=0.1
    )
    model = skeleton(CONFIG.model)
    params = model.init(jax.random.key(0))
    tx = make_optimizer(config, 10, About.of(model))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for (path, update), value in zip(
        jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params), strict=True
    ):
        decayed = path[-1].key != "scale"
        expected = -0.1 * 0.5 * value if decayed else np.zeros_like(value)
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=str(path))


def test_learning_rate_warms_up_and_decays_to_the_end():
    schedule = learning_rate(
        OptimizerConfig(learning_rate=1.0, final_learning_rate=0.1, warmup_steps=4), 20
    )
    rates = [float(schedule(i)) for i in range(21)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[4] == pytest.approx(1.0)
    assert rates[20] == pytest.approx(0.1)
    assert rates[12] == pytest.approx(0.55, abs=0.01)
    assert np.all(np.diff(rates[:5]) > 0)
    assert np.all(np.diff(rates[4:]) < 0)


def test_titans_without_persistent_tokens_train_save_and_go_on(tmp_path: pathlib.Path):
    """What a model does without is no array of size zero, which cannot be saved."""
    off = {"momentum": False, "forgetting": False, "conv_width": 1, "gradient_clip": None}
    mixer = TitansConfig(num_heads=1, memory_depth=1, chunk=16, num_persistent=0, **off)
    config = dataclasses.replace(
        CONFIG,
        model=ModelConfig(vocab_size=64, num_layers=1, d_model=8, mlp_width=16, mixer=mixer,
                          taper=TaperConfig(schedule="uniform"), remat="none"),
    )  # fmt: skip
    model = skeleton(config.model)
    tx = make_optimizer(config.optimizer, 10, About.of(model))
    run = jax.jit(step.make_train_step(config, model, tx))
    first, _ = run(step.init_state(model, tx, jax.random.key(0)), batch())
    data = grain.MapDataset.range(4).to_iter_dataset()
    with checkpoint.Checkpoints(tmp_path) as saved:
        saved.save(1, first, iter(data), {})
        saved.wait()
        where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), first
        )
        again = saved.restore(1, shapes, iter(data))
        params = saved.restore_params(1, shapes.params)
    assert_close(again, first, 0)
    assert_close(params, first.params, 0)
    assert_close(run(again, batch(1))[0], run(first, batch(1))[0], 0)


def test_gradients_are_clipped():
    params = {"w": jnp.zeros(4)}
    config = dataclasses.replace(CONFIG.optimizer, clip_norm=1e-3)
    tx = make_optimizer(config, 10, About(decays={"w": False}, logical_axes=None))
    state = tx.init(params)
    _, state = tx.update({"w": jnp.full(4, 100.0)}, state, params)
    assert float(optax.global_norm(state[1][0].mu)) == pytest.approx(0.1 * 1e-3, rel=1e-4)


def test_a_mesh_that_does_not_fit_is_one_clear_line():
    with pytest.raises(UserError, match=r"needs 3 devices, and there are 8"):
        mesh_lib.make_mesh(dataclasses.replace(CONFIG, mesh=MeshConfig(data=3)))
    with pytest.raises(UserError, match=r"needs a multiple of 3 devices"):
        mesh_lib.make_mesh(dataclasses.replace(CONFIG, mesh=MeshConfig(fsdp=3)))
    with pytest.raises(UserError, match=r"batch_size=8 in 2 part.* use data.batch_size=16"):
        mesh_lib.make_mesh(changed(grad_accumulation=2))
    wide = dataclasses.replace(CONFIG, mesh=MeshConfig(data=1, tensor=8))
    model = skeleton(wide.model)
    tx = make_optimizer(wide.optimizer, 10, About.of(model))
    with pytest.raises(UserError, match=r"heads is 4 and does not divide over 8"):
        step.state_shardings(model, tx, mesh_lib.make_mesh(wide))


def test_sharding_rules_split_no_unknown_names_and_refuse_collisions():
    rules = ShardingRules(mlp="fsdp")
    assert rules.spec(("embed", "a custom layer's")) == jax.P("fsdp", None)
    with pytest.raises(ValueError, match="twice"):
        rules.spec(("embed", "mlp"))

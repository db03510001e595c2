"""Schedules; Muon and Adafactor on stacks; rates by width; optimizers of a user's own."""

import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import NUM_STEPS, steps
from test_step import CONFIG, batch

import tlm_jax
from tlm_jax import config_io
from tlm_jax.config import RunConfig
from tlm_jax.models import skeleton
from tlm_jax.optimizers import AdafactorConfig, MuonConfig, OptimizerConfig
from tlm_jax.training import checkpoint, checksums, step
from tlm_jax.training.updates import About, learning_rate, make_optimizer, register_optimizer

OTHERS = [MuonConfig(weight_decay=0.0), AdafactorConfig(weight_decay=0.0)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", {0: 0.2, 4: 1.0, 52: 0.55, 100: 0.1}),
        ("linear", {0: 0.2, 4: 1.0, 52: 0.55, 100: 0.1}),
        ("wsd", {0: 0.2, 4: 1.0, 79: 1.0, 90: 0.55, 100: 0.1}),
    ],
)
def test_schedules(schedule, expected) -> None:
    config = OptimizerConfig(
        learning_rate=1.0, final_learning_rate=0.1, warmup_steps=4, schedule=schedule
    )
    rate = learning_rate(config, 100)
    for index, value in expected.items():
        assert float(rate(index)) == pytest.approx(value, abs=1e-6), index


def test_cosine_is_optax_s_to_the_last_bit() -> None:
    config = OptimizerConfig(warmup_steps=3)
    plain = optax.warmup_cosine_decay_schedule(
        config.learning_rate / 4, config.learning_rate, 3, 50, config.final_learning_rate
    )
    ours = learning_rate(config, 50)
    assert [float(ours(i)) for i in range(60)] == [float(plain(i)) for i in range(60)]


def directions(config: OptimizerConfig, params, gradients, logical_axes):
    """Updates of two steps at a rate of one."""
    config = dataclasses.replace(
        config, learning_rate=1.0, final_learning_rate=1.0, warmup_steps=0, clip_norm=1e9
    )
    about = About(decays=jax.tree.map(lambda _: False, params), logical_axes=logical_axes)
    tx = make_optimizer(config, 10, about)
    state = tx.init(params)
    found = []
    for gradient in gradients:
        updates, state = jax.jit(tx.update)(gradient, state, params)
        found.append(updates)
    return found


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        (("embed", "mlp"), (8, 12)),
        (("mlp", "embed"), (12, 8)),
        (("embed", "heads", "head_dim"), (8, 2, 3)),
        (("heads", "head_dim", "embed"), (2, 3, 8)),
        (("embed", None, "heads", "head_dim"), (8, 3, 2, 2)),
        ((None, None), (5, 7)),
    ],
)
def test_muon_on_a_stack_is_muon_on_each_layer(axes, shape) -> None:
    """And each update is an orthogonal matrix times 0.2 sqrt(longer side)."""
    layers = 3
    keys = jax.random.split(jax.random.key(0), 3)
    params, *gradients = (jax.random.normal(key, (layers, *shape)) for key in keys)

    def tree(leaf, names):
        return {"segments": {"000": {"mixer": {"w": leaf}}}}, {
            "segments": {"000": {"mixer": {"w": names}}}
        }

    stacked, names = tree(params, ("layers", *axes))
    together = directions(MuonConfig(), stacked, [tree(g, names)[0] for g in gradients], names)
    for layer in range(layers):
        one, names = tree(params[layer][None], ("layers", *axes))
        alone = directions(
            MuonConfig(), one, [tree(g[layer][None], names)[0] for g in gradients], names
        )
        for a, b in zip(together, alone, strict=True):
            a, b = (u["segments"]["000"]["mixer"]["w"] for u in (a, b))
            np.testing.assert_allclose(a[layer], b[0], rtol=1e-4, atol=2e-5)
            update = np.asarray(b[0])
            if None in axes and len(axes) > 2:
                update = update[:, 0]  # one of the matrices side by side
            last = axes[-1] == "embed"
            matrix = update.reshape(-1, shape[-1]) if last else update.reshape(shape[0], -1)
            values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * np.sqrt(max(matrix.shape)))
            assert 0.5 < values.min() <= values.max() < 1.5


def test_adafactor_on_a_stack_is_adafactor_on_each_layer() -> None:
    config = AdafactorConfig(min_dim_factored=8)
    keys = jax.random.split(jax.random.key(0), 3)
    scale = jnp.array([1e-3, 1.0, 1e3])[:, None, None]
    params, *gradients = (scale * jax.random.normal(key, (3, 8, 12)) for key in keys)

    def of(layers: slice) -> list[jax.Array]:
        trees = [{"segments": {"w": leaf[layers]}} for leaf in (params, *gradients)]
        return [u["segments"]["w"] for u in directions(config, trees[0], trees[1:], None)]

    together = of(slice(None))
    for layer in range(3):
        for a, b in zip(together, of(slice(layer, layer + 1)), strict=True):
            np.testing.assert_allclose(a[layer], b[0], rtol=1e-5)
            assert float(jnp.sqrt(jnp.mean(b**2))) <= 1.0 + 1e-5


def test_muon_leaves_embeddings_norms_and_vectors_to_adamw() -> None:
    mixer = dataclasses.replace(CONFIG.model.mixer, bias="all")
    model = skeleton(dataclasses.replace(CONFIG.model, mixer=mixer))
    params = model.init(jax.random.key(0))
    gradients = [jax.tree.map(jnp.ones_like, params)]
    (muon,) = directions(MuonConfig(), params, gradients, model.logical_axes)
    (adamw,) = directions(OptimizerConfig(), params, gradients, model.logical_axes)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(muon), jax.tree.leaves(adamw), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        is_matrix = name.startswith("segments") and "norm" not in name and "bias" not in name
        assert bool(jnp.allclose(a, b)) != is_matrix, name


@pytest.mark.parametrize("optimizer", OTHERS, ids=lambda o: type(o).__name__)
def test_other_optimizers_learn_and_survive_json(optimizer: OptimizerConfig) -> None:
    config = dataclasses.replace(
        CONFIG, optimizer=dataclasses.replace(optimizer, learning_rate=1e-2, warmup_steps=2)
    )
    assert config_io.from_dict(config_io.to_dict(config)) == config
    model = skeleton(config.model)
    tx = make_optimizer(config.optimizer, 30, About.of(model), config.model.mlp)
    update = jax.jit(step.make_train_step(config, model, tx))
    state = step.init_state(model, tx, jax.random.key(0))
    losses = []
    for _ in range(30):
        state, metrics = update(state, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    assert int(state.skipped) == 0


WSD = OptimizerConfig(schedule="wsd")


@pytest.mark.parametrize("optimizer", [*OTHERS, WSD], ids=["muon", "adafactor", "wsd"])
def test_resumed_bit_for_bit(
    optimizer: OptimizerConfig, config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = dataclasses.replace(
        config_io.load_config(config_file),
        optimizer=dataclasses.replace(optimizer, learning_rate=1e-2, warmup_steps=2),
    )

    def last_state() -> dict[str, str]:
        tlm_jax.train(config, tmp_path, quiet=True)
        folder = tmp_path / "checkpoints" / str(NUM_STEPS)
        return checksums.saved(folder / checkpoint.CHECKSUMS)

    straight = last_state()
    shutil.rmtree(tmp_path / "checkpoints" / str(NUM_STEPS))
    assert steps(tmp_path) == [NUM_STEPS // 2]
    assert last_state() == straight


def test_a_wider_mlp_moves_its_last_matrix_less_if_asked() -> None:
    """Rates of the down projections are as the mean width over their own."""
    model = skeleton(CONFIG.model)
    widths = CONFIG.model.mlp_widths
    assert len(set(widths)) > 1
    params = model.init(jax.random.key(0))
    gradients = [jax.tree.map(jnp.ones_like, params)]
    plain, by_width = (
        directions(OptimizerConfig(rate_by_width=on), params, gradients, model.logical_axes)[0]
        for on in (False, True)
    )
    mean = sum(widths) / len(widths)
    for index, segment in enumerate(CONFIG.model.segments):
        name = f"{index:03d}"
        a, b = (u["segments"][name]["mlp"]["0"]["down"] for u in (plain, by_width))
        np.testing.assert_allclose(b, a * mean / segment.pattern[0].mlp_width, rtol=1e-5)
        a, b = (u["segments"][name]["mlp"]["0"]["up"] for u in (plain, by_width))
        np.testing.assert_array_equal(a, b)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SignConfig(OptimizerConfig):
    scale: float = 2.0


def test_an_optimizer_of_a_user_s_own() -> None:
    with pytest.raises(TypeError, match="no optimizer is registered for SignConfig"):
        make_optimizer(SignConfig(), 10, About(decays=None, logical_axes=None))
    register_optimizer(
        SignConfig,
        lambda config, about: optax.stateless(
            lambda updates, _: jax.tree.map(lambda u: config.scale * jnp.sign(u), updates)
        ),
    )
    params = {"w": jnp.zeros(3)}
    (update,) = directions(SignConfig(), params, [{"w": jnp.array([3.0, -1.0, 2.0])}], None)
    np.testing.assert_allclose(update["w"], [-2.0, 2.0, -2.0])
    run = RunConfig(optimizer=SignConfig(scale=3.0))
    assert config_io.from_dict(config_io.to_dict(run)) == run

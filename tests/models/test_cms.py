"""Chains of MLPs (continuum memory systems) against their definition, and their budgets."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlm_jax import costs, ops
from tlm_jax.config import (
    AttentionConfig,
    DataConfig,
    MLPConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TaperConfig,
    TrainingConfig,
)
from tlm_jax.models import skeleton
from tlm_jax.models.counted_costs import count_products
from tlm_jax.training import step
from tlm_jax.training.updates import About, make_optimizer

VOCAB, LENGTH = 64, 24
# Little optimised, which halves the time to compile.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
LEVEL_TAPER = TaperConfig(schedule="linear", start=1.5, end=0.5, multiple_of=4)
CONFIG = ModelConfig(
    vocab_size=VOCAB,
    num_layers=3,
    d_model=16,
    mlp_width=48,
    taper=TaperConfig(schedule="explicit", widths=(72, 36, 36), multiple_of=12),
    mlp=MLPConfig(periods=(4, 2, 1), level_taper=LEVEL_TAPER),
    mixer=AttentionConfig(num_heads=2),
    remat="none",
    compute_dtype="float32",
)


def parameters(config: ModelConfig, seed: int = 0):
    """Drawn without a compiled initialiser; norm scales lie around one."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = 0.3 * rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(noise + (path[-1].key == "scale"))

    return jax.tree_util.tree_map_with_path(draw, skeleton(config).shapes)


def tokens(seed: int = 0, rows: int = 3, length: int = LENGTH) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (rows, length), np.int32))


# Row 0 is one document; rows 1 and 2 are two.
SEGMENT_IDS = jnp.array([[1] * LENGTH, *[[1] * 10 + [2] * 14] * 2])
POSITIONS = jnp.array([[*range(LENGTH)], *[[*range(10), *range(14)]] * 2])


@functools.cache
def _forward(config: ModelConfig):
    def forward(params, ids):
        model = skeleton(config).merge(params)
        return model.logits(model(ids, document_ids_BL=SEGMENT_IDS, positions_BL=POSITIONS)[0])

    return jit(forward)


def logits(ids: jax.Array) -> jax.Array:
    out = _forward(CONFIG)(parameters(CONFIG), ids)
    assert np.isfinite(out).all()
    return out


def test_a_layer_is_attention_and_then_each_level_with_its_own_residual():
    """y_i = y_{i-1} + SwiGLU_i(RMSNorm_i(y_{i-1})), in the order of the periods."""
    params, ids = parameters(CONFIG), tokens()
    model = skeleton(CONFIG).merge(params)
    widths = [spec.mlp_widths for spec in CONFIG.layers]
    assert widths == [(36, 24, 12), (20, 12, 4), (20, 12, 4)]
    x = np.asarray(params["embedding"])[np.asarray(ids)]
    for number, (segment, index) in enumerate([("000", 0), ("001", 0), ("001", 1)]):
        layer = model.segments.layer(number)
        normed = layer.mixer_norm(np.float32(x))
        x = x + np.asarray(layer.mixer(normed, POSITIONS, SEGMENT_IDS)[0])
        for level in range(3):
            stored = params["segments"][segment]["mlp"][str(level)]
            w = jax.tree.map(lambda a, i=index: np.asarray(a)[i].astype(np.float64), stored)
            h = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + CONFIG.norm_eps)
            h = h * w["norm"]["scale"]
            gate = h @ w["gate"]
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w["up"])) @ w["down"]
    expected = model.logits(model.final_norm(jnp.float32(x)))
    np.testing.assert_allclose(logits(ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("levels", [1, 3])
def test_output_projections_start_by_the_number_of_residual_branches(levels: int):
    """A mixer and each level of an MLP are one branch, all of which add to the stream."""
    config = ModelConfig(
        vocab_size=VOCAB,
        num_layers=2,
        d_model=64,
        mlp_width=192,
        taper=TaperConfig(schedule="uniform"),
        mlp=MLPConfig(periods=(1,) * levels),
        mixer=AttentionConfig(num_heads=2),
    )
    block = skeleton(config).init(jax.random.key(0))["segments"]["000"]
    branches = 2 * (1 + levels)
    assert np.std(block["mixer"]["out"]) == pytest.approx((branches * 64) ** -0.5, rel=0.05)
    for level in block["mlp"].values():
        expected = (branches * 192 / levels) ** -0.5
        assert np.std(level["down"]) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("levels", "level_taper"),
    [(1, False), *itertools.product((2, 3, 4), (False, True))],
)
def test_tapered_and_uniform_twins_cost_the_same(levels: int, level_taper: bool):
    """Planned, in the real trees, and by the products of the traced model."""
    config = ModelConfig(
        vocab_size=VOCAB,
        num_layers=4,
        d_model=32,
        mlp_width=96,
        taper=TaperConfig(schedule="cosine", multiple_of=12),
        mlp=MLPConfig(
            periods=(1,) * levels,
            level_taper=dataclasses.replace(LEVEL_TAPER, multiple_of=1)
            if level_taper
            else MLPConfig().level_taper,
        ),
        mixer=AttentionConfig(num_heads=2),
        scan_layers=False,
        remat="none",
    )
    twin = dataclasses.replace(config.uniform_twin(), scan_layers=False)
    assert config.mlp_widths[0] > config.mlp_widths[-1]
    tapered_levels = len({len(set(spec.mlp_widths)) for spec in config.layers} - {1}) > 0
    assert tapered_levels == level_taper
    assert costs.twin_difference(config, 16) == {}
    plain = dataclasses.replace(config, mlp=MLPConfig())
    norms = (levels - 1) * config.num_layers * config.d_model
    for one in (config, twin):
        planned, real = costs.model_costs(one, 16), skeleton(one)
        assert planned.parameters == real.num_params
        # A chain costs what one MLP of the layer's width does, and its norms.
        assert real.num_params == skeleton(plain).num_params + norms
        per_layer = [
            sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(segment))
            for segment in real.shapes["segments"].values()
            for _ in range(jax.tree.leaves(segment)[0].shape[0])
        ]
        assert [layer.parameters for layer in planned.layers] == per_layer
        assert _products(one, 16) == planned.forward_flops_full * 16


def _products(config: ModelConfig, length: int) -> int:
    """FLOPs of the matrix products of a forward pass over one row."""

    def forward(params, ids):
        model = skeleton(config).merge(params)
        return model.logits(model(ids)[0])

    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    with ops.references():
        return count_products(jax.make_jaxpr(forward)(skeleton(config).shapes, ids).jaxpr)[0]


def test_future_tokens_change_nothing_before_them():
    ids = tokens()
    before, after = logits(ids), logits(ids.at[0, 15].add(1) % VOCAB)
    np.testing.assert_array_equal(before[0, :15], after[0, :15])
    assert (before[0, 15:] != after[0, 15:]).any(axis=-1).all()


def test_rows_do_not_see_each_other():
    ids = tokens()
    before, after = logits(ids), logits(ids.at[1].set(tokens(seed=7)[1]))
    np.testing.assert_array_equal(before[jnp.array([0, 2])], after[jnp.array([0, 2])])
    assert (before[1] != after[1]).any(axis=-1).mean() > 0.9


def test_documents_of_a_row_do_not_see_each_other():
    ids = tokens()
    other = tokens(seed=7)
    first, second = ids.at[1, :10].set(other[1, :10]), ids.at[1, 10:].set(other[1, 10:])
    np.testing.assert_array_equal(logits(ids)[1, 10:], logits(first)[1, 10:])
    np.testing.assert_array_equal(logits(ids)[1, :10], logits(second)[1, :10])


def test_scanned_equals_unrolled():
    """Logits and gradients, with and without rematerialisation."""

    def run(config: ModelConfig):
        def value(params, ids):
            model = skeleton(config).merge(params)
            out = model.logits(model(ids)[0])
            return jnp.mean(jnp.square(jax.nn.log_softmax(out))), out

        return jit(jax.value_and_grad(value, has_aux=True))(parameters(config), tokens())

    (_, a), grads_a = run(dataclasses.replace(CONFIG, remat="full"))
    (_, b), grads_b = run(dataclasses.replace(CONFIG, scan_layers=False))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(grads_a), jax.tree.leaves(grads_b), strict=True
    ):
        scale = float(np.abs(y).max())
        assert scale > 0, f"{path} gets no gradient"
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4 * scale, err_msg=str(path))


def test_decoding_with_a_cache_equals_the_full_pass():
    """300 tokens, one by one."""
    params, ids = parameters(CONFIG), tokens(rows=2, length=300)
    model = skeleton(CONFIG)

    @jit
    def decode(params, ids):
        built = model.merge(params)

        def one(cache, token_and_index):
            token_B, index = token_and_index
            positions = jnp.full((2, 1), index)
            hidden, cache = built(token_B[:, None], positions_BL=positions, cache=cache)
            return cache, built.logits(hidden)[:, 0]

        _, out = jax.lax.scan(one, built.init_cache(2, 300), (ids.T, jnp.arange(300)))
        return out.swapaxes(0, 1)

    @jit
    def full(params, ids):
        built = model.merge(params)
        return built.logits(built(ids)[0])

    expected = full(params, ids)
    assert np.std(expected) > 0.3
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(decode(params, ids), expected, rtol=0, atol=5e-5 * scale)


def test_bfloat16_training_with_periods_stays_finite():
    """200 steps at a high rate; no step is skipped, and the loss falls."""
    config = RunConfig(
        model=dataclasses.replace(
            CONFIG, num_layers=1, taper=TaperConfig(schedule="uniform"), compute_dtype="bfloat16"
        ),
        data=DataConfig(seq_len=16, batch_size=4),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=10),
        training=TrainingConfig(num_steps=200),
    )
    model = skeleton(config.model)
    tx = make_optimizer(config.optimizer, 200, About.of(model), config.model.mlp)
    params = jax.tree.map(lambda a: 0.5 * a, parameters(config.model))
    fresh = step.init_state(model, tx, jax.random.key(0))
    state = dataclasses.replace(fresh, params=params, opt_state=tx.init(params))
    ids = tokens(rows=4, length=17)
    positions = jnp.broadcast_to(jnp.arange(16), (4, 16))
    batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:], "positions": positions}
    batch["document_ids"] = jnp.ones_like(positions)

    train_step = jit(step.make_train_step(config, model, tx), donate_argnums=0)
    history = []
    for _ in range(200):
        state, metrics = train_step(state, batch)
        history.append(metrics)
    metrics = {name: np.stack([one[name] for one in history]) for name in ("loss", "grad_norm")}
    assert int(state.skipped) == 0
    assert np.isfinite(metrics["loss"]).all()
    assert np.isfinite(metrics["grad_norm"]).all()
    assert metrics["loss"][-1] < 0.1 * metrics["loss"][0]
    assert all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp": MLPConfig(periods=(1,) * 5)}, r"MLP width 72 of layer 0 .* 5 levels; use taper"),
        (
            {"mlp": MLPConfig(periods=(1, 1), level_taper=TaperConfig(multiple_of=16))},
            r"mlp.level_taper in layer 0: levels=2 \* level_width=36 = 72 is not a multiple",
        ),
        (
            {"mlp": MLPConfig(level_taper=LEVEL_TAPER)},
            r"mlp.level_taper in layer 0: levels=1 cannot run .* use levels=2",
        ),
    ],
)
def test_widths_that_do_not_fit_the_levels_are_one_clear_message(changes, message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize("periods", [(), (1, 0), (-1,)])
def test_periods_must_be_positive(periods: tuple[int, ...]):
    with pytest.raises(ValueError, match="every level needs a period of at least 1 step"):
        MLPConfig(periods=periods)


def test_levels_of_a_layer_share_its_width_exactly():
    for width, levels in itertools.product((12, 24, 36, 72), (2, 3, 4)):
        mlp = MLPConfig(
            periods=(1,) * levels, level_taper=dataclasses.replace(LEVEL_TAPER, multiple_of=1)
        )
        assert sum(mlp.level_widths(width)) == width

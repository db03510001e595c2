"""The model against its definition: scans, masks, caches, grouped heads, initialisation."""

import dataclasses
import functools
import os
import random
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlm_jax import ops
from tlm_jax.config import AttentionConfig, ModelConfig, TaperConfig
from tlm_jax.models import LanguageModel, skeleton
from tlm_jax.models.decoder import RMSNorm

VOCAB, LENGTH = 96, 24


def small(**changes) -> ModelConfig:
    defaults = {
        "vocab_size": VOCAB,
        "num_layers": 4,
        "d_model": 32,
        "mlp_width": 64,
        "mixer": AttentionConfig(num_heads=4, num_kv_heads=2),
        "remat": "none",
        "compute_dtype": "float32",
    }
    return ModelConfig(**(defaults | changes))


def tokens(rows: int = 2, length: int = LENGTH, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, VOCAB)


def parameters(config: ModelConfig, seed: int = 0):
    """Fresh parameters, with norm scales away from one so that they matter."""
    rng = np.random.default_rng(seed + 1)

    def noisy(leaf: jax.Array) -> jax.Array:
        noise = rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(np.float32(leaf) + np.float32(0.05) * noise)

    return jax.tree.map(noisy, skeleton(config).init(jax.random.key(seed)))


@functools.cache
def _forward(config: ModelConfig):
    def forward(params, ids, inputs):
        model = skeleton(config).merge(params)
        return model.logits(model(ids, **inputs)[0])

    return jax.jit(forward)


def logits(config: ModelConfig, params, ids: jax.Array, **inputs) -> np.ndarray:
    return np.asarray(_forward(config)(params, ids, inputs))


def random_taper(seed: int) -> ModelConfig:
    """A model of random depth whose explicit widths mix segments of length 1 and more."""
    rng = random.Random(seed)
    num_layers = rng.choice([3, 4, 6])
    widths = sorted((rng.choice([16, 32, 48, 64]) for _ in range(num_layers)), reverse=True)
    base, rest = divmod(sum(widths), num_layers)
    widths[0] += (num_layers - rest) % num_layers
    base = sum(widths) // num_layers
    return small(
        num_layers=num_layers,
        mlp_width=base,
        taper=TaperConfig(schedule="explicit", widths=tuple(widths), multiple_of=1),
        mixer=AttentionConfig(
            num_heads=4, num_kv_heads=rng.choice([1, 2, 4]), qk_norm=seed % 2 == 0
        ),
        tie_embeddings=bool(seed % 3),
    )


@pytest.mark.parametrize(
    ("seed", "remat"), [(0, "full"), (1, "attention"), (2, "dots"), (3, "offload")]
)
def test_scanned_equals_unrolled(seed: int, remat: str):
    """Logits and gradients of scans with rematerialisation are those of a plain loop."""
    scanned = dataclasses.replace(random_taper(seed), remat=remat)
    unrolled = dataclasses.replace(scanned, scan_layers=False, remat="none")
    params, ids = parameters(scanned, seed), tokens(seed=seed)

    def loss(config):
        def value(params):
            model = skeleton(config).merge(params)
            out = model.logits(model(ids)[0])
            return jnp.mean(jnp.square(jax.nn.log_softmax(out))), out

        return jax.jit(jax.value_and_grad(value, has_aux=True))(params)

    (_, a), grads_a = loss(scanned)
    (_, b), grads_b = loss(unrolled)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads_a):
        other = grads_b
        for key in path:
            other = other[key.key]
        scale = float(np.abs(other).max())
        assert scale > 0, f"{path} gets no gradient"
        np.testing.assert_allclose(grad, other, rtol=1e-4, atol=1e-5 * scale, err_msg=str(path))


def test_segments_run_in_order_of_depth():
    """Unrolling by hand, layer by layer from the stacks, gives the same logits."""
    config = random_taper(1)
    params, ids = parameters(config), tokens()

    @jax.jit
    def by_hand(params):
        model = skeleton(config).merge(params)
        positions = jnp.broadcast_to(jnp.arange(LENGTH), ids.shape)
        x = model.embedding[...][ids]
        for index in range(config.num_layers):
            x = model.segments.layer(index)(x, positions, jnp.ones_like(ids))
        return model.logits(model.final_norm(x))

    expected = by_hand(params)
    np.testing.assert_allclose(logits(config, params, ids), expected, rtol=1e-5, atol=1e-5)


def test_future_tokens_change_nothing_before_them():
    config = small()
    params, ids = parameters(config), tokens()
    changed = ids.at[:, 15].add(1) % VOCAB
    before, after = logits(config, params, ids), logits(config, params, changed)
    np.testing.assert_array_equal(before[:, :15], after[:, :15])
    assert (before[:, 15:] != after[:, 15:]).any(axis=(0, 2)).all()


def test_rows_do_not_see_each_other():
    config = small()
    params, ids = parameters(config), tokens(rows=3)
    changed = ids.at[1].set(tokens(rows=1, seed=7)[0])
    before, after = logits(config, params, ids), logits(config, params, changed)
    np.testing.assert_array_equal(before[[0, 2]], after[[0, 2]])
    assert (before[1] != after[1]).any()


def test_documents_in_a_row_do_not_see_each_other():
    """Two documents packed into a row score as each does alone."""
    config = small()
    params = parameters(config)
    first, second = tokens(rows=1, length=10, seed=1), tokens(rows=1, length=14, seed=2)
    packed = logits(
        config,
        params,
        jnp.concatenate([first, second], axis=1),
        document_ids_BL=jnp.array([[1] * 10 + [2] * 14]),
        positions_BL=jnp.array([[*range(10), *range(14)]]),
    )
    np.testing.assert_allclose(packed[:, :10], logits(config, params, first), atol=1e-5)
    np.testing.assert_allclose(packed[:, 10:], logits(config, params, second), atol=1e-5)
    joined = logits(config, params, jnp.concatenate([first, second], axis=1))
    assert np.abs(joined[:, 10:] - packed[:, 10:]).max() > 1e-2


def test_grouped_attention_equals_a_loop_over_heads():
    B, L, H, N, K = 2, 9, 6, 2, 8
    q, k, v = (
        np.asarray(jax.random.normal(jax.random.key(i), (B, L, heads, K)))
        for i, heads in enumerate((H, N, N))
    )
    mask = np.tril(np.ones((L, L), bool))[None].repeat(B, 0)
    got = ops.attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(mask))
    for b in range(B):
        for h in range(H):
            n = h // (H // N)
            for i in range(L):
                scores = q[b, i, h] @ k[b, : i + 1, n].T / np.sqrt(K)
                weights = np.exp(scores - scores.max())
                expected = weights / weights.sum() @ v[b, : i + 1, n]
                np.testing.assert_allclose(got[b, i, h], expected, rtol=2e-5, atol=1e-5)


def test_rotary_scores_depend_on_distance_only():
    x = jax.random.normal(jax.random.key(0), (1, 2, 3, 16))

    def score(i: int, j: int) -> np.ndarray:
        q, k = jnp.split(ops.rotary(x, jnp.array([[i, j]]), 10_000.0), 2, axis=1)
        return np.asarray(jnp.sum(q * k, axis=-1))

    np.testing.assert_allclose(score(5, 3), score(105, 103), rtol=1e-3, atol=1e-4)
    assert np.abs(score(5, 3) - score(5, 4)).max() > 1e-2
    norms = jnp.linalg.norm(ops.rotary(x, jnp.array([[7, 9]]), 100.0), axis=-1)
    np.testing.assert_allclose(norms, jnp.linalg.norm(x, axis=-1), rtol=1e-5)


def test_rms_norm_is_computed_in_float32():
    norm = RMSNorm(64, 1e-6)
    x = 300.0 * jax.random.normal(jax.random.key(0), (5, 64))
    expected = x / np.sqrt(np.mean(np.square(np.asarray(x, np.float64)), -1, keepdims=True))
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5)
    low = norm(x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), expected, rtol=2e-2, atol=1e-2)


def test_every_layer_is_initialised_by_one_rule():
    """std is 1/sqrt(fan-in) of a single layer, whatever its width and its place in a stack."""
    config = small(
        num_layers=6,
        d_model=128,
        mlp_width=256,
        taper=TaperConfig(schedule="explicit", widths=(384, 256, 256, 256, 256, 128)),
    )
    params = jax.tree.map(np.asarray, skeleton(config).init(jax.random.key(0)))
    out_scale = 1 / np.sqrt(2 * config.num_layers)
    assert [s.length for s in config.segments] == [1, 4, 1]
    for name, width in (("000", 384), ("001", 256), ("002", 128)):
        block = params["segments"][name]
        for layer in range(block["mlp"]["0"]["gate"].shape[0]):
            assert np.std(block["mlp"]["0"]["gate"][layer]) == pytest.approx(128**-0.5, rel=0.05)
            assert np.std(block["mixer"]["query"][layer]) == pytest.approx(128**-0.5, rel=0.05)
            expected = out_scale * width**-0.5
            assert np.std(block["mlp"]["0"]["down"][layer]) == pytest.approx(expected, rel=0.05)
            expected = out_scale * 128**-0.5
            assert np.std(block["mixer"]["out"][layer]) == pytest.approx(expected, rel=0.05)
    constant = skeleton(dataclasses.replace(config, init_std=0.02)).init(jax.random.key(0))
    for name in ("000", "001", "002"):
        assert np.std(constant["segments"][name]["mlp"]["0"]["up"]) == pytest.approx(0.02, rel=0.05)


def test_tapered_and_uniform_twins_start_from_the_same_attention():
    config = small(taper=TaperConfig(start=1.5, end=0.5))
    tapered = skeleton(config).init(jax.random.key(3))
    uniform = skeleton(config.uniform_twin()).init(jax.random.key(3))

    def queries(params):
        return np.concatenate([s["mixer"]["query"] for s in params["segments"].values()])

    assert len(tapered["segments"]) > 1
    np.testing.assert_array_equal(queries(tapered), queries(uniform))
    np.testing.assert_array_equal(tapered["embedding"], uniform["embedding"])


def _backward_bytes(config: ModelConfig) -> int:
    """Temporary memory that XLA needs for the gradient of a long batch."""
    model = skeleton(config)

    def loss(params, ids):
        built = model.merge(params)
        return jnp.mean(jnp.square(built(ids)[0]))

    ids = jax.ShapeDtypeStruct((8, 256), jnp.int32)
    return (
        jax.jit(jax.grad(loss))
        .lower(model.shapes, ids)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )


def _wide(widths: tuple[int, ...]) -> ModelConfig:
    return small(
        num_layers=len(widths),
        d_model=64,
        mlp_width=sum(widths) // len(widths),
        taper=TaperConfig(schedule="explicit", widths=widths),
        mixer=AttentionConfig(num_heads=2),
    )


def test_remat_lowers_memory_in_scanned_segments():
    config = _wide((1024,) * 3 + (512,) * 3)
    used = {
        r: _backward_bytes(dataclasses.replace(config, remat=r)) for r in ("none", "dots", "full")
    }
    assert used["full"] < 0.5 * used["none"]
    assert used["full"] < used["dots"] < used["none"]


def test_remat_lowers_memory_in_segments_of_length_one():
    config = _wide((1152, 1024, 896, 640, 512, 384))
    saved = _saved_by_autodiff(config)
    assert saved["full"] < 0.2 * saved["none"]
    if jax.__version_info__ >= (0, 11):
        # The CPU backend of older versions drops the barriers that keep straight-line
        # recomputation apart from the forward pass; their TPU backend keeps them.
        used = [_backward_bytes(dataclasses.replace(config, remat=r)) for r in ("none", "full")]
        assert used[1] < 0.6 * used[0]


def _saved_by_autodiff(config: ModelConfig) -> dict[str, int]:
    """Bytes of activations that the forward pass hands to the backward pass."""
    result = {}
    for remat in ("none", "full"):
        model = skeleton(dataclasses.replace(config, remat=remat))

        def residuals(params, ids, model=model):
            _, backward = jax.vjp(lambda p: jnp.mean(jnp.square(model.merge(p)(ids)[0])), params)
            return jax.tree.leaves(backward)

        ids = jax.ShapeDtypeStruct((8, 256), jnp.int32)
        saved = jax.eval_shape(residuals, model.shapes, ids)
        result[remat] = sum(leaf.size * leaf.dtype.itemsize for leaf in saved)
        result[remat] -= 4 * model.num_params  # the parameters are there anyhow
    return result


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    config = small(compute_dtype="bfloat16")
    params, ids = parameters(config), tokens()
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    low = logits(config, params, ids)
    assert low.dtype == jnp.float32
    high = logits(dataclasses.replace(config, compute_dtype="float32"), params, ids)
    assert 1e-4 < np.abs(low - high).max() < 0.15


def test_logical_axes_name_every_dim():
    config = small(tie_embeddings=False, mixer=AttentionConfig(num_heads=4, qk_norm=True))
    model = skeleton(config)
    for (path, shape), axes in zip(
        jax.tree_util.tree_leaves_with_path(model.shapes),
        jax.tree.leaves(model.logical_axes, is_leaf=lambda x: isinstance(x, tuple)),
        strict=True,
    ):
        assert len(axes) == len(shape.shape), path
        assert (axes[0] == "layers") == (path[0].key == "segments"), path


def test_a_model_can_be_built_directly():
    """The constructor is plain NNX: it gives the same numbers as the skeleton's init."""
    config = small()
    model = LanguageModel(config, key=jax.random.key(5))
    params = skeleton(config).init(jax.random.key(5))
    np.testing.assert_allclose(model.embedding[...], params["embedding"], rtol=1e-6)


def test_trees_instead_of_graphs_give_the_same_gradients():
    """NNX's coming default (FLIP 5310), switched on in a process of its own."""
    program = (
        "import jax, jax.numpy as jnp\n"
        "from tlm_jax.config import AttentionConfig, ModelConfig\n"
        "from tlm_jax.models import skeleton\n"
        "config = ModelConfig(vocab_size=32, num_layers=3, d_model=16, mlp_width=32,\n"
        "    mixer=AttentionConfig(num_heads=2))\n"
        "model = skeleton(config)\n"
        "def loss(params):\n"
        "    built = model.merge(params)\n"
        "    return jnp.mean(jnp.square(built.logits(built(jnp.arange(12)[None])[0])))\n"
        "params = jax.jit(model.init)(jax.random.key(0))\n"
        "grads = jax.jit(jax.grad(loss))(params)\n"
        "print(*[float(jnp.sum(jnp.abs(g))) for g in jax.tree.leaves(grads)])\n"
    )
    found = []
    for mode in ("true", "false"):
        flags = {"NNX_GRAPH_MODE": mode, "NNX_GRAPH_UPDATES": mode}
        result = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | flags,
            capture_output=True,
            text=True,
            check=True,
        )
        found.append([float(word) for word in result.stdout.split()])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert min(found[0]) > 0

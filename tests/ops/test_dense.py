"""Products in bfloat16 on a CPU against float32, and that they stay those that are fast there."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlm_jax.config import AttentionConfig, ModelConfig
from tlm_jax.models import skeleton
from tlm_jax.models.loss import training_loss
from tlm_jax.ops import dense
from tlm_jax.ops.cross_entropy import token_losses, total_loss

BF16 = jnp.bfloat16
ROUNDING = 2.0**-8
"""Of one bfloat16 value, relative."""


def error(found: jax.Array, expected: jax.Array) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(product, x, w, dy):
    y, back = jax.vjp(product, x, w)
    return y, *back(dy)


@pytest.mark.parametrize("tokens", [(2, 32), (3, 7), (1, 1)])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, (4, 16)), (33, (17,)), (16, (1,))])
def test_products_and_gradients_are_those_of_float32(tokens, inputs, outputs) -> None:
    x, w = normal(0, *tokens, inputs, dtype=BF16), normal(1, inputs, *outputs)
    dy = normal(2, *tokens, *outputs, dtype=BF16)
    y, dx, dw = with_gradients(dense, x, w, dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (BF16, BF16, jnp.float32)
    as_f32 = (a.astype(BF16).astype(jnp.float32) for a in (x, w, dy))
    plain = functools.partial(jnp.tensordot, axes=1)
    with jax.default_matmul_precision("highest"):
        expected = with_gradients(plain, *as_f32)
    assert error(y, expected[0]) < ROUNDING
    assert error(dx, expected[1]) < ROUNDING
    assert error(dw, expected[2]) < 1e-5, "the weight's gradient is not rounded to bfloat16"


def test_no_product_is_converted_to_float32_or_has_a_transpose_folded_in() -> None:
    """Of the compiled program: both would take three to ten times as long."""
    x, w = normal(0, 256, 64, dtype=BF16), normal(1, 64, 128)
    program = with_gradients.lower(dense, x, w, normal(2, 256, 128, dtype=BF16)).compile()
    products = [line for line in program.as_text().splitlines() if " dot(" in line]
    assert len(products) == 3
    types = dict(re.findall(r"%([\w.-]+) = (\w+)\[", program.as_text()))
    for line in products:
        factors = re.findall(r"%([\w.-]+)", line.split(" dot(")[1].split(")")[0])
        assert " = f32[" in line
        assert {types[name] for name in factors} == {"bf16"}, line
        assert "lhs_contracting_dims={1}, rhs_contracting_dims={0}" in line


@pytest.mark.parametrize("chunk", [0, 16, 32])
def test_the_loss_of_a_tied_head(chunk: int) -> None:
    """As one chunk too: in a loop of one round XLA would fold the gradient's transpose into its
    product so late that there is no kernel for it."""
    hidden, table = normal(0, 2, 32, 16), normal(1, 256, 16)
    targets = jax.random.randint(jax.random.key(2), (2, 32), 0, 256)

    def losses(hidden, table):
        weights = jnp.full((2, 32), 1 / 64)
        total, _ = total_loss(hidden, table.T, targets, weights, chunk, 0.0)
        return total, token_losses(hidden, table.T, targets, chunk=chunk)[0].mean()

    run = jax.jit(jax.value_and_grad(losses, argnums=(0, 1), has_aux=True))
    (total, mean), gradients = run(hidden.astype(BF16), table)
    (expected, _), expected_gradients = run(hidden, table)
    np.testing.assert_allclose((total, mean), expected, rtol=ROUNDING)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert error(found, wanted) < 2 * ROUNDING


@pytest.mark.parametrize(("length", "scan"), [(64, False), (64, True), (256, False)])
def test_a_model_s_gradients_are_close_to_float32(length: int, scan: bool) -> None:
    """Rows of one block of queries, and of two."""
    config = {
        "vocab_size": 256,
        "num_layers": 2,
        "d_model": 64,
        "mlp_width": 128,
        "mixer": AttentionConfig(num_heads=4, num_kv_heads=2),
        "scan_layers": scan,
    }
    ids = jax.random.randint(jax.random.key(1), (2, length), 0, 256)
    index = jnp.broadcast_to(jnp.arange(length), ids.shape)
    batch = {"inputs": ids, "targets": ids, "positions": index, "document_ids": 1 + index // 40}

    def run(dtype: str):
        model = skeleton(ModelConfig(**config, compute_dtype=dtype))

        def loss(params):
            return training_loss(model, params, batch, ids.size, chunk=128, z_loss=1e-4)[0]

        value, gradients = jax.jit(jax.value_and_grad(loss))(model.init(jax.random.key(0)))
        return value, jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(gradients)])

    value, gradients = run("bfloat16")
    expected, expected_gradients = run("float32")
    np.testing.assert_allclose(value, expected, rtol=2e-3)
    assert error(gradients, expected_gradients) < 0.03

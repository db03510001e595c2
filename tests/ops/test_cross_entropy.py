"""Cross-entropy in chunks against the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from tlm_jax.config import AttentionConfig, ModelConfig
from tlm_jax.models import skeleton
from tlm_jax.models.loss import batch_losses
from tlm_jax.ops.cross_entropy import token_losses, total_loss

B, L, D, V = 3, 32, 16, 1000


def inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (B, L, D), dtype)
    head = jax.random.normal(keys[1], (D, V))
    return hidden, head, jax.random.randint(keys[2], (B, L), 0, V)


@pytest.mark.parametrize("chunk", [0, 1, 8, 32, 64])
def test_chunks_equal_log_softmax(chunk: int):
    hidden, head, targets = inputs()
    nll, log_z = token_losses(hidden, head, targets, chunk=chunk)
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    expected_z = np.log(np.exp(logits).sum(-1))
    picked = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(log_z, expected_z, rtol=1e-5)
    np.testing.assert_allclose(nll, expected_z - picked, rtol=1e-4, atol=1e-4)


def test_gradients_do_not_depend_on_the_chunk():
    hidden, head, targets = inputs()

    def loss(hidden, head, chunk):
        nll, log_z = token_losses(hidden, head, targets, chunk=chunk)
        return jnp.mean(nll) + 0.1 * jnp.mean(jnp.square(log_z))

    whole = jax.grad(loss, argnums=(0, 1))(hidden, head, 0)
    parts = jax.grad(loss, argnums=(0, 1))(hidden, head, 8)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [0, 8])
def test_the_total_and_its_gradients_are_those_of_the_losses_added_up(chunk: int):
    """The total makes its gradient itself; that of the losses is autodiff's."""
    hidden, head, targets = inputs()
    weights = jax.random.uniform(jax.random.key(3), (B, L))

    def added_up(hidden, head):
        nll, log_z = token_losses(hidden, head, targets, chunk=0)
        return 3.0 * jnp.sum(weights * (nll + 0.1 * jnp.square(log_z))), jnp.sum(weights * nll)

    def total(hidden, head):
        total, nll = total_loss(hidden, head, targets, weights, chunk, 0.1)
        return 3.0 * total, nll

    def run(loss):
        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, head)

    for a, b in zip(jax.tree.leaves(run(total)), jax.tree.leaves(run(added_up)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)
    for a, b in zip(total(hidden, head), added_up(hidden, head), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("total", [False, True], ids=["losses", "total"])
def test_full_float32_logits_never_exist(total: bool):
    """No value of B*L*V float32 elements appears in forward or backward."""
    hidden, head, targets = inputs(jnp.bfloat16)

    def loss(hidden, head):
        if total:
            return total_loss(hidden, head, targets, jnp.ones((B, L)), 8, 0.0)[0]
        return jnp.sum(token_losses(hidden, head, targets, chunk=8)[0])

    def largest(jaxpr) -> int:
        sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
        inner = (largest(sub) for eqn in jaxpr.eqns for sub in jaxprs_in_params(eqn.params))
        return max([*sizes, *inner], default=0)

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, head).jaxpr
    assert largest(jaxpr) <= max(B * 8 * V, D * V)
    assert largest(jaxpr) < B * L * V


def test_padding_is_not_scored():
    config = ModelConfig(
        vocab_size=50, num_layers=2, d_model=16, mlp_width=32, mixer=AttentionConfig(num_heads=2)
    )
    model = skeleton(config)
    params = model.init(jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (2, 8), 0, 50)
    batch = {
        "inputs": ids,
        "targets": ids,
        "document_ids": jnp.array([[1] * 8, [1, 1, 1, 0, 0, 0, 0, 0]]),
        "positions": jnp.broadcast_to(jnp.arange(8), (2, 8)),
    }
    nll, log_z, scored = batch_losses(model, params, batch, chunk=4)
    assert scored.sum() == 11
    assert (nll[1, 3:] == 0).all()
    assert (log_z[1, 3:] == 0).all()
    assert (nll[1, :3] > 0).all()

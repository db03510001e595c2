"""The chunked memory against a sequential oracle that differentiates its inner loss by autodiff."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlm_jax.config import MeshConfig
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.distributed.collectives import collectives
from tlm_jax.distributed.sharding import batch_sharding
from tlm_jax.models.neural_memory import Gates, neural_memory

B, L, H, K, F = 2, 13, 2, 4, 6


def oracle_forward(weights, x):
    """M(x) of one head for one vector, written apart from the package."""
    hidden = x
    for index, w in enumerate(weights):
        hidden = hidden @ w
        if index < len(weights) - 1:
            hidden = 0.5 * hidden * (1 + jax.scipy.special.erf(hidden / np.sqrt(2.0)))
    return hidden if len(weights) == 1 else x + hidden


def oracle_head(
    initial, q, k, v, keep, momentum, rate, ids, *, chunk, reads="now", project=False, shard=None
):
    """One token after the other; q, k, v (L, K), gates (L,), ids (L,)."""

    def inner_loss(weights, key, value):
        return jnp.sum((oracle_forward(weights, key) - value) ** 2)

    def choose(condition, a, b):
        return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)

    zeros = jax.tree.map(jnp.zeros_like, initial)

    def one_token(carry, token):
        now, step, at_chunk, keys, document = carry
        t, q, k, v, keep, momentum, rate, id_ = token
        at_chunk = choose(t % chunk == 0, now, at_chunk)
        real = id_ > 0
        new = real & (document > 0) & (id_ != document)
        now, at_chunk = choose(new, (initial, initial), (now, at_chunk))
        step, keys = choose(new, (zeros, 0 * keys), (step, keys))
        if shard is not None:
            begins = t % shard == 0
            now, at_chunk = choose(begins, (initial, initial), (now, at_chunk))
            step, keys = choose(begins, (zeros, 0 * keys), (step, keys))
        gradient = jax.grad(inner_loss)(at_chunk, k, v)
        next_step = jax.tree.map(lambda s, g: momentum * s - rate * g, step, gradient)
        next_now = jax.tree.map(lambda w, s: keep * w + s, now, next_step)
        next_keys = keys + jnp.outer(k, k)
        now, step, keys = choose(real, (next_now, next_step, next_keys), (now, step, keys))
        if project:
            q = keys @ q
            q = q / jnp.sqrt(1 + q @ q)
        read = oracle_forward(now if reads == "now" else at_chunk, q)
        return (now, step, at_chunk, keys, jnp.where(real, id_, document)), read

    tokens = (jnp.arange(q.shape[0]), q, k, v, keep, momentum, rate, ids)
    keys = jnp.zeros((k.shape[-1], k.shape[-1]), k.dtype)
    return jax.lax.scan(one_token, (initial, zeros, initial, keys, jnp.int32(0)), tokens)[1]


def oracle(inputs, *, ids=None, **options):
    """Every head of every row for itself."""
    ones = jnp.ones_like(inputs["rate"])
    keep = jnp.exp(inputs["keep"]) if "keep" in inputs else ones
    momentum = jnp.exp(inputs["momentum"]) if "momentum" in inputs else 0 * ones
    ids = jnp.ones(ones.shape[:2], jnp.int32) if ids is None else ids
    heads = jax.vmap(
        functools.partial(oracle_head, **options), (0, 1, 1, 1, 1, 1, 1, None), out_axes=1
    )
    rows = jax.vmap(heads, (None, 0, 0, 0, 0, 0, 0, 0))
    q, k, v = (inputs[name] for name in "qkv")
    return rows(inputs["initial"], q, k, v, keep, momentum, inputs["rate"], ids)


def memory(inputs, *, chunk, ids=None, **options):
    gates = Gates(
        log_keep_BLH=inputs.get("keep"),
        log_momentum_BLH=inputs.get("momentum"),
        rate_BLH=inputs["rate"],
    )
    q, k, v = (inputs[name] for name in "qkv")
    return neural_memory(
        tuple(inputs["initial"]), q, k, v, gates, chunk=chunk, document_ids_BL=ids, **options
    )


def make_inputs(depth, **options):
    """A dict of its own, whose arrays are drawn once."""
    return dict(_inputs(depth, **options))


@functools.cache
def _inputs(depth, *, forget=True, momentum=True, length=L, batch=B, seed=0, dtype="float32"):
    keys = iter(jax.random.split(jax.random.key(seed), 20))

    def normal(*shape):
        return jax.random.normal(next(keys), shape, "float32").astype(dtype)

    widths = [K] + [F] * (depth - 1) + [K]
    inputs = {name: normal(batch, length, H, K) for name in "qkv"}
    inputs["initial"] = [0.5 * normal(H, i, o) for i, o in itertools.pairwise(widths)]
    gates = {name: normal(batch, length, H) for name in ("keep", "momentum", "rate")}
    inputs["rate"] = 0.05 * jax.nn.sigmoid(gates["rate"])
    if forget:
        inputs["keep"] = jax.nn.log_sigmoid(gates["keep"] + 1)
    if momentum:
        inputs["momentum"] = jax.nn.log_sigmoid(gates["momentum"])
    return inputs


def values_and_gradients(function, inputs, ids=None):
    """Reads, and gradients of a random projection of them with respect to every input."""
    shape = inputs["q"].shape
    projection = jax.random.normal(jax.random.key(99), shape, "float32").astype(inputs["q"].dtype)
    if ids is not None:
        projection = jnp.where(ids[..., None, None] > 0, projection, 0)

    @jax.jit
    def run(inputs):
        def loss(inputs):
            y = function(inputs)
            return jnp.sum(y * projection), y

        gradients, y = jax.grad(loss, has_aux=True)(inputs)
        return y if ids is None else jnp.where(ids[..., None, None] > 0, y, 0), gradients

    return run(inputs)


def assert_equal(actual, expected, relative):
    """Largest difference of each array relative to its largest entry."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = np.abs(b).max()
        assert np.isfinite(a).all()
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= relative * scale


CASES = [
    # depth, chunk, forget, momentum
    (1, 4, True, True),
    (1, 1, False, False),
    (2, 4, True, True),
    (2, 1, True, True),
    (2, 5, True, False),
    (2, 16, False, True),
    (3, 5, True, True),
    (4, 4, True, True),
    (4, 13, False, False),
]


@pytest.mark.parametrize(("depth", "chunk", "forget", "momentum"), CASES)
@pytest.mark.parametrize(("dtype", "relative"), [("float32", 1e-5), ("float64", 1e-10)])
def test_chunked_equals_sequential(depth, chunk, forget, momentum, dtype, relative):
    """Values and outer gradients, with a shorter last chunk (13 tokens)."""
    with jax.enable_x64(dtype == "float64"):
        inputs = make_inputs(depth, forget=forget, momentum=momentum, dtype=dtype)
        expected = values_and_gradients(functools.partial(oracle, chunk=chunk), inputs)
        actual = values_and_gradients(lambda i: memory(i, chunk=chunk)[0], inputs)
        assert actual[0].dtype == dtype
        assert_equal(actual, expected, relative)


IDS = np.array([[1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 0, 0], [0, 4, 4, 4, 0, 4, 4, 4, 5, 5, 0, 6, 6]])


@pytest.mark.parametrize(
    ("depth", "chunk", "forget", "momentum"),
    [(1, 4, True, True), (2, 4, True, True), (2, 8, True, False), (3, 5, False, True)],
)
def test_documents_start_anew(depth, chunk, forget, momentum):
    """Documents that begin at chunk borders, inside chunks, several to a chunk; padding."""
    with jax.enable_x64(True):
        inputs = make_inputs(depth, forget=forget, momentum=momentum, dtype="float64")
        ids = jnp.asarray(IDS, "int32")
        expected = values_and_gradients(
            functools.partial(oracle, chunk=chunk, ids=ids), inputs, ids
        )
        actual = values_and_gradients(lambda i: memory(i, chunk=chunk, ids=ids)[0], inputs, ids)
        assert_equal(actual, expected, 1e-10)


def test_devices_do_not_talk_for_each_chunk():
    """Forward and backward over rows on two devices: as many collectives for 8 chunks as for 2."""
    mesh = mesh_lib.device_mesh(MeshConfig(data=2))

    def count(length):
        shape = (B, length, H)
        rows = batch_sharding(mesh)
        x = jax.ShapeDtypeStruct((*shape, K), jnp.float32, sharding=rows)
        gate = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows)
        ids = jax.ShapeDtypeStruct(shape[:2], jnp.int32, sharding=rows)
        sizes = ((H, K, F), (H, F, K))
        whole = jax.NamedSharding(mesh, jax.P())
        initial = tuple(jax.ShapeDtypeStruct(s, jnp.float32, sharding=whole) for s in sizes)

        def loss(initial, x, gate, ids):
            gates = Gates(log_keep_BLH=gate, log_momentum_BLH=gate, rate_BLH=gate)
            y, _ = neural_memory(initial, x, x, x, gates, chunk=4, document_ids_BL=ids)
            return jnp.sum(y)

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(initial, x, gate, ids).compile()
        return sum(kind.count for kind in collectives(compiled.as_text()))

    assert count(32) == count(8) > 0

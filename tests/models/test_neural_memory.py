"""The chunked memory against a sequential oracle that differentiates its inner loss by autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlm_jax.models.neural_memory import Gates, MemoryState, neural_memory

B, L, H, K, F = 2, 13, 2, 4, 6


def oracle_forward(weights, x):
    """M(x) of one head for one vector, written apart from the package."""
    hidden = x
    for index, w in enumerate(weights):
        hidden = hidden @ w
        if index < len(weights) - 1:
            hidden = 0.5 * hidden * (1 + jax.scipy.special.erf(hidden / np.sqrt(2.0)))
    return hidden if len(weights) == 1 else x + hidden


def oracle_head(initial, q, k, v, keep, momentum, rate, chunk, ids):
    """One token after the other; q, k, v (L, K), gates (L,), ids a list of ints."""

    def inner_loss(weights, key, value):
        return jnp.sum((oracle_forward(weights, key) - value) ** 2)

    now, step = initial, jax.tree.map(jnp.zeros_like, initial)
    at_chunk, document, reads = now, 0, []
    for t in range(q.shape[0]):
        if t % chunk == 0:
            at_chunk = now
        if ids[t] == 0:
            reads.append(jnp.zeros_like(q[t]))
            continue
        if document not in (0, ids[t]):
            now = at_chunk = initial
            step = jax.tree.map(jnp.zeros_like, initial)
        document = ids[t]
        gradient = jax.grad(inner_loss)(at_chunk, k[t], v[t])
        step = jax.tree.map(lambda s, g, t=t: momentum[t] * s - rate[t] * g, step, gradient)
        now = jax.tree.map(lambda w, s, t=t: keep[t] * w + s, now, step)
        reads.append(oracle_forward(now, q[t]))
    return jnp.stack(reads)


def oracle(inputs, *, chunk, ids=None):
    rows = []
    for row in range(inputs["q"].shape[0]):
        heads = []
        for head in range(inputs["q"].shape[2]):
            gate = {
                name: jnp.exp(inputs[name][row, :, head])
                if name in inputs
                else jnp.full(inputs["q"].shape[1], float(name == "keep"))
                for name in ("keep", "momentum")
            }
            heads.append(
                oracle_head(
                    [w[head] for w in inputs["initial"]],
                    *(inputs[name][row, :, head] for name in "qkv"),
                    gate["keep"],
                    gate["momentum"],
                    inputs["rate"][row, :, head],
                    chunk,
                    [1] * inputs["q"].shape[1] if ids is None else ids[row].tolist(),
                )
            )
        rows.append(jnp.stack(heads, axis=1))
    return jnp.stack(rows)


def memory(inputs, *, chunk, ids=None, **options):
    gates = Gates(
        log_keep_BLH=inputs.get("keep"),
        log_momentum_BLH=inputs.get("momentum"),
        rate_BLH=inputs["rate"],
    )
    q, k, v = (inputs[name] for name in "qkv")
    return neural_memory(
        tuple(inputs["initial"]), q, k, v, gates, chunk=chunk, segment_ids_BL=ids, **options
    )


def make_inputs(depth, *, forget=True, momentum=True, length=L, batch=B, seed=0, dtype="float32"):
    keys = iter(jax.random.split(jax.random.key(seed), 20))

    def normal(*shape):
        return jax.random.normal(next(keys), shape, "float32").astype(dtype)

    widths = [K] + [F] * (depth - 1) + [K]
    inputs = {name: normal(batch, length, H, K) for name in "qkv"}
    inputs["initial"] = [
        0.5 * normal(H, i, o) for i, o in zip(widths[:-1], widths[1:], strict=True)
    ]
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
            functools.partial(oracle, chunk=chunk, ids=IDS), inputs, ids
        )
        actual = values_and_gradients(lambda i: memory(i, chunk=chunk, ids=ids)[0], inputs, ids)
        assert_equal(actual, expected, 1e-10)

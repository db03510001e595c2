"""Titans' layers: the order of operations, windows, convolutions, and stability."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tlm_jax.mixers import TitansConfig
from tlm_jax.models.neural_memory import neural_memory, recall
from tlm_jax.models.registry import LayerContext, make_mixer
from tlm_jax.models.titans_memory import short_conv
from tlm_jax.models.window_attention import WindowAttention

D, L = 32, 40
CONFIG = TitansConfig(num_heads=2, memory_width=16, chunk=8, window=16, num_persistent=3)
IDS = jnp.array([[1] * 21 + [2] * 15 + [0] * 4, [3] * 40])
POSITIONS = jnp.array([[*range(21), *range(15), 0, 0, 0, 0], [*range(40)]])
IDS_NP = np.asarray(IDS)
REAL = IDS_NP > 0


def context(width: int) -> LayerContext:
    return LayerContext(d_model=width, norm_eps=1e-6, std=None, out_scale=1.0)


def layer(config: TitansConfig, width: int = D):
    return make_mixer(config, context(width), rngs=nnx.Rngs(params=0))


def inputs(rows: int = 2, width: int = D) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (rows, L, width))


def softmax_attention(q, k, v, seen):
    """One query (H, K) over the keys (S, H, K) that `seen` lists."""
    scores = np.einsum("hk,shk->hs", q, k)[:, seen] / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hs,shk->hk", weights, v[seen])


@pytest.mark.parametrize("persistent", [0, 3])
@pytest.mark.parametrize("window", [1, 7, 16, 64])
def test_window_attention_equals_a_loop_over_tokens(window: int, persistent: int):
    """The last `window` tokens of the document, in blocks or not, and the persistent ones."""
    config = dataclasses.replace(CONFIG, window=window, num_persistent=persistent)
    attention = WindowAttention(config, context(D), D, rngs=nnx.Rngs(params=0))
    x = inputs()
    out, _ = jax.jit(lambda: attention(x, POSITIONS, IDS, None))()
    q, k, v = (np.asarray(a) for a in attention.project(x, POSITIONS))
    first = [np.asarray(a) for a in attention.persistent_kv()]
    for row, t in np.ndindex(2, L):
        if not REAL[row, t]:
            continue
        seen = [s for s in range(max(t - window + 1, 0), t + 1) if IDS_NP[row, s] == IDS_NP[row, t]]
        seen = [*range(persistent), *(s + persistent for s in seen)]
        keys, values = (np.concatenate(pair) for pair in zip(first, (k[row], v[row]), strict=True))
        expected = softmax_attention(q[row, t], keys, values, seen)
        np.testing.assert_allclose(out[row, t], expected, rtol=1e-4, atol=1e-5)


def test_short_convolution_equals_a_loop_and_stays_within_documents():
    x = np.asarray(jax.random.normal(jax.random.key(2), (2, L, 3, 2, 4)))
    filters = np.asarray(jax.random.normal(jax.random.key(3), (4, 3, 2, 4)))
    out, tail = short_conv(jnp.asarray(x), jnp.asarray(filters), IDS, None)
    for row, t in np.ndindex(2, L):
        back = [b for b in range(4) if t >= b and IDS_NP[row, t - b] == IDS_NP[row, t]]
        expected = sum(filters[b] * x[row, t - b] for b in back)
        np.testing.assert_allclose(out[row, t], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(tail.qkv_BW3HK, x[:, -3:])


def test_memory_as_context_retrieves_attends_writes_and_reads_again():
    """The paper's order in each window: h = M(q) before it, attention, M learns y, M_t(y_t)."""
    mac = layer(dataclasses.replace(CONFIG, variant="mac"))
    x = inputs()
    out, _ = jax.jit(lambda: mac(x, POSITIONS, IDS))()

    memory, C, P = mac.memory, CONFIG.window, CONFIG.num_persistent

    @jax.jit
    def before():
        (ask,), _ = memory.project(x, IDS, None, first=1)
        return ask, mac.attention.project(x, POSITIONS), mac.attention.persistent_kv()

    @jax.jit
    def retrieve(state, ask, ids, positions):
        h = mac.retrieved_norm(recall(memory.start, state, ask, ids))
        h = jnp.einsum("blhk,hkd->bld", h, mac.retrieved_out[...])
        return mac.attention.project(h, positions, queries=False)

    @jax.jit
    def write_and_read(a, state, part):
        # The layer learns from y, with convolutions over all y so far.
        y = jnp.einsum("blhk,hkd->bld", a, mac.attention_out[...])
        inputs = (*memory.project(y, IDS, None)[0], memory.gate(y), x, IDS, a)
        *qkv, gates, x_part, ids, a = jax.tree.map(lambda b: b[:, part], inputs)
        m, state = neural_memory(
            memory.start,
            *qkv,
            gates,
            chunk=CONFIG.chunk,
            document_ids_BL=ids,
            state=state,
            clip=CONFIG.gradient_clip,
        )
        gated = mac.attention_norm(a) * jax.nn.sigmoid(mac.memory_norm(m))
        return mac.output(gated, x_part), state

    ask, qkv, persistent = before()
    q, k, v, first_k, first_v = (np.asarray(a) for a in (*qkv, *persistent))
    state, a = memory.init_state(2), np.zeros_like(q)
    for start in range(0, L, C):
        part = np.arange(start, min(start + C, L))
        n = len(part)
        kv = retrieve(state, ask[:, part], IDS[:, part], POSITIONS[:, part])
        kh, vh = (np.asarray(b) for b in kv)
        for row, t in np.ndindex(2, n):  # attend
            seen = [s for s in range(t + 1) if IDS_NP[row, start + s] == IDS_NP[row, start + t]]
            seen = [*range(P), *(P + s for s in seen), *(P + n + s for s in seen)]
            keys = np.concatenate([first_k, kh[row], k[row, part]])
            values = np.concatenate([first_v, vh[row], v[row, part]])
            a[row, start + t] = softmax_attention(q[row, start + t], keys, values, seen)
        expected, state = write_and_read(a, state, part)
        real = REAL[:, part]
        np.testing.assert_allclose(out[:, part][real], expected[real], rtol=1e-4, atol=1e-5)


def test_the_gate_and_the_layer_before_attention():
    """mag: attention * sigmoid(memory), both normed; mal: attention over the memory's output."""
    x = inputs()
    for variant in ("mag", "mal"):
        model = layer(dataclasses.replace(CONFIG, variant=variant))

        @jax.jit
        def both(model=model, variant=variant):
            qkv, _ = model.memory.project(x, IDS, None)
            m, _ = model.memory.learn(*qkv, model.memory.gate(x), IDS, None)
            m = model.memory_norm(m)
            read = x if variant == "mag" else m.reshape(2, L, -1)
            a = model.attention_norm(model.attention(read, POSITIONS, IDS, None)[0])
            y = a * jax.nn.sigmoid(m) if variant == "mag" else a
            gate = jax.nn.sigmoid(jnp.einsum("bld,dhk->blhk", x, model.output.gate[...]))
            expected = jnp.einsum("blhk,hkd->bld", y * gate, model.output.out[...])
            return model(x, POSITIONS, IDS)[0], expected

        out, expected = both()
        np.testing.assert_allclose(out[REAL], expected[REAL], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal"])
def test_every_parameter_gets_a_gradient(variant: str):
    graph, state = nnx.split(layer(dataclasses.replace(CONFIG, variant=variant)))

    def loss(state):
        return jnp.sum(jnp.square(nnx.merge(graph, state)(inputs(), POSITIONS, IDS)[0][REAL]))

    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(state)):
        assert float(np.abs(gradient).max()) > 1e-6, path


def test_deep_memory_is_stable_at_length_4096_at_its_worst():
    """Depth 4, equal or nearly equal tokens, hardly any forgetting, full rate, weights doubled.

    Without the bound on a token's gradient the same run is not finite, which the last line shows.
    """
    length = 4096
    equal = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (1, 1, 16)), (1, length, 16))
    noise = jax.random.normal(jax.random.key(2), (1, length, 16))
    positions, ids = jnp.arange(length)[None], jnp.ones((1, length), jnp.int32)

    def value_and_gradient_norm(clip):
        config = TitansConfig(
            variant="lmm", num_heads=1, memory_depth=4, gradient_clip=clip, memory_width=64
        )
        model = layer(config, width=16)
        model.memory.bias[...] = jnp.array([[4.0], [-10.0], [4.0]])  # rate, alpha, eta
        for w in (*model.memory.initial.values(), model.memory.qkv):
            w[...] = 2 * w[...]
        graph, state = nnx.split(model)

        @jax.jit
        def run(x):
            def loss(state):
                return jnp.mean(jnp.square(nnx.merge(graph, state)(x, positions, ids)[0]))

            value, gradient = jax.value_and_grad(loss)(state)
            squares = (jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradient))
            return value, jnp.sqrt(sum(squares))

        return [run(x) for x in (noise, equal, equal + 0.3 * noise)]

    for value, norm in value_and_gradient_norm(CONFIG.gradient_clip):
        assert 1e-3 < float(value) < 10
        assert float(norm) < 50
    assert not all(np.isfinite(float(norm)) for _, norm in value_and_gradient_norm(None))

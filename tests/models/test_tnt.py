"""TNT's memories: the sequential oracle, shards, decoding, and what each token may see."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_neural_memory import (
    IDS,
    B,
    K,
    L,
    assert_equal,
    make_inputs,
    memory,
    oracle,
    oracle_forward,
    values_and_gradients,
)

from tlm_jax.mixers import TitansConfig
from tlm_jax.models.memory_gates import Gates
from tlm_jax.models.registry import LayerContext, make_mixer
from tlm_jax.models.titans_memory import Learner

CONFIG = TitansConfig(
    variant="lmm",
    num_heads=2,
    memory_width=6,
    chunk=8,
    local_chunks=(2,),
    shard=4,
    gradient_clip=None,
)
CONTEXT = LayerContext(d_model=2 * K, norm_eps=1e-6, std=None, out_scale=1.0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("depth", "chunk", "forget", "momentum", "reads", "project"),
    [
        (1, 4, True, True, "chunk_start", False),
        (2, 4, True, True, "chunk_start", False),
        (2, 5, False, True, "chunk_start", True),
        (3, 16, True, False, "chunk_start", False),
        (2, 4, True, True, "now", True),
        (1, 5, False, False, "now", True),
    ],
)
def test_reads_at_the_chunk_start_and_projected_queries_equal_the_oracle(
    depth, chunk, forget, momentum, reads, project, packed
):
    """Values and outer gradients in float64; documents that begin anywhere, and padding."""
    options = {"chunk": chunk, "reads": reads, "project": project}
    with jax.enable_x64(True):
        inputs = make_inputs(depth, forget=forget, momentum=momentum, dtype="float64")
        ids = jnp.asarray(IDS, "int32") if packed else None
        expected = values_and_gradients(functools.partial(oracle, ids=ids, **options), inputs, ids)
        actual = values_and_gradients(lambda i: memory(i, ids=ids, **options)[0], inputs, ids)
        assert_equal(actual, expected, 1e-10)


def test_a_single_chunk_reads_what_the_memory_began_with():
    inputs = make_inputs(2)
    y, _ = memory(inputs, chunk=L, reads="chunk_start")
    heads = jax.vmap(oracle_forward)
    expected = jax.vmap(jax.vmap(heads, (None, 0)), (None, 0))(inputs["initial"], inputs["q"])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def learner_of(config: TitansConfig, scale: str = "local") -> Learner:
    local = config.local_chunks[0] if scale == "local" else None
    return Learner(config, CONTEXT, rngs=nnx.Rngs(params=0), local=local)


def learn(learner: Learner, inputs, ids, state=None):
    gates = Gates(
        log_keep_BLH=inputs["keep"],
        log_momentum_BLH=inputs["momentum"],
        rate_BLH=inputs["rate"],
    )
    return learner.learn(*(inputs[name] for name in "qkv"), gates, ids, state)


@pytest.mark.parametrize("shard", [4, 6, 32])
@pytest.mark.parametrize("packed", [False, True])
def test_shards_side_by_side_equal_the_oracle(shard: int, packed: bool):
    """Memories that start over every `shard` tokens; the last shard is shorter, or the only one."""
    learner = learner_of(dataclasses.replace(CONFIG, shard=shard))
    with jax.enable_x64(True):
        inputs = make_inputs(2, dtype="float64")
        inputs["initial"] = [w.astype("float64") for w in learner.start]
        ids = jnp.asarray(IDS if packed else np.ones((B, L)), "int32")
        oracle_inputs = functools.partial(oracle, ids=ids, chunk=2, shard=shard, project=True)
        expected = values_and_gradients(oracle_inputs, inputs, ids)

        graph, params = nnx.split(learner)

        def ours(inputs):
            initial = {str(i): w for i, w in enumerate(inputs["initial"])}
            values = nnx.to_pure_dict(params) | {"initial": initial}
            return learn(nnx.merge(graph, values), inputs, ids)[0]

        assert_equal(values_and_gradients(ours, inputs, ids), expected, 1e-10)


@pytest.mark.parametrize("scale", ["local", "global"])
@pytest.mark.parametrize("pieces", [[1] * L, [3, 1, 7, 2], [L]])
def test_decoding_equals_the_full_pass(pieces: list[int], scale: str):
    """Pieces that end inside chunks and shards, or span several shards."""
    learner, ids = learner_of(CONFIG, scale), np.asarray(IDS, "int32")
    inputs = {name: np.asarray(x) for name, x in make_inputs(2).items() if name != "initial"}
    run = jax.jit(functools.partial(learn, learner))
    state, parts, done = learner.init_state(B), [], 0
    for size in pieces:
        part = slice(done, done + size)
        y, state = run({name: x[:, part] for name, x in inputs.items()}, ids[:, part], state)
        parts.append(np.asarray(y))
        done += size
    expected, _ = run(inputs, ids)
    real = IDS > 0
    np.testing.assert_allclose(
        np.concatenate(parts, axis=1)[real], expected[real], rtol=1e-4, atol=1e-5
    )
    assert int(state.length) == L


def test_a_token_reaches_its_shard_locally_and_later_chunks_globally():
    """In a layer: the rest of its shard of 4, nothing of the next one, all after its chunk of 8."""
    config = dataclasses.replace(CONFIG, conv_width=1)
    x = jax.random.normal(jax.random.key(1), (1, 20, 2 * K))
    positions, ids = jnp.arange(20)[None], jnp.ones((1, 20), jnp.int32)
    layer = make_mixer(config, CONTEXT, rngs=nnx.Rngs(params=0))
    run = jax.jit(lambda x: layer(x, positions, ids)[0][0])
    changed = (run(x) != run(x.at[0, 1].add(1.0))).any(axis=-1)
    assert changed.tolist() == [False, *[True] * 3, *[False] * 4, *[True] * 12]


def test_a_layer_adds_the_reads_of_all_memories():
    """The global one with its own gates and long chunks, and local ones of two chunks."""
    config = dataclasses.replace(CONFIG, local_chunks=(2, 4))
    layer = make_mixer(config, CONTEXT, rngs=nnx.Rngs(params=0))
    x, ids = jax.random.normal(jax.random.key(1), (B, L, 2 * K)), jnp.asarray(IDS, "int32")

    @jax.jit
    def both():
        qkv, _ = layer.memory.project(x, ids, None)
        learners = [layer.memory, *layer.local.values()]
        reads = [one.learn(*qkv, one.gate(x), ids, None)[0] for one in learners]
        expected = layer.output(layer.memory_norm(sum(reads)), x)
        return layer(x, ids, ids)[0], expected, jnp.stack(reads)

    out, expected, reads = both()
    real = IDS > 0
    np.testing.assert_allclose(out[real], expected[real], rtol=1e-5, atol=1e-6)
    assert all(jnp.abs(a - b)[real].max() > 1e-2 for a, b in itertools.pairwise(reads))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local_chunks": (3,)}, "a local chunk of 3 does not divide shard=4; use one of"),
        ({"variant": "mac"}, "local_chunks need variant lmm, mag or mal"),
        ({"local_chunks": (0,)}, r"local_chunks\[0\] is 0; it must be at least 1"),
    ],
)
def test_configs_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)

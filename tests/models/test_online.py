"""Updates inside a sequence against a plain oracle, and what they must never do."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlm_jax.config import (
    AttentionConfig,
    DataConfig,
    MeshConfig,
    MLPConfig,
    ModelConfig,
    RunConfig,
    TaperConfig,
    TrainingConfig,
)
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.distributed import sharding
from tlm_jax.models import online, sampling, skeleton
from tlm_jax.models.loss import batch_losses

# One worker runs them all, for they share compiled programs.
pytestmark = pytest.mark.xdist_group("online")

VOCAB, RATE = 32, 0.05
LENGTH = 22  # not a whole number of pieces
# Little optimised, which halves the time to compile.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
# Two segments of one layer each; level 0 is slow, level 1 is fast.
CONFIG = ModelConfig(
    vocab_size=VOCAB,
    num_layers=2,
    d_model=16,
    mlp_width=24,
    taper=TaperConfig(schedule="explicit", widths=(32, 16)),
    mlp=MLPConfig(
        periods=(1, 1), online_chunks=(8, 4), online_learning_rate=RATE, online_in_training=True
    ),
    mixer=AttentionConfig(num_heads=2),
    remat="none",
    compute_dtype="float32",
)


def with_mlp(**changes) -> ModelConfig:
    return dataclasses.replace(CONFIG, mlp=dataclasses.replace(CONFIG.mlp, **changes))


def make_batch(*documents: list[int], seed: int = 0) -> dict[str, jax.Array]:
    """A row for each list of document lengths, padded at the end."""
    tokens = np.array(
        jax.random.randint(jax.random.key(seed), (len(documents), LENGTH + 1), 0, VOCAB)
    )
    ids, positions = np.zeros((2, len(documents), LENGTH), np.int32)
    for row, lengths in enumerate(documents):
        ends = np.cumsum([0, *lengths])
        for document, (start, end) in enumerate(itertools.pairwise(ends)):
            ids[row, start:end] = document + 1
            positions[row, start:end] = np.arange(end - start)
    return {
        "inputs": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "positions": jnp.asarray(positions),
        "document_ids": jnp.asarray(ids),
    }


ORDINARY = with_mlp(online_chunks=(), online_in_training=False)
# One document; three, of which two meet in a piece and two at its border; a short one and
# padding. Document 2 of the middle row begins and ends inside of pieces.
BATCH = make_batch([LENGTH], [6, 10, 6], [3, 10])


@functools.cache
def parameters(config: ModelConfig = CONFIG):
    """Drawn without a compiled initialiser; norm scales lie around one."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = 0.3 * rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(noise + (path[-1].key == "scale"))

    return jax.tree_util.tree_map_with_path(draw, skeleton(config).shapes)


@functools.cache
def compiled(config: ModelConfig):
    model = skeleton(config)
    return jit(lambda p, b: batch_losses(model, p, b, chunk=2))


def token_weights(batch):
    """A weight for each token, all different, for gradients of weighted sums."""
    shape = batch["inputs"].shape
    return (0.5 + jnp.arange(shape[0] * shape[1]).reshape(shape) % 7) * (batch["document_ids"] > 0)


# --- The oracle: one row in one plain pass, every token with weights of its own. ---


def oracle_losses(params, versions, version_L, row):
    """nll and log-partition (L,); `versions` has the MLP levels of each layer, (N, ...)."""
    model = skeleton(CONFIG).merge(params)
    ids, positions = row["document_ids"][None], row["positions"][None]
    x = model.embedding[...][row["inputs"]]
    layers = [model.segments.layer(index) for index in range(2)]
    for layer, levels in zip(layers, versions, strict=True):
        x = x + layer.mixer(layer.mixer_norm(x[None]), positions, ids)[0][0]
        for level in levels:
            w = jax.tree.map(lambda a: a[version_L], level)
            h = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + CONFIG.norm_eps)
            h = h * w["norm"]["scale"]
            gate, up = (jnp.einsum("ld,ldf->lf", h, w[name]) for name in ("gate", "up"))
            x = x + jnp.einsum("lf,lfd->ld", jax.nn.silu(gate) * up, w["down"])
    logits = model.logits(model.final_norm(x))
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - logits[jnp.arange(LENGTH), row["targets"]], log_z


@functools.cache
def oracle_gradient():
    def loss(versions, params, version_L, row, learned_L):
        return jnp.sum(jnp.where(learned_L, oracle_losses(params, versions, version_L, row)[0], 0))

    return jit(jax.grad(loss))


def layer_levels(params):
    """The MLP levels of each layer, first to last."""
    return [
        [jax.tree.map(lambda a: a[0], params["segments"][name]["mlp"][level]) for level in "01"]
        for name in ("000", "001")
    ]


def oracle_versions(params, row, chunks, piece=4):
    """Differences from the trained weights for each (document, piece), and each token's version.

    The tokens of a document in a piece use the sum of that document's gradients of all
    pieces in chunks that have ended: eq. 71, with nothing kept from version to version.
    """
    ids = np.asarray(row["document_ids"])
    pieces, documents = -(-LENGTH // piece), 4
    version_L = ids * pieces + np.arange(LENGTH) // piece
    total = documents * pieces
    differences = jax.tree.map(lambda a: np.zeros((total, *a.shape)), layer_levels(params))
    gradients = jax.tree.map(np.zeros_like, differences)
    for version in range(pieces, total):
        document, now = divmod(version, pieces)
        learned_L = version_L == version
        if not learned_L.any():
            continue
        for layer_difference, layer_gradient in zip(differences, gradients, strict=True):
            for chunk, difference, g in zip(chunks, layer_difference, layer_gradient, strict=True):
                ended = (now * piece // chunk) * chunk // piece if chunk else 0
                rows = slice(document * pieces, document * pieces + ended)
                for d, g_leaf in zip(jax.tree.leaves(difference), jax.tree.leaves(g), strict=True):
                    d[version] = -RATE * g_leaf[rows].sum(0)
        versions = jax.tree.map(lambda a, d: a + d, layer_levels(params), differences)
        got = oracle_gradient()(versions, params, version_L, row, learned_L)
        for g, new in zip(jax.tree.leaves(gradients), jax.tree.leaves(got), strict=True):
            g[version] = new[version]
    return jax.tree.map(jnp.float32, differences), version_L


@pytest.mark.parametrize("chunks", [(8, 4), (0, 4)])
def test_losses_equal_the_oracle(chunks):
    """Two levels, documents that meet inside pieces and at their borders, padding."""
    nll, log_z, scored = compiled(with_mlp(online_chunks=chunks))(parameters(), BATCH)
    np.testing.assert_array_equal(scored, BATCH["document_ids"] > 0)
    plain, _, _ = compiled(ORDINARY)(parameters(), BATCH)
    assert jnp.abs(nll - plain).max() > 0.05, "the updates do nothing"
    run = jit(oracle_losses)
    for index in range(3):
        row = jax.tree.map(lambda a, i=index: a[i], BATCH)
        differences, version_L = oracle_versions(parameters(), row, chunks)
        versions = jax.tree.map(lambda a, d: a + d, layer_levels(parameters()), differences)
        expected = run(parameters(), versions, version_L, row)
        for got, wanted in zip((nll[index], log_z[index]), expected, strict=True):
            wanted = np.where(scored[index], wanted, 0.0)
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5, err_msg=f"row {index}")


def test_training_gradients_are_those_with_the_updates_held_constant():
    """All parameters, through the weights and through the caches of earlier pieces."""

    @jit
    def row_gradient(params, differences, version_L, row, weights_L):
        def objective(params):
            versions = jax.tree.map(lambda a, d: a + d, layer_levels(params), differences)
            nll, log_z = oracle_losses(params, versions, version_L, row)
            return jnp.sum((nll + 0.1 * log_z) * weights_L)

        return jax.grad(objective)(params)

    model = skeleton(dataclasses.replace(CONFIG, remat="full"))

    @jit
    @jax.grad
    def gradient(params):
        nll, log_z, _ = batch_losses(model, params, BATCH, chunk=0, training=True)
        return jnp.sum((nll + 0.1 * log_z) * token_weights(BATCH))

    expected = jax.tree.map(jnp.zeros_like, parameters())
    for index in range(3):
        row = jax.tree.map(lambda a, i=index: a[i], BATCH)
        differences, version_L = oracle_versions(parameters(), row, (8, 4))
        one = row_gradient(parameters(), differences, version_L, row, token_weights(BATCH)[index])
        expected = jax.tree.map(jnp.add, expected, one)
    got = gradient(parameters())
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        scale = float(np.abs(b).max())
        assert scale > 0, f"{path} gets no gradient"
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale, err_msg=str(path))


def test_a_rate_of_zero_is_the_ordinary_model():
    still = compiled(with_mlp(online_learning_rate=0.0))(parameters(), BATCH)
    ordinary = compiled(ORDINARY)(parameters(), BATCH)
    for got, expected in zip(still, ordinary, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("token", [1, 7, 8, 14])
def test_a_token_changes_nothing_before_it(token: int):
    """Inside a chunk, at its last token, at the first after it."""
    tokens = BATCH["inputs"].at[0, token].add(1) % VOCAB
    targets = BATCH["targets"].at[0, token - 1].set(tokens[0, token])
    before = compiled(CONFIG)(parameters(), BATCH)
    after = compiled(CONFIG)(parameters(), BATCH | {"inputs": tokens, "targets": targets})
    np.testing.assert_array_equal(before[0][0, : token - 1], after[0][0, : token - 1])
    np.testing.assert_array_equal(before[1][0, :token], after[1][0, :token])
    assert (before[1][0, token:] != after[1][0, token:]).all()
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a[1:], b[1:])  # and nothing in other rows


@pytest.mark.parametrize("document", [1, 2, 3])
def test_documents_of_a_row_do_not_touch_each_other(document: int):
    """Exactly, though they share pieces: neither those before nor those after."""
    inside = BATCH["document_ids"][1] == document
    other = make_batch([1], [1], [1], seed=5)
    changed = BATCH | {
        name: BATCH[name].at[1].set(jnp.where(inside, other[name][1], BATCH[name][1]))
        for name in ("inputs", "targets")
    }
    before, after = (compiled(CONFIG)(parameters(), b)[1][1] for b in (BATCH, changed))
    np.testing.assert_array_equal(before[~inside], after[~inside])
    assert (before != after)[inside].mean() > 0.8


def test_a_document_scores_as_it_does_alone():
    """If it begins at the border of all chunks; its tail shares a piece with the next one."""
    packed = make_batch([8, 10, 4], [10], [1])
    alone = {name: a.at[1].set(jnp.roll(a[0], -8)) for name, a in packed.items()}
    batch = {
        name: alone[name] if name in ("inputs", "targets") else packed[name] for name in packed
    }
    for a in compiled(CONFIG)(parameters(), batch)[:2]:
        np.testing.assert_allclose(a[0, 8:18], a[1, :10], rtol=1e-5, atol=1e-5)


def test_decoding_token_by_token_equals_the_full_pass():
    """300 tokens of two rows, 18 pieces, 9 chunks of the slow level, two scanned layers."""
    # At high rates any update multiplies the rounding of those before, in one pass as in steps.
    config = with_mlp(online_chunks=(32, 16), online_learning_rate=2e-3)
    config = dataclasses.replace(config, taper=TaperConfig(schedule="uniform"))
    model, length, size = skeleton(config), 300, 60
    params = parameters(config)
    ids = jax.random.randint(jax.random.key(3), (2, length + 1), 0, VOCAB)
    ones = jnp.ones((2, length), jnp.int32)
    batch = {
        "inputs": ids[:, :-1],
        "targets": ids[:, 1:],
        "document_ids": ones,
        "positions": ones * jnp.arange(length),
    }
    nll, log_z, _ = compiled(config)(params, batch)

    advance = jit(lambda params, tokens, state: online.advance(model, params, tokens, state))
    state = online.init_state(model, params, 2, length)
    parts = []
    for done in range(0, length, size):
        logits, state = advance(params, batch["inputs"][:, done : done + size], state)
        parts.append(logits)
    for learned in jax.tree.leaves(state.fast.used):
        assert jnp.sqrt(jnp.mean(jnp.square(learned))) > 1e-3, "the updates do nothing"
    logits = jnp.concatenate(parts, axis=1)
    assert logits.shape == (2, length, VOCAB)
    got_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(got_z, log_z, rtol=0, atol=1e-4)
    np.testing.assert_allclose(got_z - picked, nll, rtol=0, atol=1e-4)


def sampled(config: ModelConfig, prompt, num_tokens: int, *, streamed: bool):
    """The prompt and its greedy continuation."""
    greedy, size = sampling.SamplingConfig(temperature=0), {"vocab_size": VOCAB}
    if streamed:
        args = skeleton(config), parameters(config), np.asarray(prompt), greedy
        tokens = np.stack([*sampling.stream(*args, num_tokens=num_tokens, **size)], axis=1)
    else:
        sample = sampling.make_sampler(skeleton(config), greedy, num_tokens=num_tokens, **size)
        tokens = jit(sample)(parameters(config), prompt, jax.random.key(0))
    return jnp.concatenate([prompt, tokens], axis=1)


@pytest.mark.parametrize("streamed", [True, False])
def test_sampling_makes_the_updates_of_evaluation(streamed: bool):
    """Greedy tokens are the likeliest ones of the oracle, given those before them."""
    prompt = BATCH["inputs"][:2, :6]  # a piece and a half
    tokens = sampled(CONFIG, prompt, LENGTH - 5, streamed=streamed)
    still = sampled(ORDINARY, prompt, LENGTH - 5, streamed=streamed)
    assert (tokens != still).mean() > 0.2, "the updates do nothing"
    row = {name: a[0] for name, a in BATCH.items()}  # one document

    @jit
    @functools.partial(jax.vmap, in_axes=(None, None, None, 0))
    def losses(versions, version_L, inputs, targets):
        one = row | {"inputs": inputs, "targets": targets}
        return oracle_losses(parameters(), versions, version_L, one)[0]

    for sequence in tokens:
        true = row | {"inputs": sequence[:-1], "targets": sequence[1:]}
        differences, version_L = oracle_versions(parameters(), true, (8, 4))
        versions = jax.tree.map(lambda a, d: a + d, layer_levels(parameters()), differences)
        every = jnp.broadcast_to(jnp.arange(VOCAB)[:, None], (VOCAB, LENGTH))
        nll_VL = losses(versions, version_L, sequence[:-1], every)
        np.testing.assert_array_equal(nll_VL.argmin(0)[5:], sequence[6:])


def test_eight_devices_equal_one():
    """And each holds the fast weights of its own rows only, split as the weights are."""
    batch = {name: np.concatenate([a] * 3)[:8] for name, a in BATCH.items()}
    config = RunConfig(
        model=CONFIG,
        data=DataConfig(seq_len=24, batch_size=8),
        training=TrainingConfig(loss_chunk=0),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
    )
    model, mesh = skeleton(CONFIG), mesh_lib.make_mesh(config)
    with jax.set_mesh(mesh):
        shardings = sharding.param_shardings(model.shapes, model.logical_axes, mesh)
        placed = jax.device_put(parameters(), shardings), sharding.to_devices(batch, mesh)
        run = jit(lambda p, b: batch_losses(model, p, b, chunk=0)).lower(*placed).compile()
        got = run(*placed)
    for a, b in zip(got, compiled(CONFIG)(parameters(), BATCH), strict=True):
        np.testing.assert_allclose(a, np.concatenate([b] * 3)[:8], rtol=1e-4, atol=1e-4)
    loops = [line for line in run.as_text().splitlines() if " while(" in line]
    # The `up` matrix of a level of the first layer: rows, layers, embed, mlp.
    assert any("f32[2,1,16,8]" in line for line in loops)
    assert not any("f32[8,1,16," in line for line in loops)


@pytest.mark.parametrize(
    ("changes", "training", "expected"),
    [
        ({}, False, True),
        ({}, True, True),
        ({"online_in_training": False}, False, True),
        ({"online_in_training": False}, True, False),
        ({"online_in_training": False, "online_chunks": ()}, False, False),
    ],
)
def test_updates_are_for_evaluation_unless_training_asks_for_them(
    changes, training: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
):
    calls = []

    def recorded(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    original = online.online_losses
    monkeypatch.setattr(online, "online_losses", recorded)
    model = skeleton(with_mlp(**changes))
    losses = functools.partial(batch_losses, model, chunk=0, training=training)
    jax.eval_shape(losses, model.shapes, BATCH)
    assert bool(calls) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"online_chunks": (8,)}, r"\(8,\) has 1 entries and mlp.periods has 2"),
        ({"online_chunks": (12, 8)}, r"\[12\] must be multiples of the smallest, 8"),
        ({"online_chunks": (0, 0)}, "at least one must be positive"),
        ({"online_chunks": (-4, 4)}, "must not be negative"),
        ({"online_learning_rate": -1.0}, "must not be negative"),
        ({"online_learning_rate": float("nan")}, "must be a finite number"),
        ({"online_learning_rate": float("inf")}, "must be a finite number"),
        ({"online_learning_rate": 0.1}, "become chaotic from about 0.1 on; use 0.01 or less"),
        ({"period_rate": "often"}, "period_rate is 'often'; it must be one of 'schedule'"),
        ({"online_chunks": ()}, "online_in_training needs mlp.online_chunks"),
    ],
)
def test_bad_chunks_are_one_clear_message(changes, message: str):
    with pytest.raises(ValueError, match=message):
        with_mlp(**changes)


def test_chunks_must_divide_the_sequence():
    RunConfig(model=CONFIG, data=DataConfig(seq_len=128))
    with pytest.raises(ValueError, match=r"8 does not divide data.seq_len=132; use divisors"):
        RunConfig(model=CONFIG, data=DataConfig(seq_len=132), training=TrainingConfig(loss_chunk=0))


def test_a_model_without_chunks_has_no_online_state():
    with pytest.raises(ValueError, match="online_chunks is empty"):
        online.init_state(skeleton(ORDINARY), parameters(), 1, 8)

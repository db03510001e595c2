"""What every mixer must hold, whatever it does: twins, causality, isolation, decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.rg_lru import RGLRUConfig
from tlm_jax import config_io, costs
from tlm_jax.config import ModelConfig, RunConfig, TaperConfig
from tlm_jax.mixers import AttentionConfig, GatedAttentionConfig, MixerConfig
from tlm_jax.models import skeleton
from tlm_jax.models.attention import Attention, GatedAttention
from tlm_jax.models.registry import LayerContext

HEADS = TaperConfig(schedule="linear", start=1.5, end=0.5)
MIXERS: dict[str, MixerConfig] = {
    "attention": AttentionConfig(num_heads=4),
    "tapered heads": AttentionConfig(num_heads=8, num_kv_heads=4, heads_taper=HEADS, qk_norm=True),
    "gated": GatedAttentionConfig(num_heads=4, num_kv_heads=2),
    "gated headwise": GatedAttentionConfig(num_heads=4, gate="headwise"),
    "rg-lru": RGLRUConfig(width=24),
}
VOCAB = 64


def model_config(mixer: MixerConfig, **changes) -> ModelConfig:
    defaults = {
        "vocab_size": VOCAB,
        "num_layers": 3,
        "d_model": 32,
        "mlp_width": 64,
        "taper": TaperConfig(schedule="linear", multiple_of=16),
        "mixer": mixer,
        "remat": "full",
        "compute_dtype": "float32",
    }
    return ModelConfig(**(defaults | changes))


@pytest.fixture(scope="module", params=list(MIXERS))
def mixer(request) -> MixerConfig:
    return MIXERS[request.param]


def tokens(rows: int, length: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, VOCAB)


def forward(config: ModelConfig):
    """Compiled (params, ids, segment_ids, positions) -> logits, and fresh parameters."""
    model = skeleton(config)

    def run(params, ids, segment_ids=None, positions=None):
        built = model.merge(params)
        hidden, _ = built(ids, segment_ids_BL=segment_ids, positions_BL=positions)
        return built.logits(hidden)

    return jax.jit(run), jax.jit(model.init)(jax.random.key(0))


def test_twins_have_equal_budgets_and_real_trees_agree(mixer: MixerConfig):
    config = model_config(mixer)
    assert costs.twin_difference(config, 128) == {}
    for twin in (config, config.uniform_twin()):
        assert costs.model_costs(twin, 128).parameters == skeleton(twin).num_params


def test_causal_and_rows_and_documents_apart(mixer: MixerConfig):
    """A changed token changes nothing before it, in other rows, or in other documents."""
    run, params = forward(model_config(mixer))
    ids = tokens(2, 40)
    segments = jnp.array([[1] * 25 + [2] * 15] * 2)
    positions = jnp.array([[*range(25), *range(15)]] * 2)
    base = run(params, ids, segments, positions)
    late = run(params, ids.at[0, 10].add(1) % VOCAB, segments, positions)
    np.testing.assert_array_equal(base[0, :10], late[0, :10])
    assert (base[0, 10:25] != late[0, 10:25]).any(axis=-1).all()
    np.testing.assert_array_equal(base[1], late[1])
    np.testing.assert_array_equal(base[0, 25:], late[0, 25:])


def test_scanned_equals_unrolled(mixer: MixerConfig):
    config = model_config(mixer, taper=TaperConfig(schedule="explicit", widths=(96, 48, 48)))
    ids = tokens(2, 24)

    def gradients(config):
        model = skeleton(config)

        def loss(params):
            built = model.merge(params)
            return jnp.mean(jnp.square(jax.nn.log_softmax(built.logits(built(ids)[0]))))

        return jax.jit(jax.value_and_grad(loss))(model.init(jax.random.key(0)))

    value, grads = gradients(config)
    other, plain = gradients(dataclasses.replace(config, scan_layers=False, remat="none"))
    assert float(value) == pytest.approx(float(other), rel=1e-5)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(plain), strict=True
    ):
        scale = float(jnp.abs(b).max())
        assert scale > 0, path
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * scale, err_msg=str(path))


def test_cached_decoding_equals_the_full_pass(mixer: MixerConfig):
    """310 tokens: a prompt of 37 in one pass, the others one by one."""
    config, length = model_config(mixer), 310
    run, params = forward(config)
    model, ids = skeleton(config), tokens(2, length)

    @jax.jit
    def advance(ids, start, cache):
        built = model.merge(params)
        positions = jnp.broadcast_to(start + jnp.arange(ids.shape[1]), ids.shape)
        hidden, cache = built(ids, positions_BL=positions, cache=cache)
        return built.logits(hidden), cache

    first, cache = advance(ids[:, :37], 0, model.merge(params).init_cache(2, length))
    parts = [first]
    for index in range(37, length):
        part, cache = advance(ids[:, index : index + 1], index, cache)
        parts.append(part)
    full = run(params, ids)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), full, rtol=1e-4, atol=1e-4)


def test_configs_survive_json(mixer: MixerConfig):
    run = RunConfig(model=model_config(mixer))
    again = config_io.from_dict(config_io.to_dict(run))
    assert again == run
    assert type(again.model.mixer) is type(mixer)


def test_a_gate_scales_what_the_heads_put_out():
    """With weights of zero every gate is one half, and so is the output."""
    context = LayerContext(d_model=32, norm_eps=1e-6, std=None, out_scale=1.0)
    plain = Attention(AttentionConfig(num_heads=4), context, rngs=nnx.Rngs(params=0))
    gated = GatedAttention(GatedAttentionConfig(num_heads=4), context, rngs=nnx.Rngs(params=0))
    x = jax.random.normal(jax.random.key(1), (2, 9, 32))
    positions, segments = jnp.broadcast_to(jnp.arange(9), (2, 9)), jnp.ones((2, 9), jnp.int32)
    expected = plain(x, positions, segments)[0]
    free = gated(x, positions, segments)[0]
    gated.gate[...] = jnp.zeros_like(gated.gate[...])
    np.testing.assert_allclose(gated(x, positions, segments)[0], 0.5 * expected, rtol=1e-5)
    assert np.abs(free - 0.5 * expected).max() > 1e-2


def test_the_gate_can_be_paid_from_the_mlp():
    """d_model/3 of MLP width pays for an elementwise gate, to the nearest 16, before tapering."""
    plain = ModelConfig(d_model=768, mlp_width=2048, mixer=AttentionConfig(num_heads=12))
    gated = dataclasses.replace(plain, mixer=GatedAttentionConfig(num_heads=12, gate_from_mlp=True))
    assert plain.base_mlp_width - gated.base_mlp_width == 256
    assert sum(gated.mlp_widths) == 8 * (2048 - 256)
    sizes = [costs.model_costs(c, 128).parameters for c in (plain, gated)]
    assert sizes[0] == sizes[1]


def test_heads_taper_in_whole_groups():
    mixer = AttentionConfig(num_heads=16, num_kv_heads=8, heads_taper=TaperConfig())
    config = ModelConfig(num_layers=8, d_model=256, mixer=mixer)
    per_layer = [m.heads(256) for m in config.mixers]
    assert [h for h, _, _ in per_layer] == [24, 24, 20, 18, 14, 12, 8, 8]
    assert all(h == 2 * n and k == 16 for h, n, k in per_layer)
    assert costs.twin_difference(config, 64) == {}
    with pytest.raises(ValueError, match=r"mixer.heads_taper: .*; use end=0.5"):
        dataclasses.replace(
            config, mixer=dataclasses.replace(mixer, heads_taper=TaperConfig(end=0.9))
        )

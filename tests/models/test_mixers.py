"""What every architecture must hold: twins, causality, isolation, decoding, bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.rg_lru import RGLRU, C, RGLRUConfig
from tlm_jax import costs, ops, testing
from tlm_jax.config import (
    ModelConfig,
    TaperConfig,
    UserError,
)
from tlm_jax.mixers import (
    AttentionConfig,
    GatedAttentionConfig,
    InterleavedConfig,
    RopeScaling,
    TitansConfig,
)
from tlm_jax.mlp import MLPConfig
from tlm_jax.models import skeleton
from tlm_jax.models.counted_costs import count_products
from tlm_jax.models.decoder import Attention
from tlm_jax.models.gated_attention import GatedAttention
from tlm_jax.models.registry import LayerContext

HEADS = TaperConfig(schedule="linear", start=1.5, end=0.5)
WIDER = TaperConfig(schedule="linear", start=1.5, end=0.5, multiple_of=8)
VOCAB = 64


def titans(variant: str, **changes) -> TitansConfig:
    """Small enough that 40 tokens are several chunks and windows."""
    sizes = {"num_heads": 2, "memory_width": 16, "chunk": 8, "window": 16, "num_persistent": 3}
    return TitansConfig(variant=variant, **(sizes | changes))


def model_config(**changes) -> ModelConfig:
    defaults = {
        "vocab_size": VOCAB,
        "num_layers": 2,
        "d_model": 32,
        "mlp_width": 64,
        "taper": TaperConfig(schedule="linear", multiple_of=16),
        "remat": "full",
        "compute_dtype": "float32",
    }
    return ModelConfig(**(defaults | changes))


MODELS: dict[str, ModelConfig] = {
    "attention": model_config(mixer=AttentionConfig(num_heads=4)),
    "tapered heads": model_config(
        mixer=AttentionConfig(num_heads=8, num_kv_heads=4, heads_taper=HEADS, qk_norm=True)
    ),
    "window": model_config(
        mixer=AttentionConfig(
            num_heads=4,
            num_kv_heads=2,
            bias="all",
            window=6,
            rope_scaling=RopeScaling(method="llama3", factor=4.0, original_length=64),
        )
    ),
    "gated": model_config(mixer=GatedAttentionConfig(num_heads=4, num_kv_heads=2)),
    "gated headwise": model_config(mixer=GatedAttentionConfig(num_heads=4, gate="headwise")),
    "hope": model_config(
        mixer=AttentionConfig(num_heads=4),
        mlp=MLPConfig(periods=(1, 4), level_taper=dataclasses.replace(WIDER, multiple_of=4)),
    ),
    "titans lmm": model_config(mixer=titans("lmm", chunks_per_checkpoint=2)),
    "titans mac": model_config(mixer=titans("mac")),
    "titans mag": model_config(mixer=titans("mag", memory_taper=WIDER)),
    "titans mal": model_config(mixer=titans("mal")),
    "titans tnt": model_config(
        mixer=titans("mag", chunk=16, local_chunks=(8,), shard=24, memory_taper=WIDER)
    ),
    "titans tnt lmm": model_config(
        mixer=titans(
            "lmm", chunk=16, local_chunks=(8, 4), shard=16, project_queries=False, momentum=False
        )
    ),
    "titans plain": model_config(
        mixer=titans(
            "lmm",
            memory_depth=1,
            conv_width=1,
            momentum=False,
            forgetting=False,
            gradient_clip=None,
        )
    ),
    "rg-lru": model_config(mixer=RGLRUConfig(width=24)),
    "interleaved": model_config(
        num_layers=4,
        mixer=InterleavedConfig(
            mixers=(AttentionConfig(num_heads=4), titans("mag", memory_taper=WIDER))
        ),
    ),
    "interleaved hope": model_config(
        num_layers=4,
        taper=TaperConfig(schedule="uniform"),
        mixer=InterleavedConfig(mixers=(AttentionConfig(num_heads=4), RGLRUConfig(width=24))),
        mlp=MLPConfig(periods=(1, 4)),
    ),
}


# One worker runs the tests of a model, for they share compiled programs.
@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in MODELS],
)
def config(request) -> ModelConfig:
    return MODELS[request.param]


@pytest.mark.parametrize("check", testing.CHECKS, ids=lambda check: check.__name__)
def test_what_every_mixer_must_hold(check, config: ModelConfig):
    check(config)


def test_flops_and_decoding_state_are_those_of_the_program(config: ModelConfig):
    """Every matrix product that JAX traces, and every value of the cache, to the last one."""
    model, rows, length = skeleton(config), 2, 48
    inputs = model.shapes, jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def logits(params, ids):
        built = model.merge(params)
        return built.logits(built(ids)[0])

    with ops.references():
        counted = count_products(jax.make_jaxpr(logits)(*inputs).jaxpr)[0]
    planned = costs.model_costs(config, length)
    persistent = 0  # made once for all tokens; left out of costs per token
    for mixer in config.mixers:
        if isinstance(mixer, AttentionConfig) and mixer.window:  # the reference multiplies by all
            heads, _, head_dim = mixer.heads(config.d_model)
            counted -= 4 * heads * head_dim * (length - mixer.window) * rows * length
        if isinstance(mixer, TitansConfig) and mixer.attends:
            persistent += 4 * mixer.num_persistent * config.d_model**2
    assert counted == planned.forward_flops_full * rows * length + persistent
    assert planned.forward_flops <= planned.forward_flops_full

    cache = jax.eval_shape(lambda p: model.merge(p).init_cache(1, length), model.shapes)
    values = [leaf.size for leaf in jax.tree.leaves(cache) if leaf.dtype == jnp.float32]
    assert 4 * sum(values) == planned.state_bytes + length * planned.kv_cache_bytes


def test_only_matrices_decay_and_what_is_no_matrix_is_known_by_name(config: ModelConfig):
    """Scales, biases and decays of channels, convolutions, memories at the start, prefixes."""
    kept = {
        jax.tree_util.keystr(path, simple=True, separator="/").split("/", 2)[-1]
        for path, decays in jax.tree_util.tree_leaves_with_path(skeleton(config).decays)
        if not decays
    }
    expected = {"scale", "mixer_norm/scale"}  # of the final norm, and in front of each mixer
    expected |= {f"mlp/{level}/norm/scale" for level in range(len(config.mlp.periods))}
    match config.mixer:
        case RGLRUConfig():
            expected |= {"mixer/decay_bias"}
        case AttentionConfig(bias="all"):
            expected |= {f"mixer/{name}_bias" for name in ("query", "key", "value", "out")}
        case AttentionConfig(qk_norm=True):
            expected |= {"mixer/query_norm/scale", "mixer/key_norm/scale"}
        case TitansConfig() as mixer:
            norms = {"memory_norm"}
            if mixer.attends:
                norms |= {"attention_norm", "attention/query_norm", "attention/key_norm"}
                expected |= {"mixer/attention/persistent"}
            if mixer.variant == "mac":
                norms |= {"retrieved_norm"}
            if mixer.conv_width > 1:
                expected |= {"mixer/memory/conv"}
            expected |= {f"mixer/{norm}/scale" for norm in norms}
            for memory in ("memory", *(f"local/{i}" for i in range(len(mixer.local_chunks)))):
                expected |= {f"mixer/{memory}/bias"}
                expected |= {f"mixer/{memory}/initial/{i}" for i in range(mixer.memory_depth)}
        case InterleavedConfig():
            return  # the same layers under other names
    assert {name.removeprefix("final_norm/") for name in kept} == expected


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


def test_an_empty_parameter_is_refused_by_name():
    """It could not be saved; so says a mixer's author before anything is trained."""
    config = model_config(mixer=RGLRUConfig(width=0), init_std=0.02)
    with pytest.raises(UserError, match=r"mixer/decay_bias of shape \(1, 0\) is empty"):
        skeleton(config)


@pytest.mark.parametrize("logit", [-100.0, -16.0, 0.0, 16.0])
def test_the_recurrence_and_its_gradients_are_exact_at_any_gate(logit: float):
    """A gate of 1e-7, at which 1 - a^2 is 0 in float32, or of 1e-44; against float64."""
    length, width = 12, 8
    context = LayerContext(d_model=width, norm_eps=1e-6, std=None, out_scale=1.0)
    graph, state = nnx.split(RGLRU(RGLRUConfig(width=width), context, rngs=nnx.Rngs(params=0)))
    state["recurrence_gate"][...] = jnp.zeros((width, width)).at[0].set(logit)
    x = jax.random.normal(jax.random.key(1), (1, length, width)).at[..., 0].set(1.0)
    ids = jnp.ones((1, length), jnp.int32)

    def ours(values):
        return jnp.sum(jnp.sin(nnx.merge(graph, values)(x, ids, ids)[0]))

    def by_definition(values):
        x_LD = np.asarray(x, np.float64)[0]
        gate = jax.nn.sigmoid(x_LD @ values["recurrence_gate"])
        log_a = C * gate * jax.nn.log_sigmoid(values["decay_bias"])
        u = jax.nn.sigmoid(x_LD @ values["input_gate"]) * (x_LD @ values["input"])
        u = u * jnp.exp(0.5 * jnp.log(-jnp.expm1(2 * log_a)))
        h, total = jnp.zeros(width), 0.0
        for t in range(length):
            h = jnp.exp(log_a[t]) * h + u[t]
            total += jnp.sum(jnp.sin(h @ values["out"]))
        return total

    found = jax.jit(jax.value_and_grad(ours))(state)
    with jax.enable_x64(True):
        values = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(state))
        expected = jax.jit(jax.value_and_grad(by_definition))(values)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path((found[0], nnx.to_pure_dict(found[1]))),
        jax.tree.leaves(expected),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=str(path))

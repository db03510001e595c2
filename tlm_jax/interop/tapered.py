"""Names, shapes and config fields of the graph that our own code for transformers computes.

The code is in `remote/modeling_tapered.py` and the modules beside it, and travels with an export.
It runs every mixer and every width of this library. A tensor has our name below its layer
(`layers.3.mixer.query.weight`); matrices of parameters are those of `torch.nn.Linear`, (outputs,
inputs).
"""

import dataclasses
from typing import Any

from tlm_jax.config import LayerSpec, ModelConfig
from tlm_jax.interop.llama import Tensor
from tlm_jax.mixers import AttentionConfig, GatedAttentionConfig, TitansConfig
from tlm_jax.mlp import MLPConfig
from tlm_jax.models.titans_memory import RATE

MODEL_TYPE = "tapered"
_CONFIGURATION, _MODELING = "configuration_tapered", "modeling_tapered"
MODULES = (
    _CONFIGURATION,
    _MODELING,
    "tapered_layers",
    "tapered_memory",
    "tapered_online",
    "tapered_titans",
)
"""Of the code that travels with an export."""
_MIXERS = (AttentionConfig, GatedAttentionConfig, TitansConfig)
_ATTENTION = ("num_heads", "num_kv_heads", "head_dim", "qk_norm", "rope_theta")
_INPUTS = {
    **dict.fromkeys(("query", "key", "value", "qkv", "gate", "gates", "up", "down", "head"), 1),
    **dict.fromkeys(("out", "retrieved_out", "attention_out"), 2),
}
"""Matrices, and how many leading dims of theirs are the input."""


def tensor(path: str, layer: int | None) -> Tensor:
    """How an export spells a parameter; see `llama.tensor`."""
    name = path.replace("/", ".")
    inputs = _INPUTS.get(path.rpartition("/")[2])
    if inputs is not None or path == "embedding":
        name += ".weight"
    return Tensor(name=name if layer is None else f"layers.{layer}.{name}", inputs=inputs)


def why_not(model: ModelConfig) -> str | None:
    """What of a model our code for transformers does not compute, or None."""
    for mixer in model.mixers:
        if type(mixer) not in _MIXERS:
            return mixer.describe(model.d_model)
        if isinstance(mixer, AttentionConfig) and (other := _unknown(mixer)):
            return f"mixer.{other}={getattr(mixer, other)!r}"
    if model.norm != "rms":
        return f"norm={model.norm}"
    if type(model.mlp) is not MLPConfig:
        return f"{type(model.mlp).__name__}"
    return None


def _unknown(mixer: AttentionConfig) -> str | None:
    """The name of a field that is set and that the code knows nothing of."""
    known = (*_ATTENTION, "heads_taper", "gate", "gate_from_mlp")
    if mixer.rope_theta is None:
        return "rope_theta"
    for field in dataclasses.fields(mixer):
        if field.name not in known and getattr(mixer, field.name) != field.default:
            return field.name
    return None


def config_json(model: ModelConfig) -> dict[str, Any]:
    """config.json of a model that `why_not` has no objection to."""
    online = {"chunks": list(model.mlp.online_chunks), "rate": model.mlp.online_learning_rate}
    return {
        "architectures": ["TaperedForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": f"{_CONFIGURATION}.TaperedConfig",
            "AutoModelForCausalLM": f"{_MODELING}.TaperedForCausalLM",
        },
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "layers": [_layer(layer, model.d_model) for layer in model.layers],
        "online": online if model.mlp.online_chunks else None,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
    }


def _layer(layer: LayerSpec, d_model: int) -> dict[str, Any]:
    mixer = layer.mixer
    widths = {"mlp_widths": list(layer.mlp_widths)}
    if isinstance(mixer, TitansConfig):
        return {"mixer": "titans", **_titans(mixer, d_model), **widths}
    assert isinstance(mixer, AttentionConfig)
    heads, kv_heads, head_dim = mixer.heads(d_model)
    return {
        "mixer": "attention",
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "qk_norm": mixer.qk_norm,
        "rope_theta": mixer.rope_theta,
        "gate": mixer.gate if isinstance(mixer, GatedAttentionConfig) else None,
        **widths,
    }


def _titans(mixer: TitansConfig, d_model: int) -> dict[str, Any]:
    """Arguments of `make_titans` in `remote/tapered_titans.py`."""
    heads, head_dim = mixer.heads(d_model)

    def learner(chunk: int) -> dict[str, Any]:
        shapes = mixer.memory_shapes(d_model)
        return {
            "num_heads": heads,
            "sizes": [shapes[0][0], *(outputs for _, outputs in shapes)],
            "chunk": chunk,
            "max_rate": RATE / chunk if mixer.max_rate is None else mixer.max_rate,
            "forgetting": mixer.forgetting,
            "momentum": mixer.momentum,
            "clip": mixer.gradient_clip,
        }

    shards = {"shard": mixer.shard, "projects": mixer.project_queries}
    return {
        "variant": mixer.variant,
        "window": mixer.window,
        "memory": learner(mixer.chunk) | {"head_dim": head_dim, "conv_width": mixer.conv_width},
        "local": [learner(chunk) | shards for chunk in mixer.local_chunks],
        "attention": {
            "num_heads": heads,
            "head_dim": head_dim,
            "num_persistent": mixer.num_persistent,
            "rope_theta": mixer.rope_theta,
        },
    }

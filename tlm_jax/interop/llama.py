"""Llama's names and shapes, and ours: one graph, two spellings.

Its relatives (`families`) have the same names. Both sides rotate the pairs (k, k + K/2) of a head.

Shapes: D model, H query heads, N key/value heads, K head dim, F MLP, V vocab.
"""

import dataclasses
import re
from typing import Any

from tlm_jax.config import ModelConfig
from tlm_jax.interop import families
from tlm_jax.mixers import AttentionConfig
from tlm_jax.mlp import MLPConfig

DECI_CONFIGURATION = "configuration_tapered_deci"
"""The module in an export that transformers reads its config with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """How one of our parameters, in one layer, is spelled in Llama's files."""

    name: str
    inputs: int | None = None
    """Leading dims of ours that are the matrix's input: Llama stores (outputs, inputs), each
    flat; 0 is a vector of outputs. None is stored alike."""


_LAYER = {
    "mixer_norm/scale": Tensor(name="input_layernorm.weight"),
    "mixer/query": Tensor(name="self_attn.q_proj.weight", inputs=1),
    "mixer/key": Tensor(name="self_attn.k_proj.weight", inputs=1),
    "mixer/value": Tensor(name="self_attn.v_proj.weight", inputs=1),
    "mixer/out": Tensor(name="self_attn.o_proj.weight", inputs=2),
    "mixer/query_bias": Tensor(name="self_attn.q_proj.bias", inputs=0),
    "mixer/key_bias": Tensor(name="self_attn.k_proj.bias", inputs=0),
    "mixer/value_bias": Tensor(name="self_attn.v_proj.bias", inputs=0),
    "mixer/out_bias": Tensor(name="self_attn.o_proj.bias"),
    "mixer/query_norm/scale": Tensor(name="self_attn.q_norm.weight"),
    "mixer/key_norm/scale": Tensor(name="self_attn.k_norm.weight"),
    "mlp/0/norm/scale": Tensor(name="post_attention_layernorm.weight"),
    "mlp/0/gate": Tensor(name="mlp.gate_proj.weight", inputs=1),
    "mlp/0/up": Tensor(name="mlp.up_proj.weight", inputs=1),
    "mlp/0/down": Tensor(name="mlp.down_proj.weight", inputs=1),
}
_MODEL = {
    "embedding": Tensor(name="model.embed_tokens.weight"),
    "final_norm/scale": Tensor(name="model.norm.weight"),
    "head": Tensor(name="lm_head.weight", inputs=1),
}


def tensor(path: str, layer: int | None) -> Tensor:
    """Llama's spelling of a parameter.

    Args:
      path: ours, below the segment: `mixer/query`; or of the model: `embedding`.
      layer: which layer, or None for a parameter of the model.
    """
    if layer is None:
        return _MODEL[path]
    found = _LAYER[path]
    return dataclasses.replace(found, name=f"model.layers.{layer}.{found.name}")


def mlp_dim(name: str) -> int | None:
    """The dim of a tensor in a file that counts MLP units, if it has one."""
    matrix = name.removesuffix(".weight").rpartition(".mlp.")[2]
    return {"gate_proj": 0, "up_proj": 0, "down_proj": 1}.get(matrix)


def layer_of(name: str) -> int | None:
    """The layer of a tensor in a file, if it belongs to one."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def is_ignored(name: str, config: ModelConfig) -> bool:
    """Whether a tensor in a file says nothing that the config does not."""
    return name.endswith("rotary_emb.inv_freq") or (
        config.tie_embeddings and name == _MODEL["head"].name
    )


def why_not(model: ModelConfig, form: str = "llama") -> str | None:
    """What of a model the graph of a format cannot express, or None.

    Args:
      model: the model.
      form: llama (any class of `families`), compact (Llama), deci (Llama in vLLM), or gguf, which
        has numbers of heads for each layer, and a head's dimension apart from them.
    """
    if any(type(mixer) is not AttentionConfig for mixer in model.mixers):
        return model.mixer.describe(model.d_model)
    mixers = attention(model)
    if reason := _why_not_attention(mixers, model, form):
        return reason
    if len(model.mlp.periods) > 1 or model.mlp.online_chunks:
        return "a chain of MLPs, or MLPs that learn inside a sequence (mlp.periods, online_chunks)"
    if model.norm != "rms":
        return f"norm={model.norm}"
    if type(model.mlp) is not MLPConfig:
        return f"{type(model.mlp).__name__}"
    heads = mixers[0].num_heads
    if model.d_model % heads and form != "gguf":
        return f"d_model={model.d_model}, which is no multiple of num_heads={heads}"
    return None


def _why_not_attention(mixers: list[AttentionConfig], model: ModelConfig, form: str) -> str | None:
    first, *others = mixers
    if form == "gguf":
        apart = [m for m in others if _but_heads(m) != _but_heads(first)]
        if apart or len({mixer.heads(model.d_model)[2] for mixer in mixers}) > 1:
            return "layers whose attention differs in more than the number of heads"
    elif any(mixer.num_heads != first.num_heads for mixer in others):
        return "layers with unequal numbers of heads (mixer.heads_taper)"
    if form == "llama":
        alike = {families.but_layers_own(mixer) for mixer in mixers}
        bases = {(m.rope_theta, m.rope_scaling) for m in mixers if m.rope_theta is not None}
        if len(alike) == 1 and len(bases) <= 1 and families.family(mixers) is not None:
            return None
        return "this mixture of biases, windows, qk_norm and layers without positions"
    if form != "gguf" and any(mixer != first for mixer in others):
        return "layers whose attention differs"
    if any(mixer.window is not None for mixer in mixers):
        return "mixer.window"
    if any(mixer.rope_theta is None for mixer in mixers):
        return "layers without positions (mixer.rope_theta)"
    if first.qk_norm:
        is_qwen3 = form == "gguf" and first.bias == "none"
        if is_qwen3 and first.rope_scaling.method == "llama3":
            return "mixer.qk_norm with rope_scaling llama3"  # llama.cpp would ignore the scaling
        unlike = len(set(mixers)) > 1 or len(set(model.mlp_widths)) > 1
        return None if is_qwen3 and not unlike else "mixer.qk_norm" + " in unlike layers" * is_qwen3
    known = {"gguf": ("none", "qkv", "all"), "compact": ("none", "all")}.get(form, ("none",))
    return None if first.bias in known else f"mixer.bias={first.bias}"


def class_name(model: ModelConfig) -> str:
    """What transformers calls models of this graph: Llama, Qwen2 and so on."""
    return str(config_json(model)["architectures"][0]).removesuffix("ForCausalLM")


def config_json(model: ModelConfig) -> dict[str, Any]:
    """config.json of a class of transformers with this model's graph, at its widest MLP."""
    return families.config_json(model, attention(model))


def deci_json(model: ModelConfig) -> dict[str, Any]:
    """Fields of config.json that make a Llama a DeciLMForCausalLM, each layer at its own width.

    As vLLM's nemotron_nas.py and its convertor of `nemotron-nas` configs read them (commit
    00bd149): objects, which `configuration_tapered_deci.py` makes of these dicts, and no
    `ffn_mult`, which would be taken in place of the width and rounded up.
    """
    heads, kv_heads, _ = attention(model)[0].heads(model.d_model)
    runs = {"no_op": False, "replace_with_linear": False}
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": f"{DECI_CONFIGURATION}.TaperedDeciConfig"},
        "block_configs": [
            {
                "attention": runs | {"n_heads_in_group": heads // kv_heads},
                "ffn": runs | {"intermediate_size": width, "hidden_act": "silu"},
            }
            for width in model.mlp_widths
        ],
    }


def attention(model: ModelConfig) -> list[AttentionConfig]:
    """The attention of each layer, of a model that `why_not` has no objection to."""
    return [mixer for mixer in model.mixers if isinstance(mixer, AttentionConfig)]


def _but_heads(mixer: AttentionConfig) -> AttentionConfig:
    return dataclasses.replace(mixer, num_heads=1, num_kv_heads=1, head_dim=2)

"""Llama's names, shapes and config fields, and ours: one graph, two spellings.

Llama, Mistral without a sliding window, and Qwen3 (which normalises queries and
keys) compute what our Transformer computes. Anything else is refused by the name
of the field. Both sides rotate the pairs (k, k + K/2) of a head.

Shapes: D model, H query heads, N key/value heads, K head dim, F MLP, V vocab.
"""

import dataclasses
import math
import re
from typing import Any

from tlm_jax.config import ModelConfig, UserError
from tlm_jax.mixers import AttentionConfig, ListedConfig, MixerConfig
from tlm_jax.mlp import MLPConfig
from tlm_jax.taper_config import TaperConfig

# What a config.json means where it is silent, by model_type.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
    },
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
}
DECI_CONFIGURATION = "configuration_tapered_deci"
"""The module in an export that transformers reads its config with."""
_MOST_POSITIONS = 1 << 24
_EXACT: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_bias": (False,),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (None,),
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """How one of our parameters, in one layer, is spelled in Llama's files."""

    name: str
    inputs: int | None = None
    """Leading dims of ours that are the matrix's input: Llama stores (outputs, inputs), each
    flat. None is stored alike."""


_LAYER = {
    "mixer_norm/scale": Tensor(name="input_layernorm.weight"),
    "mixer/query": Tensor(name="self_attn.q_proj.weight", inputs=1),
    "mixer/key": Tensor(name="self_attn.k_proj.weight", inputs=1),
    "mixer/value": Tensor(name="self_attn.v_proj.weight", inputs=1),
    "mixer/out": Tensor(name="self_attn.o_proj.weight", inputs=2),
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


def why_not(model: ModelConfig, *, each_layers_heads: bool = False) -> str | None:
    """What of a model Llama's graph cannot express, or None.

    Args:
      model: the model.
      each_layers_heads: whether the format has numbers of heads for each layer, and a head's
        dimension apart from them.
    """
    if any(type(mixer) is not AttentionConfig for mixer in model.mixers):
        return model.mixer.describe(model.d_model)
    first, *others = attention(model)
    if each_layers_heads:
        apart = [m for m in others if _but_heads(m) != _but_heads(first)]
        if apart or len({mixer.heads(model.d_model)[2] for mixer in (first, *others)}) > 1:
            return "layers whose attention differs in more than the number of heads"
    elif any(mixer != first for mixer in others):
        return "layers with unequal numbers of heads (mixer.heads_taper)"
    if first.qk_norm:
        return "mixer.qk_norm"
    if len(model.mlp.periods) > 1 or model.mlp.online_chunks:
        return "a chain of MLPs, or MLPs that learn inside a sequence (mlp.periods, online_chunks)"
    if model.norm != "rms":
        return f"norm={model.norm}"
    if type(model.mlp) is not MLPConfig:
        return f"{type(model.mlp).__name__}"
    if model.d_model % first.num_heads and not each_layers_heads:
        return f"d_model={model.d_model}, which is no multiple of num_heads={first.num_heads}"
    return None


def config_json(model: ModelConfig) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM with this model's graph, at its widest MLP."""
    first = attention(model)[0]
    heads, kv_heads, head_dim = first.heads(model.d_model)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": max(model.mlp_widths),
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": first.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": first.rope_theta},
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
    }


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


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Our config of a Llama-like one.

    Args:
      values: what config.json holds.
      where: the file, for messages.

    Raises:
      UserError: a field asks for what this library cannot compute exactly.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise UserError(
            f"{where}: model_type {kind!r} cannot be imported; {', '.join(_DEFAULTS)} can"
        )
    values = _DEFAULTS[kind] | values
    _check_exact(values, where)
    for name in _SIZES:
        if type(values.get(name)) is not int:
            raise UserError(f"{where}: {name} is {values.get(name)!r}; it must be a number")
    if type(tied := values.get("tie_word_embeddings", False)) is not bool:
        raise UserError(f"{where}: tie_word_embeddings is {tied!r}; it must be true or false")
    for name in ("num_key_value_heads", "head_dim"):
        if values.get(name) is not None and type(values[name]) is not int:
            raise UserError(f"{where}: {name} is {values[name]!r}; it must be a whole number")
    try:
        return ModelConfig(
            vocab_size=values["vocab_size"],
            num_layers=values["num_hidden_layers"],
            d_model=values["hidden_size"],
            mlp_width=_mean(values.get("mlp_widths")) or values["intermediate_size"],
            taper=_taper(values.get("mlp_widths")),
            mixer=_mixer(values, where),
            tie_embeddings=tied,
            norm_eps=_positive("rms_norm_eps", values.get("rms_norm_eps", 1e-6), where),
        )
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _mean(widths: list[int] | None) -> int | None:
    return sum(widths) // len(widths) if widths else None


def _taper(widths: list[int] | None) -> TaperConfig:
    if widths is None:
        return TaperConfig(schedule="uniform", multiple_of=1)
    return TaperConfig(schedule="explicit", widths=tuple(widths), multiple_of=1)


def _mixer(values: dict[str, Any], where: str) -> MixerConfig:
    """Attention, in each layer the same unless `layer_heads` (of a GGUF file) says otherwise."""
    usual = AttentionConfig(
        num_heads=values["num_attention_heads"],
        num_kv_heads=values.get("num_key_value_heads"),
        head_dim=values.get("head_dim"),
        qk_norm=values["model_type"] == "qwen3",
        rope_theta=_rope(values, where),
    )
    if "layer_heads" not in values:
        return usual
    return ListedConfig(
        mixers=tuple(
            dataclasses.replace(usual, num_heads=heads, num_kv_heads=kv_heads)
            for heads, kv_heads in values["layer_heads"]
        )
    )


def max_positions(values: dict[str, Any], where: str) -> int:
    """The longest text, in tokens, that a Llama-like model was trained to read.

    Raises:
      UserError: the field that says so is damaged.
    """
    name = "max_position_embeddings"
    length = (_DEFAULTS[values["model_type"]] | values)[name]
    if isinstance(length, bool) or not isinstance(length, int):
        raise UserError(f"{where}: {name} is {length!r}; it must be a number")
    if not 0 < length <= _MOST_POSITIONS:
        raise UserError(f"{where}: {name} is {length}; it must lie between 1 and {_MOST_POSITIONS}")
    return length


def _check_exact(values: dict[str, Any], where: str) -> None:
    if values.get("use_sliding_window") is False:  # qwen3 names a window and does not use it
        values.pop("sliding_window", None)
    for name, allowed in _EXACT.items():
        value = values.get(name, allowed[0])
        if value not in allowed:
            raise UserError(_refusal(where, name, value, allowed[0]))
    kinds = values.get("layer_types") or []
    for index, kind in enumerate(kinds if isinstance(kinds, list) else [kinds]):
        if kind != "full_attention":
            raise UserError(_refusal(where, f"layer_types[{index}]", kind, "full_attention"))


def _rope(values: dict[str, Any], where: str) -> float:
    """The base of the rotary frequencies, which stands in one of two places."""
    parameters = values.get("rope_parameters") or {}
    scaling = values.get("rope_scaling") or {}
    for name, spec in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if not isinstance(spec, dict):
            raise UserError(f"{where}: {name} is {spec!r}; it must be an object")
        kind = spec.get("rope_type", spec.get("type", "default"))
        if kind != "default":
            raise UserError(_refusal(where, f"{name}.rope_type", kind, "default"))
        factor = spec.get("partial_rotary_factor", 1.0)
        if factor != 1.0:
            raise UserError(_refusal(where, f"{name}.partial_rotary_factor", factor, 1.0))
    theta = parameters.get("rope_theta", values.get("rope_theta", 10_000.0))
    return _positive("rope_theta", theta, where)


def _positive(name: str, value: Any, where: str) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise UserError(f"{where}: {name} is {value!r}; it must be a positive number")
    return float(value)


def _refusal(where: str, name: str, value: Any, works: Any) -> str:
    return (
        f"{where}: {name} is {value!r}, which cannot be represented exactly here; only "
        f"{works!r} can be imported"
    )

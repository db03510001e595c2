"""Families of models whose graph is ours: config.json of Hugging Face, both ways.

| model_type | what it adds to Llama | here |
|---|---|---|
| llama | scaled rotary positions; biases of attention | `rope_scaling`; `bias="all"` |
| mistral | a window in every layer | `window` |
| qwen2 | biases of queries, keys and values; windows in some layers | `bias="qkv"`, `window` |
| qwen3 | normalised queries and keys; biases and windows as above | `qk_norm` |
| smollm3 | layers without positions; biases and windows as above | `rope_theta=None` |

Anything else is refused by the name of the field. Checked against transformers 5.24.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from tlm_jax.config import ModelConfig, UserError
from tlm_jax.mixers import NO_SCALING, AttentionConfig, ListedConfig, MixerConfig, RopeScaling
from tlm_jax.taper_config import NO_TAPER, TaperConfig

# What a config.json means where it is silent, by model_type.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
    },
    "qwen2": {
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "max_position_embeddings": 32768,
    },
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "max_position_embeddings": 32768,
    },
    "smollm3": {
        "num_key_value_heads": 4,
        "rope_theta": 2_000_000.0,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
    },
}
FAMILIES = tuple(_DEFAULTS)
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
_EXACT: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "use_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (None,),
}
_NO_BIASES = {"attention_bias": (False,)}
_NO_WINDOWS = {"sliding_window": (None,), "use_sliding_window": (False,)}
_EXACT_IN: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": _NO_WINDOWS,
    "mistral": _NO_BIASES | {"use_sliding_window": (False,)},
    "qwen2": _NO_BIASES,
}
"""Fields that transformers does not know in a family, or that mean nothing there."""
_FULL, _SLIDING = "full_attention", "sliding_attention"
_MOST_POSITIONS = 1 << 24
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Our config of a model of one of the families.

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
    for name, allowed in (_EXACT | _EXACT_IN.get(kind, {})).items():
        if values.get(name, allowed[0]) not in allowed:
            raise UserError(_refusal(where, name, values[name], allowed[0]))
    for name in _SIZES:
        if type(values.get(name)) is not int:
            raise UserError(f"{where}: {name} is {values.get(name)!r}; it must be a number")
    for name in ("tie_word_embeddings", "attention_bias", "use_sliding_window"):
        if type(flag := values.get(name, False)) is not bool:
            raise UserError(f"{where}: {name} is {flag!r}; it must be true or false")
    for name in ("num_key_value_heads", "head_dim"):
        if values.get(name) is not None:
            _whole(name, values[name], where)
    try:
        return ModelConfig(
            vocab_size=values["vocab_size"],
            num_layers=values["num_hidden_layers"],
            d_model=values["hidden_size"],
            mlp_width=_mean(values.get("mlp_widths")) or values["intermediate_size"],
            taper=_taper(values.get("mlp_widths")),
            mixer=_mixer(values, where),
            tie_embeddings=values.get("tie_word_embeddings", False),
            norm_eps=_positive("rms_norm_eps", values.get("rms_norm_eps", 1e-6), where),
        )
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def max_positions(values: dict[str, Any], where: str) -> int:
    """The longest text, in tokens, that a model was trained to read.

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


def _mean(widths: list[int] | None) -> int | None:
    return sum(widths) // len(widths) if widths else None


def _taper(widths: list[int] | None) -> TaperConfig:
    if widths is None:
        return NO_TAPER
    return TaperConfig(schedule="explicit", widths=tuple(widths), multiple_of=1)


def _mixer(values: dict[str, Any], where: str) -> MixerConfig:
    """Attention, in each layer the same where nothing says otherwise.

    Numbers of heads differ by `layer_heads` (of a GGUF file).
    """
    kind, num_layers = values["model_type"], values["num_hidden_layers"]
    theta, scaling = _rope(values, where)
    rotary = _rotary(values, num_layers, where)
    windows = _windows(values, rotary, where)
    all_heads = (
        values.get("layer_heads")
        or [(values["num_attention_heads"], values.get("num_key_value_heads"))] * num_layers
    )
    mixers = tuple(
        AttentionConfig(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=values.get("head_dim"),
            qk_norm=kind == "qwen3",
            bias="qkv" if kind == "qwen2" else "all" if values.get("attention_bias") else "none",
            window=window,
            rope_theta=theta if has_positions else None,
            rope_scaling=scaling if has_positions else NO_SCALING,
        )
        for (heads, kv_heads), window, has_positions in zip(all_heads, windows, rotary, strict=True)
    )
    return mixers[0] if len(set(mixers)) == 1 else ListedConfig(mixers=mixers)


def _rotary(values: dict[str, Any], num_layers: int, where: str) -> list[bool]:
    """Whether each layer has positions."""
    if values["model_type"] != "smollm3":
        return [True] * num_layers
    name = "no_rope_layers"
    listed = values.get(name)
    if listed is None:
        every = _whole("no_rope_layer_interval", values["no_rope_layer_interval"], where)
        return [(layer + 1) % every != 0 for layer in range(num_layers)]
    if not isinstance(listed, list) or len(listed) < num_layers or not {*map(str, listed)} <= {
        "0", "1", "True", "False"
    }:  # fmt: skip
        raise UserError(
            f"{where}: {name} is {listed!r}; it must list 0 or 1 for each of {num_layers} layers"
        )
    return [bool(one) for one in listed[:num_layers]]


def _windows(values: dict[str, Any], rotary: list[bool], where: str) -> list[int | None]:
    """The window of each layer, as transformers makes them of several fields."""
    kind, num_layers = values["model_type"], len(rotary)
    window = values.get("sliding_window")
    if kind != "mistral" and not values.get("use_sliding_window"):
        window = None  # which some name and do not use
    if window is not None:
        _whole("sliding_window", window, where)
    if kind in ("qwen2", "qwen3"):
        first = _whole("max_window_layers", values["max_window_layers"], where, least=0)
        slides = [layer >= first for layer in range(num_layers)]
    else:
        slides = [kind == "mistral" or not has_positions for has_positions in rotary]
    default = [_SLIDING if window and one else _FULL for one in slides]
    kinds = values.get("layer_types") or default
    if not isinstance(kinds, list) or len(kinds) < num_layers:
        raise UserError(
            f"{where}: layer_types is {kinds!r}; it must name the attention of {num_layers} layers"
        )
    for layer, found in enumerate(kinds[:num_layers]):
        free = window is not None and kind != "mistral"
        if found != default[layer] and not (free and found in (_FULL, _SLIDING)):
            raise UserError(_refusal(where, f"layer_types[{layer}]", found, default[layer]))
    return [window if one == _SLIDING else None for one in kinds[:num_layers]]


def _rope(values: dict[str, Any], where: str) -> tuple[float, RopeScaling]:
    """Base and scaling of the rotary frequencies, which stand in one of two places."""
    specs = {name: values.get(name) or {} for name in ("rope_parameters", "rope_scaling")}
    found: list[RopeScaling] = []
    for name, spec in specs.items():
        if not isinstance(spec, dict):
            raise UserError(f"{where}: {name} is {spec!r}; it must be an object")
        factor = spec.get("partial_rotary_factor", 1.0)
        if factor != 1.0:
            raise UserError(_refusal(where, f"{name}.partial_rotary_factor", factor, 1.0))
        if spec:
            found.append(_scaling(name, spec, values, where))
    if len(set(found)) > 1:
        raise UserError(f"{where}: rope_parameters and rope_scaling say different things")
    theta = values.get("rope_theta", 10_000.0)
    for spec in specs.values():
        theta = spec.get("rope_theta", theta)
    return _positive("rope_theta", theta, where), found[0] if found else NO_SCALING


def _scaling(name: str, spec: dict[str, Any], values: dict[str, Any], where: str) -> RopeScaling:
    kind = spec.get("rope_type", spec.get("type", "default"))
    if kind == "default":
        return NO_SCALING
    if kind not in ("linear", "llama3"):
        raise UserError(
            f"{where}: {name}.rope_type is {kind!r}, which cannot be represented exactly here; "
            "'default', 'linear' and 'llama3' can be imported"
        )

    def number(field: str) -> float:
        return _positive(f"{name}.{field}", spec.get(field), where)

    if kind == "linear":
        return RopeScaling(method="linear", factor=number("factor"))
    length = spec.get("original_max_position_embeddings", values["max_position_embeddings"])
    return RopeScaling(
        method="llama3",
        factor=number("factor"),
        low_freq_factor=number("low_freq_factor"),
        high_freq_factor=number("high_freq_factor"),
        original_length=_whole(f"{name}.original_max_position_embeddings", length, where),
    )


def _positive(name: str, value: Any, where: str) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise UserError(f"{where}: {name} is {value!r}; it must be a positive number")
    return float(value)


def _whole(name: str, value: Any, where: str, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise UserError(f"{where}: {name} is {value!r}; it must be a whole number")
    return value


def _refusal(where: str, name: str, value: Any, works: Any) -> str:
    return (
        f"{where}: {name} is {value!r}, which cannot be represented exactly here; only "
        f"{works!r} can be imported"
    )


def family(mixers: Sequence[AttentionConfig]) -> str | None:
    """The model_type whose attention has what these have; None if there is none.

    Args:
      mixers: of each layer, alike but for heads, windows and having positions.
    """
    first = mixers[0]
    windows = {mixer.window for mixer in mixers}
    lengths = windows - {None}
    if any(mixer.rope_theta is None for mixer in mixers):
        found = "smollm3"
    elif first.qk_norm:
        found = "qwen3"
    elif first.bias == "qkv":
        found = "qwen2"
    elif not lengths:
        found = "llama"
    else:
        found = "mistral" if len(windows) == 1 and first.bias == "none" else "smollm3"
    is_qwen2 = found == "qwen2"
    fits = (
        len(lengths) <= 1
        and first.qk_norm == (found == "qwen3")
        and (first.bias == "qkv") == is_qwen2
    )
    return found if fits else None


def config_json(model: ModelConfig, mixers: Sequence[AttentionConfig]) -> dict[str, Any]:
    """config.json of a model with this one's graph, at its widest MLP.

    Args:
      model: one that `llama.why_not` has no objection to.
      mixers: of its layers.
    """
    kind = family(mixers)
    if kind is None:
        raise ValueError("no family of transformers has this attention")
    first = next((mixer for mixer in mixers if mixer.rope_theta is not None), mixers[0])
    theta = first.rope_theta or _DEFAULTS["smollm3"]["rope_theta"]
    heads, kv_heads, head_dim = first.heads(model.d_model)
    values: dict[str, Any] = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": max(model.mlp_widths),
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "mlp_bias": False,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
    }
    if first.rope_scaling.method != "none":
        scaled = _rope_json(first.rope_scaling)
        values |= {"rope_parameters": scaled | {"rope_theta": theta}, "rope_scaling": scaled}
    if "attention_bias" not in _EXACT_IN.get(kind, {}):
        values["attention_bias"] = first.bias == "all"
    window = next((mixer.window for mixer in mixers if mixer.window), None)
    if kind == "mistral":
        values["sliding_window"] = window
    elif kind != "llama":
        values |= {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "layer_types": [_SLIDING if mixer.window else _FULL for mixer in mixers],
        }
    if kind == "smollm3":
        values["no_rope_layers"] = [int(mixer.rope_theta is not None) for mixer in mixers]
    return values


def _rope_json(scaling: RopeScaling) -> dict[str, Any]:
    if scaling.method == "linear":
        return {"rope_type": "linear", "type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_length,
    }


def but_layers_own(mixer: AttentionConfig) -> AttentionConfig:
    """The mixer without what a family may give to some layers and not to others."""
    return dataclasses.replace(mixer, window=None, rope_scaling=NO_SCALING, rope_theta=None)

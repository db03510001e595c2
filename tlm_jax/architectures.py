"""The four architectures of the paper at the budget of one Transformer.

A config file describes a Transformer and passes it through `with_architecture`, so that
`--config configs/tlm_440m.py:titans` is the same run with another architecture.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable

from tlm_jax import costs
from tlm_jax.config import ModelConfig, RunConfig, UserError
from tlm_jax.mixers import (
    AttentionConfig,
    GatedAttentionConfig,
    InterleavedConfig,
    MLPConfig,
    TitansConfig,
)

HOPE_PERIODS = (1, 4)
"""Optimizer steps between updates of the levels of Hope-attention's MLP chain (our choice)."""
TITANS_WINDOW = 512
"""Tokens that attention sees in Titans, but at most half a sequence (our choice)."""
_MULTIPLE = 32  # of MLP widths, so that tapers in multiples of 16 have an exact mean


def _attention(model: ModelConfig) -> AttentionConfig:
    if not isinstance(model.mixer, AttentionConfig):
        raise UserError(f"an architecture changes a Transformer, not {type(model.mixer).__name__}")
    return model.mixer


def _transformer(model: ModelConfig, seq_len: int) -> ModelConfig:
    del seq_len
    return model


def _gated_attention(model: ModelConfig, seq_len: int) -> ModelConfig:
    """Elementwise gates, the variant that arXiv 2505.06708 found best."""
    del seq_len
    mixer = GatedAttentionConfig(**vars(_attention(model)))
    return dataclasses.replace(model, mixer=mixer)


def _hope_attention(model: ModelConfig, seq_len: int) -> ModelConfig:
    """Attention and a chain of MLPs that share the layer's width."""
    del seq_len
    multiple = 16 * len(HOPE_PERIODS)
    return dataclasses.replace(
        model,
        mlp=MLPConfig(periods=HOPE_PERIODS),
        taper=dataclasses.replace(
            model.taper, multiple_of=math.lcm(model.taper.multiple_of, multiple)
        ),
    )


def _titans(model: ModelConfig, seq_len: int) -> ModelConfig:
    """Memory as a gate; with remat, memories of every sqrt(chunks)-th chunk are kept."""
    attention = _attention(model)
    mixer = TitansConfig(
        num_heads=attention.num_heads,
        head_dim=attention.head_dim,
        window=min(TITANS_WINDOW, max(seq_len // 2, 1)),
    )
    every = 1 if model.remat == "none" else max(math.isqrt(seq_len // mixer.chunk), 1)
    return dataclasses.replace(model, mixer=dataclasses.replace(mixer, chunks_per_checkpoint=every))


def _hybrid(model: ModelConfig, seq_len: int) -> ModelConfig:
    """Three layers of attention, then one of Titans, to the last layer (our choice)."""
    titans = _titans(model, seq_len).mixer
    return dataclasses.replace(
        model, mixer=InterleavedConfig(mixers=(*(_attention(model),) * 3, titans))
    )


ARCHITECTURES: dict[str, Callable[[ModelConfig, int], ModelConfig]] = {
    "transformer": _transformer,
    "gated_attention": _gated_attention,
    "hope_attention": _hope_attention,
    "titans": _titans,
}
"""The paper's."""
HYBRIDS: dict[str, Callable[[ModelConfig, int], ModelConfig]] = {"hybrid": _hybrid}
"""Layers of several architectures."""


def with_architecture(config: RunConfig, name: str) -> RunConfig:
    """A Transformer's run with another architecture of about as many parameters.

    What the new mixer has more than attention is taken off the mean MLP width, in
    multiples of 32; the paper does not say how it matched architectures (our choice). Only
    a model and its uniform twin are equal to the last parameter.

    Args:
      config: the run of a Transformer.
      name: one of `ARCHITECTURES` or `HYBRIDS`.

    Raises:
      UserError: no such architecture, or its mixer leaves no parameters for the MLPs.
    """
    known = ARCHITECTURES | HYBRIDS
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise UserError(f"unknown architecture {name!r}; {hint}")
    if name == "transformer":
        return config
    base = config.model
    model = known[name](base, config.data.seq_len)
    more = costs.model_costs(model, 1).parameters - costs.model_costs(base, 1).parameters
    width = more / (3 * model.d_model * model.num_layers)
    mlp_width = model.mlp_width - _MULTIPLE * round(width / _MULTIPLE)
    if mlp_width <= 0:
        raise UserError(
            f"{name} needs all {base.mlp_width} of mlp_width for its mixer; make it wider"
        )
    model = dataclasses.replace(model, mlp_width=mlp_width)
    return dataclasses.replace(config, name=f"{config.name}_{name}", model=model)

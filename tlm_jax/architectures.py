"""The four architectures of the paper at the budget of one Transformer.

A config file describes a Transformer and passes it through `with_architecture`, so that
`--config configs/tlm_440m.py:titans` is the same run with another architecture.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable

from tlm_jax import costs
from tlm_jax.config import ModelConfig, RunConfig, TaperConfig, UserError
from tlm_jax.mixers import AttentionConfig, GatedAttentionConfig, InterleavedConfig, TitansConfig
from tlm_jax.mlp import MLPConfig

HOPE_PERIODS = (1, 4)
"""Optimizer steps between updates of the levels of Hope-attention's MLP chain (our choice)."""
TITANS_WINDOW = 512
"""Tokens that attention sees in Titans, but at most a quarter of a sequence (our choice)."""
TITANS_CHUNK = 64
"""Tokens of a chunk of its memory, but at most a 16th of a sequence (our choice)."""
TNT_SHARD = 2048
"""Tokens of a shard of TNT's local memories and of a chunk of its global one, as in its paper, but
at most a quarter of a sequence (our choice)."""
TITANS_HEAD_DIM = 64
"""Dimension of its heads, where it divides them (our choice).

A memory's FLOPs grow with its hidden width times the dimension of its head, so that heads of
256, which the 1.3B Transformer has, leave no width at the Transformer's FLOPs.
"""
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


def _titans(model: ModelConfig, seq_len: int, *, tnt: bool = False) -> ModelConfig:
    """Memory as a gate, as wide as the Transformer's FLOPs allow.

    With remat, memories of every sqrt(chunks)-th chunk are kept.
    """
    heads, _, head_dim = _attention(model).heads(model.d_model)
    if heads * head_dim % TITANS_HEAD_DIM == 0:
        heads, head_dim = heads * head_dim // TITANS_HEAD_DIM, TITANS_HEAD_DIM
    chunk = min(TITANS_CHUNK, max(seq_len // 16, 1))
    length = seq_len  # of what goes through a memory chunk by chunk
    mixer = TitansConfig(
        num_heads=heads,
        head_dim=None if heads * head_dim == model.d_model else head_dim,
        chunk=chunk,
        window=min(TITANS_WINDOW, max(seq_len // 4, 1)),
    )
    if tnt:
        length = chunk * max(min(TNT_SHARD, seq_len // 4) // chunk, 1)
        mixer = dataclasses.replace(mixer, chunk=length, local_chunks=(chunk,), shard=length)
    if model.remat != "none":
        every = max(math.isqrt(length // chunk), 1)
        mixer = dataclasses.replace(mixer, chunks_per_checkpoint=every)
    uniform = dataclasses.replace(model, taper=TaperConfig(schedule="uniform"))
    wanted = costs.model_costs(uniform, seq_len).forward_flops

    def with_memory(base: ModelConfig, width: int) -> ModelConfig:
        return dataclasses.replace(base, mixer=dataclasses.replace(mixer, memory_width=width))

    def error(width: int) -> float:
        paid = _paid_by_mlp(with_memory(uniform, width), uniform)
        return abs(costs.model_costs(paid, seq_len).forward_flops - wanted) if paid else math.inf

    return with_memory(model, min(range(16, 8 * head_dim + 1, 16), key=error))


def _tnt(model: ModelConfig, seq_len: int) -> ModelConfig:
    """Titans with a global memory and a local one, in shards of a quarter of a sequence."""
    return _titans(model, seq_len, tnt=True)


def _hybrid(model: ModelConfig, seq_len: int) -> ModelConfig:
    """Three layers of attention, then one of Titans, and so on (our choice)."""
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
VARIANTS: dict[str, Callable[[ModelConfig, int], ModelConfig]] = {"hybrid": _hybrid, "tnt": _tnt}
"""Layers of several architectures; Titans with memories at two scales (arXiv 2511.07343)."""


def with_architecture(config: RunConfig, name: str) -> RunConfig:
    """A Transformer's run with another architecture of about as many parameters and FLOPs.

    Parameters that the new mixer has beyond attention's are deducted from the mean MLP width, in
    multiples of 32; the paper does not say how it matched architectures (our choice). Titans' FLOPs
    follow from its heads and the width of its memory (docs/architectures.md has both figures of
    each size). Only a model and its uniform twin are exactly equal.

    Args:
      config: the run of a Transformer.
      name: one of `ARCHITECTURES` or `VARIANTS`.

    Raises:
      UserError: no such architecture, or its mixer leaves no parameters for the MLPs.
    """
    known = ARCHITECTURES | VARIANTS
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise UserError(f"unknown architecture {name!r}; {hint}")
    if name == "transformer":
        return config
    base = config.model
    model = known[name](base, config.data.seq_len)
    paid = _paid_by_mlp(model, base)
    if paid is None:
        raise UserError(
            f"{name} needs all {base.mlp_width} of mlp_width for its mixer; make it wider"
        )
    return dataclasses.replace(config, name=f"{config.name}_{name}", model=paid)


def _paid_by_mlp(model: ModelConfig, base: ModelConfig) -> ModelConfig | None:
    """`model` with an MLP that gives it the parameters of `base`; None if none is left."""
    more = costs.model_costs(model, 1).parameters - costs.model_costs(base, 1).parameters
    width = more / (3 * model.d_model * model.num_layers)
    mlp_width = model.mlp_width - _MULTIPLE * round(width / _MULTIPLE)
    return dataclasses.replace(model, mlp_width=mlp_width) if mlp_width > 0 else None

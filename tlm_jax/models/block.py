"""One layer: z = x + mixer(norm(x)), y = z + mlp(norm(z)) (arXiv 2606.23670, section 3).

The MLP may be a chain of several, each with its own norm and residual.

Shapes: B batch, L length, D model.
"""

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from tlm_jax.config import ModelConfig
from tlm_jax.distributed.sharding import constrain
from tlm_jax.mixers import MixerConfig
from tlm_jax.models import attention as _attention  # noqa: F401 (registers itself)
from tlm_jax.models import registry
from tlm_jax.models import titans as _titans  # noqa: F401
from tlm_jax.models.layers import MLP, RMSNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """The static shape of one layer; equal neighbours share a scan."""

    mixer: MixerConfig
    mlp_widths: tuple[int, ...]
    """One a level of the MLP."""


def layer_specs(config: ModelConfig) -> tuple[LayerSpec, ...]:
    """The spec of each layer, first to last."""
    return tuple(
        LayerSpec(mixer=mixer, mlp_widths=config.mlp.level_widths(width))
        for mixer, width in zip(config.mixers, config.mlp_widths, strict=True)
    )


def scans_layers(config: ModelConfig) -> bool:
    """Whether equal layers run as a loop; None asks which backend runs."""
    if config.scan_layers is None:
        return jax.default_backend() != "cpu" or config.remat != "none"
    return config.scan_layers


class Block(nnx.Module):
    """Pre-norm residual block of the shape that `spec` says."""

    def __init__(self, config: ModelConfig, spec: LayerSpec, *, rngs: nnx.Rngs):
        context = registry.LayerContext(
            d_model=config.d_model,
            norm_eps=config.norm_eps,
            std=config.init_std,
            out_scale=1.0 / math.sqrt(config.num_layers * (1 + len(spec.mlp_widths))),
            attention_kernel=config.attention_kernel,
            prevent_cse=not scans_layers(config),
        )
        self.mixer_norm = RMSNorm(config.d_model, config.norm_eps, "norm")
        self.mixer = registry.make_mixer(spec.mixer, context, rngs=rngs)
        self.mlp = nnx.Dict(
            {
                str(level): MLP(width, context, rngs=rngs)
                for level, width in enumerate(spec.mlp_widths)
            }
        )

    @classmethod
    def from_key(cls, config: ModelConfig, spec: LayerSpec, key: jax.Array) -> Self:
        """A block whose parameters are drawn from `key`."""
        return cls(config, spec, rngs=nnx.Rngs(params=key))

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> Any:
        """The mixer's decoding state for `batch` rows of at most `length` tokens."""
        return self.mixer.init_cache(batch, length, dtype)

    def __call__(
        self,
        x_BLD: jax.Array,
        positions_BL: jax.Array,
        segment_ids_BL: jax.Array,
        cache: Any = None,
    ) -> tuple[jax.Array, Any]:
        """Returns the residual stream after the layer, and the mixer's new cache."""
        x_BLD = constrain(x_BLD, "batch", "sequence", None)
        x_BLD, cache = self.mix(x_BLD, positions_BL, segment_ids_BL, cache)
        with jax.named_scope("mlp"):
            for level in self.mlp.values():
                x_BLD = level(x_BLD)
        return x_BLD, cache

    def mix(
        self,
        x_BLD: jax.Array,
        positions_BL: jax.Array,
        segment_ids_BL: jax.Array,
        cache: Any = None,
    ) -> tuple[jax.Array, Any]:
        """z = x + mixer(norm(x)), the stream that the MLP reads, and the mixer's new cache."""
        with jax.named_scope("mixer"):
            y_BLD, cache = self.mixer(self.mixer_norm(x_BLD), positions_BL, segment_ids_BL, cache)
            return x_BLD + y_BLD, cache

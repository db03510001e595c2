"""Which Flax module runs which mixer config.

A mixer module is built as `Module(config, context, rngs=rngs)`, is called as
`(x_BLD, positions_BL, segment_ids_BL, cache) -> (y_BLD, cache)` and makes its own
decoding state in `init_cache(batch, length, dtype)`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import nnx

from tlm_jax.mixers import MixerConfig

_MODULES: dict[type[MixerConfig], Callable[..., nnx.Module]] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerContext:
    """What a module of a layer needs to know of the model around it."""

    d_model: int
    norm_eps: float
    std: float | None
    """Standard deviation of weights; None is 1/sqrt(fan-in)."""
    out_scale: float
    """Factor on the initial output projection, which keeps the residual's variance in depth:
    1 / sqrt(number of residual branches in the model), each mixer and each level of an MLP one."""
    attention_kernel: str = "auto"
    """See `models.kernels`."""
    prevent_cse: bool = False
    """Whether what is computed again needs a barrier to stay apart from the forward pass: in
    layers outside of loops. (Inside, on TPU, weights would be gathered many times more.)"""


def register(config: type[MixerConfig], module: Callable[..., nnx.Module]) -> None:
    """Has `module` run layers whose mixer is a `config`."""
    _MODULES[config] = module


def make_mixer(config: MixerConfig, context: LayerContext, *, rngs: nnx.Rngs) -> Any:
    """The module of a mixer.

    Raises:
      TypeError: none is registered.
    """
    for cls in type(config).__mro__:
        if cls in _MODULES:
            return _MODULES[cls](config, context, rngs=rngs)
    raise TypeError(f"no module is registered for {type(config).__name__}: see registry.register")

"""Which Flax module runs which config of a layer's part.

| part | config derives from | module is built as | and called as |
|---|---|---|---|
| mixer | `MixerConfig` | `Module(config, context, rngs=rngs)` | `y_BLD, cache = module(x_BLD, positions_BL, document_ids_BL, cache)` |
| MLP | `MLPConfig` | `Module(config, width, context, rngs=rngs)` | `y_BLD = module(x_BLD)` |
| norm | (a name) | `make(dim, eps, rngs=rngs)` | `y = norm(x)` |

Inputs of mixers and MLPs are normalised, and the residual is outside. A mixer makes its decoding
state in `init_cache(batch, length, dtype)`.
"""  # noqa: E501

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from tlm_jax import mixer_costs as costs
from tlm_jax.mixers import MixerConfig
from tlm_jax.mlp import MLPConfig
from tlm_jax.models import counted_costs

Part = MixerConfig | MLPConfig
_MODULES: dict[type[Part], Callable[..., Any]] = {}
_NORMS: dict[str, Callable[..., Any]] = {}


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
    """See `ops.attention`."""
    in_scan: bool = True
    """Whether layers run inside a loop; see `ops.swiglu`."""
    norm: str = "rms"
    """Kind of the stream's norms; see `make_norm`."""
    dtype: Any = jnp.float32
    """Compute dtype. Stock Flax layers compute in it if they are given it; left to themselves,
    they compute in the dtype of their parameters, float32."""


def register(config: type[Part], module: Callable[..., Any]) -> None:
    """Registers `module` to run the layer parts whose config is a `config`.

    Costs that nobody registered for the config (`mixer_costs.register`, `mlp_costs.register`)
    are counted in the module's program.
    """
    _MODULES[config] = module
    if issubclass(config, MixerConfig) and config not in costs.mixer_costs.registry:
        costs.mixer_costs.register(config, _counted_mixer)
    if issubclass(config, MLPConfig) and config not in costs.mlp_costs.registry:
        costs.mlp_costs.register(config, _counted_mlp)


def register_norm(name: str, make: Callable[..., Any], *, parameters_per_dim: int = 1) -> None:
    """Registers `make(dim, eps, rngs=rngs)` to make the norms of `model.norm=name`."""
    _NORMS[name] = make
    costs.NORM_PARAMETERS[name] = parameters_per_dim
    costs.NORM_MODULES[name] = make.__module__


def make_mixer(config: MixerConfig, context: LayerContext, *, rngs: nnx.Rngs) -> Any:
    """The module of a mixer.

    Raises:
      TypeError: none is registered.
    """
    return _module(config)(config, context, rngs=rngs)


def make_mlp(config: MLPConfig, width: int, context: LayerContext, *, rngs: nnx.Rngs) -> Any:
    """The module of one level of an MLP; `branch(x_BLD)` is what it adds to the stream.

    Raises:
      TypeError: none is registered.
    """
    return _module(config)(config, width, context, rngs=rngs)


def make_norm(kind: str, dim: int, eps: float, *, rngs: nnx.Rngs) -> Any:
    """A norm over the stream.

    Raises:
      UserError: nobody registered this kind.
    """
    costs.norm_parameters(kind)
    return _NORMS[kind](dim, eps, rngs=rngs)


def _module(config: Part) -> Callable[..., Any]:
    for cls in type(config).__mro__:
        if cls in _MODULES:
            return _MODULES[cls]
    name = type(config).__name__
    raise TypeError(f"no module is registered for {name}; call tlm_jax.register({name}, Module)")


def _context(d_model: int) -> LayerContext:
    return LayerContext(d_model=d_model, norm_eps=1e-6, std=None, out_scale=1.0)


@functools.lru_cache(maxsize=1024)
def _counted_mixer(mixer: MixerConfig, d_model: int, seq_len: int) -> costs.MixerCosts:
    return counted_costs.count_mixer(
        lambda: make_mixer(mixer, _context(d_model), rngs=nnx.Rngs(params=0)), d_model, seq_len
    )


@functools.lru_cache(maxsize=1024)
def _counted_mlp(mlp: MLPConfig, d_model: int, width: int) -> costs.MLPCosts:
    return counted_costs.count_mlp(
        lambda: make_mlp(mlp, width, _context(d_model), rngs=nnx.Rngs(params=0)), d_model
    )

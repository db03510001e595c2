"""Products with weights.

Shapes: D inputs, F outputs.
"""

from typing import Any

import jax
import jax.numpy as jnp

from tlm_jax.distributed.sharding import layer_shards
from tlm_jax.ops import _cpu
from tlm_jax.ops.backend import REFERENCE, Op, Version, everywhere, target


def dense(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x (..., D) @ w (D, ...)` -> (..., *w.shape[1:]), in the dtype of `x`."""
    version = DENSE.choose(target=target(), shards=layer_shards())
    y: jax.Array = version.function(x, w.astype(x.dtype))
    return y


def weight_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """The sum over tokens of `x (..., D)` times `dy (..., F)` -> (D, F), float32."""
    version = WEIGHT_GRADIENT.choose(target=target(), shards=layer_shards())
    dw: jax.Array = version.function(x, dy)
    return dw


def _reference(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tensordot(x, w, axes=1)


def _gradient_reference(x: jax.Array, dy: jax.Array) -> jax.Array:
    tokens = tuple(range(x.ndim - 1))
    return jnp.tensordot(x, dy, axes=(tokens, tokens), preferred_element_type=jnp.float32)


def _runs_flattened(*, target: str, shards: int, **_: Any) -> bool:
    return target == "cpu" and shards == 1


DENSE = Op(
    name="dense",
    versions=(
        Version(name="flattened", function=_cpu.flattened, runs=_runs_flattened),
        Version(name=REFERENCE, function=_reference, runs=everywhere),
    ),
)
"""Facts: `target`, `shards` (`layer_shards`)."""
WEIGHT_GRADIENT = Op(
    name="weight gradient",
    versions=(
        Version(name="flattened", function=_cpu.flattened_gradient, runs=_runs_flattened),
        Version(name=REFERENCE, function=_gradient_reference, runs=everywhere),
    ),
)
"""Facts: as those of `DENSE`."""

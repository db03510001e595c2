"""Products with weights.

Shapes: D inputs, F outputs.
"""

import jax
import jax.numpy as jnp

from tlm_jax.distributed.sharding import sequence_shards
from tlm_jax.ops import _cpu
from tlm_jax.ops.backend import REFERENCE, Op, Version, everywhere, target


def dense(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x (..., D) @ w (D, ...)` -> (..., *w.shape[1:]), in the dtype of `x`."""
    version = DENSE.choose(target=target(), shards=sequence_shards())
    y: jax.Array = version.function(x, w.astype(x.dtype))
    return y


def _reference(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tensordot(x, w, axes=1)


DENSE = Op(
    name="dense",
    versions=(
        Version(
            name="flattened",
            function=_cpu.flattened,
            runs=lambda target, shards, **_: target == "cpu" and shards == 1,
        ),
        Version(name=REFERENCE, function=_reference, runs=everywhere),
    ),
)

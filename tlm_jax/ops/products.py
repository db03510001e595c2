"""Products with weights.

Shapes: D inputs, F outputs.
"""

import jax
import jax.numpy as jnp

from tlm_jax.distributed.sharding import sequence_shards
from tlm_jax.ops.backend import REFERENCE, Op, Version, everywhere, target


def dense(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x (..., D) @ w (D, ...)` -> (..., *w.shape[1:]), in the dtype of `x`."""
    version = DENSE.choose(target=target(), shards=sequence_shards())
    y: jax.Array = version.function(x, w.astype(x.dtype))
    return y


def _reference(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tensordot(x, w, axes=1)


def _flattened(x: jax.Array, w: jax.Array) -> jax.Array:
    """One plain matrix product, which XLA's CPU backend runs a third faster than a batched one.

    Rows and tokens become one dim, so a mesh that splits tokens cannot keep them split.
    """
    y = x.reshape(-1, x.shape[-1]) @ w.reshape(w.shape[0], -1)
    return y.reshape(*x.shape[:-1], *w.shape[1:])


DENSE = Op(
    name="dense",
    versions=(
        Version(
            name="flattened",
            function=_flattened,
            runs=lambda target, shards, **_: target == "cpu" and shards == 1,
        ),
        Version(name=REFERENCE, function=_reference, runs=everywhere),
    ),
)

"""Matrix products, by themselves and with weights.

Shapes: D inputs, F outputs; M, K, N of a product (M, K) @ (K, N).
"""

from typing import Any

import jax
import jax.numpy as jnp

from tlm_jax.distributed.sharding import layer_shards
from tlm_jax.ops import _cpu
from tlm_jax.ops.backend import REFERENCE, Op, Version, everywhere, target


def dense(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x (..., D) @ w (D, ...)` -> (..., *w.shape[1:]), in the dtype of `x`."""
    return _run(DENSE, x, w)


def weight_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """The sum over tokens of `x (..., D)` times `dy (..., F)` -> (D, F), float32."""
    return _run(WEIGHT_GRADIENT, x, dy)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a (..., M, K) @ b (..., K, N)` -> (..., M, N), in their dtype."""
    return _run(PRODUCT, a, b)


def float32_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """`product`, in float32."""
    return _run(FLOAT32_PRODUCT, a, b)


def _run(op: Op, a: jax.Array, b: jax.Array) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    version = op.choose(
        target=target(),
        shards=layer_shards(),
        devices=1 if mesh.empty else mesh.size,
        dtype=a.dtype.name,
    )
    result: jax.Array = version.function(a, b)
    return result


def _reference(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tensordot(x, w.astype(x.dtype), axes=1)


def _gradient_reference(x: jax.Array, dy: jax.Array) -> jax.Array:
    tokens = tuple(range(x.ndim - 1))
    return jnp.tensordot(x, dy, axes=(tokens, tokens), preferred_element_type=jnp.float32)


def _float32_reference(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _runs_flattened(*, target: str, shards: int, **_: Any) -> bool:
    return target == "cpu" and shards == 1


def _runs_bfloat16(*, target: str, devices: int, dtype: str, **_: Any) -> bool:
    # Several devices would each gather the factors of the others, to lay them out in memory.
    return target == "cpu" and devices == 1 and dtype == "bfloat16"


DENSE = Op(
    name="dense",
    versions=(
        Version(name="bfloat16", function=_cpu.bfloat16_dense, runs=_runs_bfloat16),
        Version(name="flattened", function=_cpu.flattened, runs=_runs_flattened),
        Version(name=REFERENCE, function=_reference, runs=everywhere),
    ),
)
"""Facts: `target`, `shards` (`layer_shards`), `devices` (of the mesh), `dtype` (its name)."""
WEIGHT_GRADIENT = Op(
    name="weight gradient",
    versions=(
        Version(name="bfloat16", function=_cpu.bfloat16_gradient, runs=_runs_bfloat16),
        Version(name="flattened", function=_cpu.flattened_gradient, runs=_runs_flattened),
        Version(name=REFERENCE, function=_gradient_reference, runs=everywhere),
    ),
)
"""Facts: as those of `DENSE`."""
PRODUCT = Op(
    name="product",
    versions=(
        Version(name="bfloat16", function=_cpu.bfloat16_product, runs=_runs_bfloat16),
        Version(name=REFERENCE, function=jnp.matmul, runs=everywhere),
    ),
)
"""Facts: as those of `DENSE`."""
FLOAT32_PRODUCT = Op(
    name="float32 product",
    versions=(
        Version(name="bfloat16", function=_cpu.float32_product, runs=_runs_bfloat16),
        Version(name=REFERENCE, function=_float32_reference, runs=everywhere),
    ),
)
"""Facts: as those of `DENSE`."""

"""SwiGLU's product and GELU with its slope.

Shapes: B batch, L length, D model, F MLP.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from tlm_jax.ops.products import dense


def swiglu(
    x_BLD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array, *, in_scan: bool
) -> jax.Array:
    """(silu(x W_gate) * (x W_up)) W_down (arXiv 2002.05202) -> (B, L, D).

    The backward pass keeps the two inner products only.

    Args:
      x_BLD: inputs; products run in their dtype.
      gate_DF, up_DF, down_FD: weights.
      in_scan: whether the layer runs inside a scan. Outside, what is computed again needs a
        barrier to stay apart from the forward pass. (Inside, on TPU, a barrier would have weights
        gathered many times more.)
    """
    gated = jax.checkpoint(_gated, prevent_cse=not in_scan)
    return gated(dense(x_BLD, gate_DF), dense(x_BLD, up_DF), down_FD)


def _gated(gate_BLF: jax.Array, up_BLF: jax.Array, down_FD: jax.Array) -> jax.Array:
    return dense(jax.nn.silu(gate_BLF) * up_BLF, down_FD)


@jax.custom_jvp
def gelu_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Exact GELU x Phi(x) and its derivative Phi(x) + x phi(x), elementwise."""
    cdf = 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))
    return x * cdf, cdf + x * _normal_density(x)


@gelu_and_slope.defjvp
def _gelu_and_slope_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[Any, Any]:
    (x,), (dx,) = primals, tangents
    value, slope = gelu_and_slope(x)
    curvature = _normal_density(x) * (2.0 - x * x)
    return (value, slope), (slope * dx, curvature * dx)


def _normal_density(x: jax.Array) -> jax.Array:
    return jnp.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))

"""The small parts: dense products, RMSNorm, SwiGLU MLP, rotary positions, GELU with its slope.

Shapes: B batch, L length, D model, F MLP, H heads, K head dim.

Every parameter carries `logical_axes`, one name per dim; `distributed.sharding`
maps the names to mesh axes. Parameters are float32; products run in the dtype
of their input.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tlm_jax.models.registry import LayerContext


def weight(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    logical_axes: tuple[str | None, ...],
    *,
    fan_in: int,
    std: float | None,
    scale: float = 1.0,
    decays: bool = True,
) -> nnx.Param:
    """A float32 normal matrix of standard deviation `scale * (std or 1/sqrt(fan_in))`.

    One rule for every layer, whatever its width (our choice; the paper is silent). `decays`
    says whether weight decay acts on it; see `Skeleton.decays`.
    """
    deviation = scale * (1.0 / math.sqrt(fan_in) if std is None else std)
    value = deviation * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, logical_axes=logical_axes, decays=decays)


def dense(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x (..., D) @ w (D, ...)` -> (..., *w.shape[1:]), in the dtype of `x`.

    Leading dims are flattened into one for the product: XLA's CPU backend runs
    a plain matrix product about a third faster than a batched one.
    """
    w = w.astype(x.dtype)
    y = x.reshape(-1, x.shape[-1]) @ w.reshape(w.shape[0], -1)
    return y.reshape(*x.shape[:-1], *w.shape[1:])


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last dim, in float32."""

    def __init__(self, dim: int, eps: float, axis_name: str | None = None):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32), logical_axes=(axis_name,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x_f32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + self.eps)
        return (x_f32 * inverse * self.scale[...]).astype(x.dtype)


class MLP(nnx.Module):
    """x + SwiGLU(norm(x)), SwiGLU(h) = (silu(h W_gate) * (h W_up)) W_down (arXiv 2002.05202)."""

    def __init__(self, width: int, context: LayerContext, *, rngs: nnx.Rngs):
        d_model, std = context.d_model, context.std
        inner, outer = ("embed", "mlp"), ("mlp", "embed")
        self.prevent_cse = context.prevent_cse
        self.norm = RMSNorm(d_model, context.norm_eps, "norm")
        self.gate = weight(rngs, (d_model, width), inner, fan_in=d_model, std=std)
        self.up = weight(rngs, (d_model, width), inner, fan_in=d_model, std=std)
        self.down = weight(
            rngs, (width, d_model), outer, fan_in=width, std=std, scale=context.out_scale
        )

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        return x_BLD + self.branch(x_BLD)

    def branch(self, x_BLD: jax.Array) -> jax.Array:
        """SwiGLU(norm(x)), what the MLP adds to the stream."""
        h_BLD = self.norm(x_BLD)
        gate_BLF, up_BLF = dense(h_BLD, self.gate[...]), dense(h_BLD, self.up[...])
        # The backward pass keeps gate and up only.
        gated = jax.checkpoint(_gated, prevent_cse=self.prevent_cse)
        return gated(gate_BLF, up_BLF, self.down[...])


def _gated(gate_BLF: jax.Array, up_BLF: jax.Array, down_FD: jax.Array) -> jax.Array:
    return dense(jax.nn.silu(gate_BLF) * up_BLF, down_FD)


def rotary(x_BLHK: jax.Array, positions_BL: jax.Array, theta: float) -> jax.Array:
    """Rotates pairs (k, k + K/2) of each head by position * theta^(-2k/K) (arXiv 2104.09864)."""
    half = x_BLHK.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions_BL[:, :, None, None].astype(jnp.float32) * frequencies
    sin, cos = jax.lax.platform_dependent(
        jnp.stack([jnp.sin(angles), jnp.cos(angles)]), cpu=_materialized, default=lambda x: x
    )
    a, b = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.astype(x_BLHK.dtype)


def _materialized(x: jax.Array) -> jax.Array:
    """x, behind a product with which XLA's CPU backend fuses nothing.

    Sines count as cheap there, and would be computed again for each head and each use.
    """
    identity = jnp.eye(x.shape[-1], dtype=x.dtype)
    return jnp.matmul(x, identity, precision=jax.lax.Precision.HIGHEST)


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

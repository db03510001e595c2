"""Rotary positions (arXiv 2104.09864).

Shapes: B batch, L length, H heads, K head dim.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tlm_jax.mixers import NO_SCALING, RopeScaling
from tlm_jax.ops import _cpu
from tlm_jax.ops.backend import REFERENCE, Op, Version, everywhere, target


def rotary(
    x_BLHK: jax.Array,
    positions_BL: jax.Array,
    theta: float,
    scaling: RopeScaling = NO_SCALING,
) -> jax.Array:
    """Rotates pairs (k, k + K/2) of each head by position * theta^(-2k/K), in float32.

    `scaling` divides some of these frequencies.
    """
    half = x_BLHK.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling.method != "none":
        frequencies = frequencies / np.asarray(scaling.divisors(theta, 2 * half), np.float32)
    angles = positions_BL[:, :, None, None].astype(jnp.float32) * frequencies
    sin, cos = SINES.choose(target=target()).function(angles)
    a, b = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.astype(x_BLHK.dtype)


def _reference(angles: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.sin(angles), jnp.cos(angles)


SINES = Op(
    name="rotary",
    versions=(
        Version(
            name="materialized",
            function=_cpu.materialized_sines,
            runs=lambda target, **_: target == "cpu",
        ),
        Version(name=REFERENCE, function=_reference, runs=everywhere),
    ),
)

"""Versions for XLA's CPU backend.

bfloat16 there (jaxlib 0.10 and 0.12, measured with AMX): a product is fast if its result is float32
and neither factor is a transpose. Any other is done in float32 and takes three to ten times as
long. XLA folds a transpose into the product that it is a factor of, or that it is the transpose of,
and where it does so late, the program fails: "BF16 x BF16 = F32" has no other kernel.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


def flattened(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x @ w` as one plain matrix product, a third faster there than a batched one.

    Rows and tokens become one dim, and so do the outputs: a mesh that splits the tokens of a row,
    or heads behind another dim, cannot keep them split, and each device would do the work of all.
    """
    y = _rows(x) @ _matrix(w, x.dtype)
    return y.reshape(*x.shape[:-1], *w.shape[1:])


def flattened_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient of `flattened` with respect to its weight, float32."""
    return jnp.matmul(_rows(x).T, _rows(dy), preferred_element_type=jnp.float32)


@jax.custom_vjp
def bfloat16_dense(x: jax.Array, w: jax.Array) -> jax.Array:
    """`flattened` for bfloat16 `x (..., D)`; `w (D, ...)` is float32 or bfloat16.

    The backward pass casts the weight again, as it needs a transposed copy of it anyway. The
    weight's gradient keeps the float32 sums.
    """
    return _bfloat16_forward(x, w)[0]


def _bfloat16_forward(x: jax.Array, w: jax.Array) -> Any:
    y = bfloat16_product(_rows(x), _matrix(w, x.dtype))
    return y.reshape(*x.shape[:-1], *w.shape[1:]), (x, w)


def _bfloat16_backward(residuals: Any, dy: jax.Array) -> Any:
    x, w = residuals
    dy = dy.reshape(-1, w[0].size)
    dx = bfloat16_product(dy, _matrix(w, x.dtype).T)
    dw = bfloat16_gradient(x, dy)
    return dx.reshape(x.shape), dw.reshape(w.shape).astype(w.dtype)


bfloat16_dense.defvjp(_bfloat16_forward, _bfloat16_backward)


def bfloat16_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient of `bfloat16_dense` with respect to its weight, float32."""
    return float32_product(_rows(x).T, _rows(dy))


def bfloat16_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a (..., M, K) @ b (..., K, N)`, bfloat16, by way of a float32 result."""
    return float32_product(a, b).astype(a.dtype)


def float32_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a (..., M, K) @ b (..., K, N)`, float32, of bfloat16 factors, transposed or not."""
    return _stored(jnp.matmul(_stored(a), _stored(b), preferred_element_type=jnp.float32))


def _stored(x: jax.Array) -> jax.Array:
    """`x` row by row in memory, a transpose too, which XLA then folds into no product.

    Pad and slice takes five times as long; a barrier, a detour over uint16 or float32, a gather, an
    update of zeros and a loop of one round are folded (docs/notes/speed-bfloat16.md).
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _matrix(w: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return w.reshape(w.shape[0], -1).astype(dtype)


def materialized_sines(angles: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sine and cosine behind a product, with which XLA fuses nothing.

    Sines count as cheap there, and would be computed again for each head and each use.
    """
    both = jnp.stack([jnp.sin(angles), jnp.cos(angles)])
    identity = jnp.eye(both.shape[-1], dtype=both.dtype)
    sin, cos = jnp.matmul(both, identity, precision=jax.lax.Precision.HIGHEST)
    return sin, cos

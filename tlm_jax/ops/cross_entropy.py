"""Next-token cross-entropy that never holds all float32 logits.

Shapes: B batch, L length, C chunk of positions, D model, V vocab.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tlm_jax.ops.products import dense, float32_product, weight_gradient


def token_losses(
    hidden_BLD: jax.Array, head_DV: jax.Array, targets_BL: jax.Array, *, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood and log-partition of each target, in nats.

    Logits are float32 and exist for `chunk` positions at a time, in the backward
    pass too, where they are computed again.

    Args:
      hidden_BLD: final hidden states, in the compute dtype.
      head_DV: output matrix.
      targets_BL: int32 token ids.
      chunk: positions at a time; divides L. 0 takes all at once.

    Returns:
      nll_BL and log_z_BL, float32.
    """

    def one_chunk(logits_BCV: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        return log_z_BC - _pick(logits_BCV, targets_BC), log_z_BC

    return _in_chunks(one_chunk, hidden_BLD, head_DV, targets_BL, chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def total_loss(
    hidden_BLD: jax.Array,
    head_DV: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    chunk: int,
    z_loss: float,
) -> tuple[jax.Array, jax.Array]:
    """Sum over tokens of weight * (nll + z_loss * log_z^2), and of weight * nll.

    What `token_losses` gives, added up; but its gradient is made in the same pass over the
    logits, which are not computed a second time. (After Liger Kernel, arXiv 2410.10989.) Only
    the first sum is differentiated, with regard to hidden states and head.

    Args: see `token_losses`; weights_BL are float32.
    """
    nll_BL, log_z_BL = token_losses(hidden_BLD, head_DV, targets_BL, chunk=chunk)
    nll = jnp.sum(weights_BL * nll_BL)
    return nll + z_loss * jnp.sum(weights_BL * jnp.square(log_z_BL)), nll


def _total_loss_forward(
    hidden_BLD: jax.Array,
    head_DV: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    chunk: int,
    z_loss: float,
) -> Any:
    head = head_DV.astype(hidden_BLD.dtype)

    def one_chunk(sums: Any, tokens: Any) -> Any:
        total, total_nll, dhead_DV = sums
        hidden_BCD, targets_BC, weights_BC = tokens
        with jax.named_scope("head"):
            logits_BCV = logits(hidden_BCD, head)
            log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
            nll_BC = weights_BC * (log_z_BC - _pick(logits_BCV, targets_BC))
            shares_BCV = jnp.exp(logits_BCV - log_z_BC[..., None])
            shares_BCV *= (weights_BC * (1.0 + 2.0 * z_loss * log_z_BC))[..., None]
            is_target = targets_BC[..., None] == jnp.arange(head.shape[1])
            dlogits = shares_BCV - jnp.where(is_target, weights_BC[..., None], 0.0)
            dlogits = dlogits.astype(head.dtype)
            dhidden = dense(dlogits, head.T)
            dhead_DV += weight_gradient(hidden_BCD, dlogits)
        nll = jnp.sum(nll_BC)
        total += nll + z_loss * jnp.sum(weights_BC * jnp.square(log_z_BC))
        return (total, total_nll + nll, dhead_DV), dhidden

    zero = jnp.zeros((), jnp.float32)
    zeros = (zero, zero, jnp.zeros(head.shape, jnp.float32))
    parts = tuple(_split(x, chunk) for x in (hidden_BLD, targets_BL, weights_BL))
    (total, nll, dhead_DV), dhidden = jax.lax.scan(one_chunk, zeros, parts)
    dhead_DV = dhead_DV.astype(head_DV.dtype)
    return (total, nll), (_join(dhidden, hidden_BLD.shape), dhead_DV)


def _total_loss_backward(chunk: int, z_loss: float, gradients: Any, cotangents: Any) -> Any:
    dhidden, dhead = gradients
    scale = cotangents[0]
    return (scale * dhidden).astype(dhidden.dtype), (scale * dhead).astype(dhead.dtype), None, None


total_loss.defvjp(_total_loss_forward, _total_loss_backward)


def token_scores(
    hidden_BLD: jax.Array, head_DV: jax.Array, targets_BL: jax.Array, *, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of each target, and whether greedy decoding would choose it.

    Args: see `token_losses`.

    Returns:
      nll_BL, and greedy_BL with 1 and 0, float32.
    """

    def one_chunk(logits_BCV: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        nll_BC = jax.nn.logsumexp(logits_BCV, axis=-1) - _pick(logits_BCV, targets_BC)
        best_BC = jnp.argmax(logits_BCV, axis=-1)
        return nll_BC, (best_BC == targets_BC).astype(jnp.float32)

    return _in_chunks(one_chunk, hidden_BLD, head_DV, targets_BL, chunk)


def distillation_losses(
    hidden_BLD: jax.Array,
    head_DV: jax.Array,
    targets_BL: jax.Array,
    teacher_BLE: jax.Array,
    teacher_head_EV: jax.Array,
    *,
    chunk: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `token_losses` gives, and the divergence KL(teacher || model) of each distribution.

    Args:
      hidden_BLD, head_DV, targets_BL, chunk: see `token_losses`.
      teacher_BLE: the teacher's final hidden states (E is its width), not differentiated.
      teacher_head_EV: its output matrix, likewise.

    Returns:
      nll_BL, log_z_BL and divergence_BL in nats, float32.
    """
    teacher_BLE, teacher_head_EV = jax.lax.stop_gradient((teacher_BLE, teacher_head_EV))
    head_DV = head_DV.astype(hidden_BLD.dtype)
    teacher_head_EV = teacher_head_EV.astype(teacher_BLE.dtype)

    def one_chunk(
        hidden_BCD: jax.Array, targets_BC: jax.Array, teacher_BCE: jax.Array
    ) -> tuple[jax.Array, ...]:
        with jax.named_scope("head"):
            logits_BCV = logits(hidden_BCD, head_DV)
            log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
            log_p_BCV = jax.nn.log_softmax(logits(teacher_BCE, teacher_head_EV), axis=-1)
            apart_BCV = log_p_BCV - (logits_BCV - log_z_BC[..., None])
            divergence_BC = jnp.sum(jnp.exp(log_p_BCV) * apart_BCV, axis=-1)
            return log_z_BC - _pick(logits_BCV, targets_BC), log_z_BC, divergence_BC

    arrays = hidden_BLD, targets_BL, teacher_BLE
    nll_BL, log_z_BL, divergence_BL = _scan_chunks(one_chunk, arrays, chunk)
    return nll_BL, log_z_BL, divergence_BL


def logits(hidden_BLD: jax.Array, head_DV: jax.Array) -> jax.Array:
    """float32 logits (B, L, V) of hidden states; the product runs in their dtype."""
    return float32_product(hidden_BLD, head_DV.astype(hidden_BLD.dtype))


def _pick(logits_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]


def _in_chunks(
    of_logits: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    hidden_BLD: jax.Array,
    head_DV: jax.Array,
    targets_BL: jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    head_DV = head_DV.astype(hidden_BLD.dtype)

    def one_chunk(hidden_BCD: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        with jax.named_scope("head"):
            logits_BCV = logits(hidden_BCD, head_DV)
            return of_logits(logits_BCV, targets_BC)

    first, second = _scan_chunks(one_chunk, (hidden_BLD, targets_BL), chunk)
    return first, second


def _scan_chunks(
    one_chunk: Callable[..., tuple[jax.Array, ...]], arrays: tuple[jax.Array, ...], chunk: int
) -> tuple[jax.Array, ...]:
    """`one_chunk(*arrays)` for `chunk` positions at a time, computed again in the backward pass.

    Args:
      one_chunk: takes (B, C, ...) and gives arrays (B, C).
      arrays: (B, L, ...).
      chunk: positions at a time; divides L. 0 takes all at once.
    """
    shape = arrays[0].shape[:2]
    if chunk == 0 or chunk >= shape[1]:
        return one_chunk(*arrays)
    _, results = jax.lax.scan(
        lambda _, xs: (None, jax.checkpoint(one_chunk, prevent_cse=False)(*xs)),
        None,
        tuple(_split(x, chunk) for x in arrays),
    )
    return tuple(_join(x, shape) for x in results)


def _split(x_BL: jax.Array, chunk: int) -> jax.Array:
    """(B, L, ...) -> (L / C, B, C, ...).

    Chunk i takes positions i, i + L / C, ...: each device of a split row keeps its own.
    """
    B, L, *rest = x_BL.shape
    chunk = min(chunk, L) or L
    return jnp.moveaxis(x_BL.reshape(B, chunk, L // chunk, *rest), 2, 0)


def _join(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes `_split`."""
    return jnp.moveaxis(x, 0, 2).reshape(shape)

"""Next-token cross-entropy that never holds all float32 logits.

Shapes: B batch, L length, C chunk of positions, D model, V vocab.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


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
            logits_BCV = jnp.matmul(hidden_BCD, head_DV, preferred_element_type=jnp.float32)
            return of_logits(logits_BCV, targets_BC)

    B, L, D = hidden_BLD.shape
    if chunk == 0 or chunk >= L:
        return one_chunk(hidden_BLD, targets_BL)
    chunks = L // chunk
    # Chunk i takes positions i, i + chunks, ...: each device of a split row keeps its own.
    _, (first, second) = jax.lax.scan(
        lambda _, xs: (None, jax.checkpoint(one_chunk, prevent_cse=False)(*xs)),
        None,
        (
            jnp.moveaxis(hidden_BLD.reshape(B, chunk, chunks, D), 2, 0),
            jnp.moveaxis(targets_BL.reshape(B, chunk, chunks), 2, 0),
        ),
    )
    return jnp.moveaxis(first, 0, 2).reshape(B, L), jnp.moveaxis(second, 0, 2).reshape(B, L)

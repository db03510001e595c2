"""Next-token cross-entropy that never holds all float32 logits.

Shapes: B batch, L length, C chunk of positions, D model, V vocab.
"""

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
    head_DV = head_DV.astype(hidden_BLD.dtype)

    def one_chunk(hidden_BCD: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BCV = jnp.matmul(hidden_BCD, head_DV, preferred_element_type=jnp.float32)
        log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        picked_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        return log_z_BC - picked_BC, log_z_BC

    B, L, D = hidden_BLD.shape
    if chunk == 0 or chunk >= L:
        return one_chunk(hidden_BLD, targets_BL)
    chunks = L // chunk
    _, (nll, log_z) = jax.lax.scan(
        lambda _, xs: (None, jax.checkpoint(one_chunk, prevent_cse=False)(*xs)),
        None,
        (
            hidden_BLD.reshape(B, chunks, chunk, D).swapaxes(0, 1),
            targets_BL.reshape(B, chunks, chunk).swapaxes(0, 1),
        ),
    )
    return nll.swapaxes(0, 1).reshape(B, L), log_z.swapaxes(0, 1).reshape(B, L)

"""The loss of a batch, in one pass or with updates inside the sequence.

Shapes: B batch, L length.
"""

from typing import Any

import jax
import jax.numpy as jnp

from tlm_jax.models import online
from tlm_jax.models.skeleton import Skeleton
from tlm_jax.ops.cross_entropy import token_losses, total_loss


def training_loss(
    skeleton: Skeleton,
    params: Any,
    batch: dict[str, jax.Array],
    tokens: jax.Array,
    *,
    chunk: int,
    z_loss: float,
) -> tuple[jax.Array, jax.Array]:
    """What training descends on, and the mean negative log-likelihood in it, in nats per token.

    The first is the second plus z_loss times the mean of log_z^2.

    Args:
      skeleton, params, batch, chunk: see `batch_losses`.
      tokens: what sums over tokens are divided by.
      z_loss: weight of log_z^2.
    """
    if updates_online(skeleton, training=True):
        nll_BL, log_z_BL, _ = batch_losses(skeleton, params, batch, chunk=chunk, training=True)
        nll = jnp.sum(nll_BL) / tokens
        return nll + z_loss * jnp.sum(jnp.square(log_z_BL)) / tokens, nll
    model = skeleton.merge(params)
    hidden_BLD, _ = model(
        batch["inputs"], positions_BL=batch["positions"], document_ids_BL=batch["document_ids"]
    )
    weights_BL = (batch["document_ids"] > 0) / tokens
    return total_loss(hidden_BLD, model.head_DV, batch["targets"], weights_BL, chunk, z_loss)


def updates_online(skeleton: Skeleton, *, training: bool) -> bool:
    """Whether rows update the model's MLP levels while it reads them."""
    mlp = skeleton.config.mlp
    return bool(mlp.online_chunks) and (mlp.online_in_training or not training)


def batch_losses(
    skeleton: Skeleton,
    params: Any,
    batch: dict[str, jax.Array],
    *,
    chunk: int,
    training: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs the model on a batch and scores its targets.

    A model with `mlp.online_chunks` updates its MLP levels inside the rows (see
    `models.online`), in training only with `mlp.online_in_training`.

    Args:
      skeleton: the model's structure.
      params: its parameters.
      batch: int32 (B, L) arrays `inputs`, `targets`, `positions` and `document_ids`;
        document id 0 is padding, which is not scored.
      chunk: see `cross_entropy.token_losses`.
      training: whether the losses are there to be differentiated.

    Returns:
      nll_BL and log_z_BL, float32, zero at padding, and scored_BL, bool.
    """
    if updates_online(skeleton, training=training):
        return online.online_losses(skeleton, params, batch, chunk=chunk)
    model = skeleton.merge(params)
    hidden_BLD, _ = model(
        batch["inputs"], positions_BL=batch["positions"], document_ids_BL=batch["document_ids"]
    )
    nll_BL, log_z_BL = token_losses(hidden_BLD, model.head_DV, batch["targets"], chunk=chunk)
    scored_BL = batch["document_ids"] > 0
    return jnp.where(scored_BL, nll_BL, 0.0), jnp.where(scored_BL, log_z_BL, 0.0), scored_BL

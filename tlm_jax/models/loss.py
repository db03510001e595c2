"""The loss of a batch, in one pass or with updates inside the sequence.

Shapes: B batch, L length.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from tlm_jax.models import online
from tlm_jax.models.skeleton import Skeleton
from tlm_jax.ops.cross_entropy import distillation_losses, token_losses, total_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """A model whose distributions another one learns."""

    skeleton: Skeleton
    params: Any
    weight: float
    """Share of the divergence from it in what training descends on."""


def final_hidden(
    skeleton: Skeleton, params: Any, batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The hidden states of a batch after the final norm (B, L, D), and the output matrix (D, V)."""
    model = skeleton.merge(params)
    hidden_BLD, _ = model(
        batch["inputs"], positions_BL=batch["positions"], document_ids_BL=batch["document_ids"]
    )
    return hidden_BLD, model.head_DV


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
    hidden_BLD, head_DV = final_hidden(skeleton, params, batch)
    weights_BL = (batch["document_ids"] > 0) / tokens
    return total_loss(hidden_BLD, head_DV, batch["targets"], weights_BL, chunk, z_loss)


def distillation_loss(
    skeleton: Skeleton,
    params: Any,
    batch: dict[str, jax.Array],
    tokens: jax.Array,
    teacher: Teacher,
    *,
    chunk: int,
    z_loss: float,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """What training descends on with a teacher; the two means in it, in nats per token.

    The first is weight * KL(teacher || model) + (1 - weight) * negative log-likelihood, plus z_loss
    times the mean of log_z^2; then the negative log-likelihood and the divergence. Temperature 1
    (arXiv 2407.14679 heals pruned models so).

    Args: see `training_loss`. Rows update no MLP levels here, in model and teacher.
    """
    with jax.named_scope("teacher"):
        teacher_BLE, teacher_head_EV = final_hidden(teacher.skeleton, teacher.params, batch)
    hidden_BLD, head_DV = final_hidden(skeleton, params, batch)
    losses = distillation_losses(
        hidden_BLD, head_DV, batch["targets"], teacher_BLE, teacher_head_EV, chunk=chunk
    )
    weights_BL = (batch["document_ids"] > 0) / tokens
    nll_BL, log_z_BL, divergence_BL = losses
    nll, divergence = jnp.sum(weights_BL * nll_BL), jnp.sum(weights_BL * divergence_BL)
    total = teacher.weight * divergence + (1.0 - teacher.weight) * nll
    total += z_loss * jnp.sum(weights_BL * jnp.square(log_z_BL))
    return total, (nll, divergence)


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
    hidden_BLD, head_DV = final_hidden(skeleton, params, batch)
    nll_BL, log_z_BL = token_losses(hidden_BLD, head_DV, batch["targets"], chunk=chunk)
    scored_BL = batch["document_ids"] > 0
    return jnp.where(scored_BL, nll_BL, 0.0), jnp.where(scored_BL, log_z_BL, 0.0), scored_BL

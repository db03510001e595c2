"""Gated Attention (arXiv 2505.06708, variant G1).

Shapes: B batch, L length, D model, H query heads, K head dim.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from tlm_jax import ops
from tlm_jax.mixers import GatedAttentionConfig
from tlm_jax.models import registry
from tlm_jax.models.decoder import Attention, weight


class GatedAttention(Attention):
    """Attention with sigmoid(x W_gate) on its heads' outputs (arXiv 2505.06708, G1).

    The gate is made from the same normalised input as the queries and depends on
    the query's token only; queries' norm and rotation do not touch it.
    """

    def __init__(
        self, config: GatedAttentionConfig, context: registry.LayerContext, *, rngs: nnx.Rngs
    ):
        super().__init__(config, context, rngs=rngs)
        H, _, K = config.heads(context.d_model)
        values = K if config.gate == "elementwise" else 1
        self.gate = weight(
            rngs,
            (context.d_model, H, values),
            ("embed", "heads", None),
            fan_in=context.d_model,
            std=context.std,
        )

    def gate_heads(self, x_BLD: jax.Array, y_BLHK: jax.Array) -> jax.Array:
        """y * sigmoid(x W_gate), the sigmoid in float32."""
        gate = jax.nn.sigmoid(ops.dense(x_BLD, self.gate[...]).astype(jnp.float32))
        return (y_BLHK * gate).astype(y_BLHK.dtype)


registry.register(GatedAttentionConfig, GatedAttention)

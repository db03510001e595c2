"""Multi-head and grouped-query softmax attention.

Shapes: B batch, L queries, S keys, D model, H query heads, N key/value heads,
G query heads per key/value head (H = N*G), K head dim.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx

from tlm_jax.distributed.sharding import sequence_shards
from tlm_jax.mixers import AttentionConfig, GatedAttentionConfig
from tlm_jax.models import kernels, registry
from tlm_jax.models.layers import RMSNorm, dense, rotary, weight
from tlm_jax.validation import require


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of the tokens seen so far, for decoding."""

    k_BSNK: jax.Array
    v_BSNK: jax.Array
    segment_ids_BS: jax.Array
    """int32; 0 marks rows not written yet and padding."""
    length: jax.Array
    """int32 scalar: rows written."""

    @classmethod
    def empty(
        cls, batch: int, length: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype
    ) -> Self:
        kv = jnp.zeros((batch, length, num_kv_heads, head_dim), dtype)
        segment_ids = jnp.zeros((batch, length), jnp.int32)
        return cls(k_BSNK=kv, v_BSNK=kv, segment_ids_BS=segment_ids, length=jnp.int32(0))

    def append(self, k_BLNK: jax.Array, v_BLNK: jax.Array, segment_ids_BL: jax.Array) -> Self:
        """Writes L more tokens; the caller keeps `length + L` within the cache.

        Tokens beyond it, which a compiled program cannot refuse, make its values NaN.

        Raises:
          ValueError: L alone is more than the cache holds.
        """
        size, new = self.k_BSNK.shape[1], k_BLNK.shape[1]
        require(new <= size, f"{new} tokens do not fit a cache of {size}; make a longer cache")
        v_BLNK = jnp.where(self.length + new <= size, v_BLNK, jnp.nan)
        write = jax.lax.dynamic_update_slice_in_dim
        return dataclasses.replace(
            self,
            k_BSNK=write(self.k_BSNK, k_BLNK.astype(self.k_BSNK.dtype), self.length, axis=1),
            v_BSNK=write(self.v_BSNK, v_BLNK.astype(self.v_BSNK.dtype), self.length, axis=1),
            segment_ids_BS=write(self.segment_ids_BS, segment_ids_BL, self.length, axis=1),
            length=self.length + new,
        )


class Attention(nnx.Module):
    """Causal self-attention within documents, with rotary positions and no biases."""

    def __init__(self, config: AttentionConfig, context: registry.LayerContext, *, rngs: nnx.Rngs):
        d_model, std = context.d_model, context.std
        H, N, K = config.heads(d_model)
        self.config = config
        self.kernel = context.attention_kernel
        q_axes, kv_axes = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        self.query = weight(rngs, (d_model, H, K), q_axes, fan_in=d_model, std=std)
        self.key = weight(rngs, (d_model, N, K), kv_axes, fan_in=d_model, std=std)
        self.value = weight(rngs, (d_model, N, K), kv_axes, fan_in=d_model, std=std)
        self.out = weight(
            rngs,
            (H, K, d_model),
            ("heads", "head_dim", "embed"),
            fan_in=H * K,
            std=std,
            scale=context.out_scale,
        )
        self.query_norm = RMSNorm(K, context.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(K, context.norm_eps) if config.qk_norm else None

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> KVCache:
        """An empty cache for `batch` rows of at most `length` tokens."""
        _, N, K = self.key[...].shape[-3:]
        return KVCache.empty(batch, length, N, K, dtype)

    def gate_heads(self, x_BLD: jax.Array, y_BLHK: jax.Array) -> jax.Array:
        """What happens to the heads' outputs before the output projection: nothing."""
        del x_BLD
        return y_BLHK

    def __call__(
        self,
        x_BLD: jax.Array,
        positions_BL: jax.Array,
        segment_ids_BL: jax.Array,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Mixes tokens of equal segment id (see `branches`); segment id 0 is padding.

        With a cache the L new tokens follow those in it, and the cache that
        comes back holds them too.
        """
        q_BLHK = dense(x_BLD, self.query[...])
        k_BLNK = dense(x_BLD, self.key[...])
        v_BLNK = dense(x_BLD, self.value[...])
        if self.query_norm is not None and self.key_norm is not None:
            q_BLHK, k_BLNK = self.query_norm(q_BLHK), self.key_norm(k_BLNK)
        q_BLHK = rotary(q_BLHK, positions_BL, self.config.rope_theta)
        k_BLNK = rotary(k_BLNK, positions_BL, self.config.rope_theta)

        B, L, _, K = q_BLHK.shape
        if cache is None:
            kernel = kernels.choose(
                self.kernel,
                length=L // sequence_shards(),
                head_dim=K,
                backend=jax.default_backend(),
                dtype=q_BLHK.dtype.name,
            )
            y_BLHK = kernels.self_attention(q_BLHK, k_BLNK, v_BLNK, segment_ids_BL, kernel=kernel)
        else:
            query_index_L = jnp.arange(L) + cache.length
            cache = cache.append(k_BLNK, v_BLNK, segment_ids_BL)
            causal_LS = query_index_L[:, None] >= jnp.arange(cache.k_BSNK.shape[1])
            mask_BLS = causal_LS & kernels.sees(segment_ids_BL, cache.segment_ids_BS)
            y_BLHK = kernels.attend(q_BLHK, cache.k_BSNK, cache.v_BSNK, mask_BLS)
        y_BLHK = self.gate_heads(x_BLD, y_BLHK)

        out = self.out[...]
        return dense(y_BLHK.reshape(B, L, -1), out.reshape(-1, out.shape[-1])), cache


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
        gate = jax.nn.sigmoid(dense(x_BLD, self.gate[...]).astype(jnp.float32))
        return (y_BLHK * gate).astype(y_BLHK.dtype)


registry.register(AttentionConfig, Attention)
registry.register(GatedAttentionConfig, GatedAttention)

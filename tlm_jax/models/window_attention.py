"""Sliding-window attention with persistent tokens (Titans, arXiv 2501.00663, section 4).

Shapes: B batch, L length, P persistent tokens, S keys, I inputs, H heads, K head dim.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from tlm_jax import ops
from tlm_jax.mixers import TitansConfig
from tlm_jax.models.decoder import RMSNorm, weight
from tlm_jax.models.kv_cache import KVCache
from tlm_jax.models.registry import LayerContext


class WindowAttention(nnx.Module):
    """Softmax attention over a window of the document and the persistent tokens.

    Persistent tokens are learned inputs of the layer, seen by every token of every document.
    They have no position: their keys are not rotated. Queries and keys are RMS-normalised
    (the paper: l2-normalised; the learned scale is our choice).
    """

    def __init__(self, config: TitansConfig, context: LayerContext, inputs: int, *, rngs: nnx.Rngs):
        H, K = config.heads(context.d_model)
        self.config = config
        axes = ("embed", None, "heads", "head_dim")
        self.qkv = weight(rngs, (inputs, 3, H, K), axes, fan_in=inputs, std=context.std)
        shape = (config.num_persistent, inputs)
        self.persistent = (
            weight(rngs, shape, (None, "embed"), fan_in=inputs, std=context.std, decays=False)
            if config.num_persistent
            else None
        )
        self.query_norm = RMSNorm(K, context.norm_eps)
        self.key_norm = RMSNorm(K, context.norm_eps)

    def project(
        self, x_BLI: jax.Array, positions_BL: jax.Array, *, queries: bool = True
    ) -> list[jax.Array]:
        """q, k and v (B, L, H, K), or k and v alone."""
        w, theta = self.qkv[...], self.config.rope_theta
        y = ops.dense(x_BLI, w if queries else w[:, 1:])
        *q, k, v = (y[:, :, i] for i in range(y.shape[2]))
        q = [ops.rotary(self.query_norm(x), positions_BL, theta) for x in q]
        return [*q, ops.rotary(self.key_norm(k), positions_BL, theta), v]

    def persistent_kv(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values (P, H, K) of the persistent tokens, float32."""
        w_I2HK = self.qkv[...][:, 1:]
        if self.persistent is None:
            none = jnp.zeros((0, *w_I2HK.shape[2:]), jnp.float32)
            return none, none
        kv_P2HK = ops.dense(self.persistent[...], w_I2HK)
        return self.key_norm(kv_P2HK[:, 0]), kv_P2HK[:, 1]

    def attend(
        self,
        q_BLHK: jax.Array,
        k_BSHK: jax.Array,
        v_BSHK: jax.Array,
        mask_BLS: jax.Array,
        persistent: tuple[jax.Array, jax.Array],
    ) -> jax.Array:
        """Attention over the persistent tokens and the given keys -> (B, L, H, K)."""

        def prepend(p: jax.Array, x: jax.Array) -> jax.Array:
            p = jnp.broadcast_to(p, (x.shape[0], *p.shape)).astype(x.dtype)
            return jnp.concatenate([p, x], axis=1)

        k_BSHK, v_BSHK = (prepend(*x) for x in zip(persistent, (k_BSHK, v_BSHK), strict=True))
        P = self.config.num_persistent
        mask_BLS = jnp.pad(mask_BLS, ((0, 0), (0, 0), (P, 0)), constant_values=True)
        return ops.attend(q_BLHK, k_BSHK, v_BSHK, mask_BLS)

    def __call__(
        self,
        x_BLI: jax.Array,
        positions_BL: jax.Array,
        document_ids_BL: jax.Array,
        cache: KVCache | None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Each token sees the last `window` tokens of its document; returns (B, L, H, K)."""
        q, k, v = self.project(x_BLI, positions_BL)
        B, L, H, K = q.shape
        window = self.config.window
        index_L, ids_BL, ids_BS = jnp.arange(L), document_ids_BL, document_ids_BL
        index_S = index_L
        new = None if cache is None else cache.append(k, v, document_ids_BL)
        if cache is not None and new is not None and not cache.is_empty:
            index_L = index_L + cache.length
            k, v, ids_BS, index_S = new.last(window + L - 1)
        elif window < L:  # each block of `window` tokens sees itself and the block before
            index_L, index_S = window + jnp.arange(window), jnp.arange(2 * window)
            q, ids_BL = blocks(q, window), blocks(document_ids_BL, window)
            k, v = _with_block_before(k, window), _with_block_before(v, window)
            ids_BS = _with_block_before(document_ids_BL, window, before_first=-1)
        mask_BLS = ops.within(index_L, index_S, window) & (ids_BL[:, :, None] == ids_BS[:, None, :])
        y = self.attend(q, k, v, mask_BLS, self.persistent_kv())
        return y.reshape(B, -1, H, K)[:, :L], new


def blocks(x_BL: jax.Array, size: int) -> jax.Array:
    """(B, L, ...) -> (B * blocks, size, ...), filled up with zeros."""
    L = x_BL.shape[1]
    x_BL = jnp.pad(x_BL, ((0, 0), (0, -L % size)) + ((0, 0),) * (x_BL.ndim - 2))
    return x_BL.reshape(-1, size, *x_BL.shape[2:])


def _with_block_before(x_BL: jax.Array, size: int, before_first: int = 0) -> jax.Array:
    """(B, L, ...) -> (B * blocks, 2 size, ...): each block after the one before it."""
    B = x_BL.shape[0]
    own = blocks(x_BL, size)
    own = own.reshape(B, -1, *own.shape[1:])
    first = jnp.full_like(own[:, :1], before_first)
    pairs = jnp.concatenate([jnp.concatenate([first, own[:, :-1]], axis=1), own], axis=2)
    return pairs.reshape(-1, *pairs.shape[2:])

"""Gated DeltaNet (arXiv 2412.06464) from stock Flax layers."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from tlm_jax import MixerConfig, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaConfig(MixerConfig):
    num_heads: int = 2
    head_dim: int = 16


class GatedDelta(nnx.Module):
    """S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T, o_t = S_t q_t in each head."""

    def __init__(self, config, context, *, rngs):
        D, H, K = context.d_model, config.num_heads, config.head_dim
        small = nnx.initializers.variance_scaling(context.out_scale**2, "fan_in", "normal")

        def linear(inputs, outputs, axes=("embed", "heads"), **options):
            options |= {"kernel_metadata": {"logical_axes": axes}, "dtype": context.dtype}
            return nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs, **options)

        self.shape = H, K, K
        self.qkvg = nnx.List([linear(D, H * K) for _ in range(4)])
        self.decay, self.rate = linear(D, H), linear(D, H)
        self.norm = nnx.RMSNorm(K, rngs=rngs)
        self.out = linear(H * K, D, ("heads", "embed"), kernel_init=small)

    def init_cache(self, batch, length, dtype):
        return {"S": jnp.zeros((batch, *self.shape)), "document": jnp.zeros(batch, jnp.int32)}

    def __call__(self, x_BLD, positions_BL, document_ids_BL, cache=None):
        B, L, _ = x_BLD.shape
        start = self.init_cache(B, L, x_BLD.dtype) if cache is None else cache
        before_BL = jnp.concatenate([start["document"][:, None], document_ids_BL[:, :-1]], axis=1)
        a = jax.nn.sigmoid(self.decay(x_BLD) + 4) * (document_ids_BL == before_BL)[..., None]
        b = jax.nn.sigmoid(self.rate(x_BLD)) * (document_ids_BL > 0)[..., None]
        q, k, v, gate = (layer(x_BLD).reshape(B, L, *self.shape[:2]) for layer in self.qkvg)
        q, k = (u * jax.lax.rsqrt(jnp.sum(u * u, axis=-1, keepdims=True) + 1e-6) for u in (q, k))

        def step(S, token):  # S is (B, H, values, keys)
            q, k, v, a, b = token
            S = a[..., None, None] * S
            change = b[..., None] * (v - jnp.einsum("bhvk,bhk->bhv", S, k))
            S = S + jnp.einsum("bhv,bhk->bhvk", change, k)
            return S, jnp.einsum("bhvk,bhk->bhv", S, q)

        tokens = [jnp.moveaxis(u, 1, 0).astype(jnp.float32) for u in (q, k, v, a, b)]
        S, o = jax.lax.scan(step, start["S"], tokens)
        y = self.norm(jnp.moveaxis(o, 0, 1)) * jax.nn.silu(gate)
        return self.out(y.reshape(B, L, -1)), {"S": S, "document": document_ids_BL[:, -1]}


register(GatedDeltaConfig, GatedDelta)

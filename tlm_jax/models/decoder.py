"""The decoder-only language model, from a token to its logits (arXiv 2606.23670, section 3).

    x = embedding[tokens]
    for each layer:  x = x + mixer(norm(x));  x = x + mlp(norm(x))
    logits = norm(x) @ head

Layers differ in width: `ModelConfig.layers` lists them, `Stack` runs them. Mixers other than
attention register themselves (`registry`). How a product or attention is computed on some
hardware is the business of `tlm_jax.ops`.

Shapes: B batch, L length (queries), S keys, D model, F MLP, H query heads, N key/value heads,
K head dim, V vocab. Parameters are float32 and carry `logical_axes`, one name per dim, which
`distributed.sharding` maps to mesh axes; products run in the dtype of their input.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tlm_jax import ops
from tlm_jax.config import LayerSpec, ModelConfig
from tlm_jax.distributed.sharding import constrain
from tlm_jax.mixers import AttentionConfig
from tlm_jax.mlp import MLPConfig
from tlm_jax.models import registry
from tlm_jax.models.kv_cache import KVCache, known_empty
from tlm_jax.models.settings import compute_dtype, scans_layers
from tlm_jax.stack import Stack


def weight(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    logical_axes: tuple[str | None, ...],
    *,
    fan_in: int,
    std: float | None,
    scale: float = 1.0,
    decays: bool = True,
) -> nnx.Param:
    """A float32 normal matrix of standard deviation `scale * (std or 1/sqrt(fan_in))`.

    One rule for every layer, whatever its width (our choice; the paper is silent). `decays`
    says whether weight decay acts on it; see `Skeleton.decays`.
    """
    deviation = scale * (1.0 / math.sqrt(fan_in) if std is None else std)
    value = deviation * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, logical_axes=logical_axes, decays=decays)


def bias(shape: tuple[int, ...], logical_axes: tuple[str | None, ...]) -> nnx.Param:
    """Zeros, float32, on which weight decay does not act; one named dim, or it is a matrix."""
    return nnx.Param(jnp.zeros(shape, jnp.float32), logical_axes=logical_axes, decays=False)


def _plus(x: jax.Array, added: nnx.Param | None) -> jax.Array:
    """x, and a bias if there is one, in the dtype of x."""
    return x if added is None else x + added[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last dim, in float32."""

    def __init__(self, dim: int, eps: float, axis_name: str | None = None):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32), logical_axes=(axis_name,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x_f32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + self.eps)
        return (x_f32 * inverse * self.scale[...]).astype(x.dtype)


def rms_norm(dim: int, eps: float, *, rngs: nnx.Rngs) -> RMSNorm:
    """The norm of the stream that `model.norm="rms"` means."""
    del rngs
    return RMSNorm(dim, eps, "norm")


registry.register_norm("rms", rms_norm)


def normed(norm: Any, x: jax.Array) -> jax.Array:
    """norm(x) in the dtype of x; a stock Flax norm gives float32, that of its parameters."""
    return norm(x).astype(x.dtype)


class MLP(nnx.Module):
    """x + SwiGLU(norm(x)), SwiGLU(h) = (silu(h W_gate) * (h W_up)) W_down (arXiv 2002.05202)."""

    def __init__(
        self, config: MLPConfig, width: int, context: registry.LayerContext, *, rngs: nnx.Rngs
    ):
        del config
        D, std = context.d_model, context.std
        inner, outer = ("embed", "mlp"), ("mlp", "embed")
        self.in_scan = context.in_scan
        self.norm = registry.make_norm(context.norm, D, context.norm_eps, rngs=rngs)
        self.gate = weight(rngs, (D, width), inner, fan_in=D, std=std)
        self.up = weight(rngs, (D, width), inner, fan_in=D, std=std)
        self.down = weight(rngs, (width, D), outer, fan_in=width, std=std, scale=context.out_scale)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        return x_BLD + self.branch(x_BLD)

    def branch(self, x_BLD: jax.Array) -> jax.Array:
        """SwiGLU(norm(x)), what the MLP adds to the stream."""
        gate_DF, up_DF, down_FD = self.gate[...], self.up[...], self.down[...]
        return ops.swiglu(normed(self.norm, x_BLD), gate_DF, up_DF, down_FD, in_scan=self.in_scan)


registry.register(MLPConfig, MLP)


class CustomMLP(nnx.Module):
    """x + mlp(norm(x)) for an MLP that somebody registered."""

    def __init__(
        self, config: MLPConfig, width: int, context: registry.LayerContext, *, rngs: nnx.Rngs
    ):
        self.norm = registry.make_norm(context.norm, context.d_model, context.norm_eps, rngs=rngs)
        self.mlp = registry.make_mlp(config, width, context, rngs=rngs)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        return x_BLD + self.branch(x_BLD)

    def branch(self, x_BLD: jax.Array) -> jax.Array:
        """mlp(norm(x)), what the MLP adds to the stream."""
        return self.mlp(normed(self.norm, x_BLD)).astype(x_BLD.dtype)


class Attention(nnx.Module):
    """Causal self-attention within documents."""

    def __init__(self, config: AttentionConfig, context: registry.LayerContext, *, rngs: nnx.Rngs):
        D, std = context.d_model, context.std
        H, N, K = config.heads(D)
        self.config = config
        self.kernel = context.attention_kernel
        q_axes, kv_axes = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        out_axes, scale = ("heads", "head_dim", "embed"), context.out_scale
        self.query = weight(rngs, (D, H, K), q_axes, fan_in=D, std=std)
        self.key = weight(rngs, (D, N, K), kv_axes, fan_in=D, std=std)
        self.value = weight(rngs, (D, N, K), kv_axes, fan_in=D, std=std)
        self.out = weight(rngs, (H, K, D), out_axes, fan_in=H * K, std=std, scale=scale)
        qkv = config.bias != "none"
        self.query_bias = bias((H, K), ("heads", None)) if qkv else None
        self.key_bias = bias((N, K), ("kv_heads", None)) if qkv else None
        self.value_bias = bias((N, K), ("kv_heads", None)) if qkv else None
        self.out_bias = bias((D,), (None,)) if config.bias == "all" else None
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
        document_ids_BL: jax.Array,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Mixes tokens of equal document id (see `branches`); document id 0 is padding.

        With a cache the L new tokens follow those in it, and the cache that comes back holds
        them too.
        """
        config = self.config
        q_BLHK = _plus(ops.dense(x_BLD, self.query[...]), self.query_bias)
        k_BLNK = _plus(ops.dense(x_BLD, self.key[...]), self.key_bias)
        v_BLNK = _plus(ops.dense(x_BLD, self.value[...]), self.value_bias)
        if self.query_norm is not None and self.key_norm is not None:
            q_BLHK, k_BLNK = self.query_norm(q_BLHK), self.key_norm(k_BLNK)
        if config.rope_theta is not None:
            rope = config.rope_theta, config.rope_scaling
            q_BLHK = ops.rotary(q_BLHK, positions_BL, *rope)
            k_BLNK = ops.rotary(k_BLNK, positions_BL, *rope)

        B, L, _, _ = q_BLHK.shape
        new = None if cache is None else cache.append(k_BLNK, v_BLNK, document_ids_BL)
        if cache is None or new is None or cache.is_empty:
            y_BLHK = ops.self_attention(
                q_BLHK, k_BLNK, v_BLNK, document_ids_BL, window=config.window, kernel=self.kernel
            )
        else:
            y_BLHK = self._attend_cache(q_BLHK, document_ids_BL, cache.length, new)
        y_BLHK = self.gate_heads(x_BLD, y_BLHK)
        out_HKD = self.out[...]
        out = out_HKD.reshape(-1, out_HKD.shape[-1])
        return _plus(ops.dense(y_BLHK.reshape(B, L, -1), out), self.out_bias), new

    def _attend_cache(
        self, q_BLHK: jax.Array, document_ids_BL: jax.Array, before: jax.Array, cache: KVCache
    ) -> jax.Array:
        """Attention of the last L tokens of a cache, `before` of which were in it already."""
        L, S = q_BLHK.shape[1], cache.document_ids_BS.shape[1]
        window = self.config.window
        query_index_L = jnp.arange(L) + before
        if window is None or window + L - 1 >= S:
            index_S, ids_BS = jnp.arange(S), cache.document_ids_BS
        else:
            k_BSNK, v_BSNK, ids_BS, index_S = cache.last(window + L - 1)
        mask_BLS = ops.within(query_index_L, index_S, window) & ops.sees(document_ids_BL, ids_BS)
        if len(index_S) == S:
            return ops.attend_cache(q_BLHK, cache.k_BNSK, cache.v_BNSK, mask_BLS, cache.length)
        return ops.attend(q_BLHK, k_BSNK, v_BSNK, mask_BLS)


registry.register(AttentionConfig, Attention)


class Block(nnx.Module):
    """One layer: z = x + mixer(norm(x)), y = z + mlp(norm(z)).

    The MLP may be a chain of several levels, each with its own norm and residual.
    """

    def __init__(self, config: ModelConfig, spec: LayerSpec, *, rngs: nnx.Rngs):
        context = registry.LayerContext(
            d_model=config.d_model,
            norm_eps=config.norm_eps,
            std=config.init_std,
            out_scale=1.0 / math.sqrt(config.num_layers * (1 + len(spec.mlp_widths))),
            attention_kernel=config.attention_kernel,
            in_scan=scans_layers(config),
            norm=config.norm,
            dtype=compute_dtype(config),
        )
        self.mixer_norm = registry.make_norm(
            config.norm, config.d_model, config.norm_eps, rngs=rngs
        )
        self.mixer = registry.make_mixer(spec.mixer, context, rngs=rngs)
        make = MLP if type(config.mlp) is MLPConfig else CustomMLP
        self.mlp = nnx.Dict(
            {
                str(level): make(config.mlp, width, context, rngs=rngs)
                for level, width in enumerate(spec.mlp_widths)
            }
        )

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> Any:
        """The mixer's decoding state for `batch` rows of at most `length` tokens."""
        return self.mixer.init_cache(batch, length, dtype)

    def __call__(
        self, x_BLD: jax.Array, positions_BL: jax.Array, document_ids_BL: jax.Array
    ) -> jax.Array:
        """The residual stream after the layer."""
        return self.decode(x_BLD, None, positions_BL, document_ids_BL)[0]

    def decode(
        self, x_BLD: jax.Array, cache: Any, positions_BL: jax.Array, document_ids_BL: jax.Array
    ) -> tuple[jax.Array, Any]:
        """The same for tokens that follow those in a cache, and the mixer's new cache."""
        x_BLD = constrain(x_BLD, "batch", "sequence", None)
        x_BLD, cache = self.mix(x_BLD, cache, positions_BL, document_ids_BL)
        with jax.named_scope("mlp"):
            for level in self.mlp.values():
                x_BLD = level(x_BLD)
        return x_BLD, cache

    def mix(
        self, x_BLD: jax.Array, cache: Any, positions_BL: jax.Array, document_ids_BL: jax.Array
    ) -> tuple[jax.Array, Any]:
        """z = x + mixer(norm(x)), the stream that the MLP reads, and the mixer's new cache."""
        with jax.named_scope("mixer"):
            h_BLD = normed(self.mixer_norm, x_BLD)
            y_BLD, cache = self.mixer(h_BLD, positions_BL, document_ids_BL, cache)
            return x_BLD + y_BLD.astype(x_BLD.dtype), cache  # a stock Flax layer may give float32


class LanguageModel(nnx.Module):
    """Embedding, a stack of blocks over a residual stream of constant width, norm, head."""

    def __init__(self, config: ModelConfig, *, key: jax.Array):
        D, V, std = config.d_model, config.vocab_size, config.init_std
        self.config = config
        embed_key, head_key, layers_key = jax.random.split(key, 3)
        rngs = nnx.Rngs(params=embed_key)
        self.embedding = weight(rngs, (V, D), ("vocab", "embed"), fan_in=D, std=std)
        self.segments = Stack(
            config.layers,
            functools.partial(Block, config),
            key=layers_key,
            remat=config.remat,
            scan=scans_layers(config),
        )
        rngs = nnx.Rngs(params=head_key)
        self.final_norm = registry.make_norm(config.norm, D, config.norm_eps, rngs=rngs)
        tied = config.tie_embeddings
        self.head = None if tied else weight(rngs, (D, V), ("embed", "vocab"), fan_in=D, std=std)

    @property
    def head_DV(self) -> jax.Array:
        """The output matrix, float32."""
        return self.embedding[...].T if self.head is None else self.head[...]

    def __call__(
        self,
        tokens_BL: jax.Array,
        *,
        positions_BL: jax.Array | None = None,
        document_ids_BL: jax.Array | None = None,
        cache: list[Any] | None = None,
        prefill: bool = False,
    ) -> tuple[jax.Array, list[Any] | None]:
        """Hidden states after the final norm; multiply by `head_DV` for logits.

        Args:
          tokens_BL: int32 token ids.
          positions_BL: int32 positions within documents; None counts from 0.
          document_ids_BL: int32 document of each token: tokens see only their own document, 0 is
            padding; None is one document per row.
          cache: from `init_cache`, to continue the tokens in it.
          prefill: the cache is empty; attention then runs as in training, by the same kernel.

        Returns:
          hidden_BLD in the compute dtype, and the new cache (None without one).
        """
        if positions_BL is None:
            positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
        if document_ids_BL is None:
            document_ids_BL = jnp.ones_like(tokens_BL)
        with jax.named_scope("embedding"):
            # Where the table lies, then where layers want it: one all-to-all. Were the tokens not
            # constrained too, a mesh of several axes would make a detour over whole embeddings.
            tokens_BL = constrain(tokens_BL, "looked_up", "sequence")
            x_BLD = self.embedding[...][tokens_BL].astype(compute_dtype(self.config))
            x_BLD = constrain(x_BLD, "looked_up", "sequence", "embed")
            x_BLD = constrain(x_BLD, "batch", "sequence", None)
        if cache is None:
            x_BLD = self.segments(x_BLD, positions_BL, document_ids_BL)
        else:
            before = known_empty(cache) if prefill else cache
            x_BLD, cache = self.segments.decode(
                x_BLD, before, positions_BL, document_ids_BL, in_loops=prefill
            )
        x_BLD = constrain(x_BLD, "batch", "sequence", None)
        return normed(self.final_norm, x_BLD), cache

    def logits(self, hidden_BLD: jax.Array) -> jax.Array:
        """float32 logits (B, L, V); for long sequences use `models.loss` instead."""
        return ops.logits(hidden_BLD, self.head_DV)

    def init_cache(self, batch: int, length: int) -> list[Any]:
        """Empty decoding state of every layer."""
        return self.segments.init_cache(batch, length, compute_dtype(self.config))

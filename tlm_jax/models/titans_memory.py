"""A neural memory as a layer: its inputs, learning rates and readout.

Shapes: B batch, L length, D model, H heads, K head dim, G gates, W convolution width.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from tlm_jax import ops
from tlm_jax.mixers import TitansConfig
from tlm_jax.models.decoder import weight
from tlm_jax.models.memory_gates import Gates
from tlm_jax.models.memory_state import MemoryState, Weights
from tlm_jax.models.neural_memory import neural_memory
from tlm_jax.models.registry import LayerContext
from tlm_jax.models.window_attention import blocks

ALPHA_BIAS, ETA_BIAS = -4.0, 2.0
"""Of the gates' logits: at the start alpha is about 0.02 and eta about 0.88 (our choice)."""
RATE = 0.3
"""Default of max_rate times chunk: bounds what the steps of a chunk of equal tokens add up to."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tail:
    """The last W - 1 tokens, which the convolutions of the next ones look back at."""

    qkv_BW3HK: jax.Array
    """Projections before the convolution."""
    document_ids_BW: jax.Array

    @classmethod
    def empty(cls, batch: int, width: int, channels: tuple[int, ...], dtype: jnp.dtype) -> Self:
        return cls(
            qkv_BW3HK=jnp.zeros((batch, width - 1, *channels), dtype),
            document_ids_BW=jnp.zeros((batch, width - 1), jnp.int32),
        )


def short_conv(
    x_BL3HK: jax.Array, filters_W3HK: jax.Array, document_ids_BL: jax.Array, tail: Tail | None
) -> tuple[jax.Array, Tail]:
    """Depthwise causal convolution within documents: y_t = sum_w filter_w x_{t-w}.

    Args:
      x_BL3HK: the channels; the third dim may hold any number of projections.
      filters_W3HK: filter 0 weighs the token itself.
      document_ids_BL: int32 documents; a token sees only its own.
      tail: what went before, or None.

    Returns:
      y_BL3HK in the dtype of x, and the new tail.
    """
    B, L, *channels = x_BL3HK.shape
    W = filters_W3HK.shape[0]
    if tail is None:
        tail = Tail.empty(B, W, tuple(channels), x_BL3HK.dtype)
    x = jnp.concatenate([tail.qkv_BW3HK.astype(x_BL3HK.dtype), x_BL3HK], axis=1)
    ids = jnp.concatenate([tail.document_ids_BW, document_ids_BL], axis=1)
    filters = filters_W3HK.astype(x.dtype)
    y = filters[0] * x_BL3HK
    for back in range(1, W):
        place = slice(W - 1 - back, W - 1 - back + L)
        same_BL = ids[:, place] == document_ids_BL
        y = y + filters[back] * jnp.where(same_BL[..., None, None, None], x[:, place], 0)
    return y, Tail(qkv_BW3HK=x[:, L:], document_ids_BW=ids[:, L:])


class Learner(nnx.Module):
    """What the heads' memories begin with, and the gates of their learning.

    Gates, float32, one per head from the token: alpha = sigmoid(a), eta = sigmoid(e) and
    theta = max_rate (1 - eta) sigmoid(r), so that what a token's steps add up to is bounded
    whatever the momentum (bounds and biases are our choice). M_0 is learned.

    With `local` it is one of TNT's local memories: it starts over in every shard, and its queries
    are projected. The global one beside it reads what earlier chunks have written.
    """

    def __init__(
        self, config: TitansConfig, context: LayerContext, *, rngs: nnx.Rngs, local: int | None
    ):
        D, std = context.d_model, context.std
        H, _ = config.heads(D)
        self.config = config
        self.chunk = config.chunk if local is None else local
        self.shard = None if local is None else config.shard
        biases = [0.0] + [ALPHA_BIAS] * config.forgetting + [ETA_BIAS] * config.momentum
        gates_axes = ("embed", None, "heads")
        self.gates = weight(rngs, (D, len(biases), H), gates_axes, fan_in=D, std=std)
        bias_GH = jnp.broadcast_to(jnp.array(biases, jnp.float32)[:, None], (len(biases), H))
        self.bias = nnx.Param(bias_GH, logical_axes=(None, "heads"), decays=False)
        self.initial = nnx.Dict(
            {
                str(layer): weight(
                    rngs,
                    (H, *shape),
                    ("heads", None, None),
                    fan_in=shape[0],
                    std=None,
                    decays=False,
                )
                for layer, shape in enumerate(config.memory_shapes(D))
            }
        )

    @property
    def start(self) -> Weights:
        """M_0."""
        return tuple(w[...] for w in self.initial.values())

    @property
    def projects(self) -> bool:
        """Whether queries are projected."""
        return self.shard is not None and self.config.project_queries

    def init_state(self, batch: int) -> MemoryState:
        """An empty state; it does not depend on the parameters."""
        return MemoryState.start(
            self.start, batch, momentum=self.config.momentum, project=self.projects
        )

    def gate(self, x_BLD: jax.Array) -> Gates:
        """The gates of every token and head."""
        c = self.config
        logits_BLGH = ops.dense(x_BLD, self.gates[...]).astype(jnp.float32) + self.bias[...]
        log_keep = jax.nn.log_sigmoid(-logits_BLGH[:, :, 1]) if c.forgetting else None
        max_rate = RATE / self.chunk if c.max_rate is None else c.max_rate
        rate = max_rate * jax.nn.sigmoid(logits_BLGH[:, :, 0])
        log_momentum = None
        if c.momentum:
            log_momentum = jax.nn.log_sigmoid(logits_BLGH[:, :, -1])
            rate = rate * jax.nn.sigmoid(-logits_BLGH[:, :, -1])
        return Gates(log_keep_BLH=log_keep, log_momentum_BLH=log_momentum, rate_BLH=rate)

    def learn(
        self,
        q_BLHK: jax.Array,
        k_BLHK: jax.Array,
        v_BLHK: jax.Array,
        gates: Gates,
        document_ids_BL: jax.Array | None,
        state: MemoryState | None,
        *,
        aligned: bool = False,
    ) -> tuple[jax.Array, MemoryState | None]:
        """Writes and reads every token; see `neural_memory`."""
        c, shard = self.config, self.shard
        B, L = q_BLHK.shape[:2]

        def run(inputs: tuple, state: MemoryState | None) -> tuple[jax.Array, MemoryState | None]:
            q_BLHK, k_BLHK, v_BLHK, gates, document_ids_BL = inputs
            return neural_memory(
                self.start,
                q_BLHK,
                k_BLHK,
                v_BLHK,
                gates,
                chunk=self.chunk,
                document_ids_BL=document_ids_BL,
                state=state,
                aligned=aligned,
                reads="chunk_start" if c.local_chunks and shard is None else "now",
                project=self.projects,
                clip=c.gradient_clip,
                checkpoint_every=c.chunks_per_checkpoint,
                precision=c.precision,
            )

        inputs = (q_BLHK, k_BLHK, v_BLHK, gates, document_ids_BL)
        if shard is None:
            return run(inputs, state)
        if state is not None:  # one chunk after the other; a shard is a document of its own
            index_L = (state.length + jnp.arange(L)) // shard
            ids_BL = jnp.ones((B, L), jnp.int32) if document_ids_BL is None else document_ids_BL
            shards_BL = jnp.where(ids_BL > 0, ids_BL * _SHARDS + index_L % _SHARDS, 0)
            return run((*inputs[:-1], shards_BL), state)
        # All shards at once, as rows.
        y, _ = run(jax.tree.map(lambda x: blocks(x, min(shard, L)), inputs), None)
        return y.reshape(B, -1, *y.shape[2:])[:, :L], None


_SHARDS = 64
"""Shards after which their numbers repeat, so that an id of a document has room beside them."""


class Memory(Learner):
    """Projections and convolutions around the neural memory of each head.

    q, k, v = silu(conv(x W)), q and k l2-normalised (section 4.4 of the paper).
    """

    def __init__(self, config: TitansConfig, context: LayerContext, *, rngs: nnx.Rngs):
        D, std = context.d_model, context.std
        H, K = config.heads(D)
        axes = ("embed", None, "heads", "head_dim")
        self.qkv = weight(rngs, (D, 3, H, K), axes, fan_in=D, std=std)
        W = config.conv_width
        # Unit gain whatever init_std says: the convolution and M_0 are not projections of
        # the residual stream, and do not decay either (our choice).
        self.conv = (
            weight(
                rngs,
                (W, 3, H, K),
                (None, None, "heads", "head_dim"),
                fan_in=W,
                std=None,
                decays=False,
            )
            if W > 1
            else None
        )
        super().__init__(config, context, rngs=rngs, local=None)

    def init_tail(self, batch: int, dtype: jnp.dtype, num: int = 3) -> Tail:
        """Nothing before the first token."""
        return Tail.empty(batch, self.config.conv_width, (num, *self.qkv[...].shape[-2:]), dtype)

    def project(
        self, x_BLD: jax.Array, document_ids_BL: jax.Array, tail: Tail | None, first: int = 3
    ) -> tuple[list[jax.Array], Tail | None]:
        """The first of q, k and v (B, L, H, K) of the tokens, and the new tail."""
        filters = None if self.conv is None else self.conv[...][:, :first]

        # Cheap to compute again, and several times as large as the projections.
        @jax.checkpoint
        def after(y_BL3HK: jax.Array, filters: Any, tail: Any) -> Any:
            if filters is not None:
                y_BL3HK, tail = short_conv(y_BL3HK, filters, document_ids_BL, tail)
            y_BL3HK = jax.nn.silu(y_BL3HK)
            channels = (y_BL3HK[:, :, i] for i in range(first))
            return [_unit(y) if i < 2 else y for i, y in enumerate(channels)], tail

        return after(ops.dense(x_BLD, self.qkv[...][:, :first]), filters, tail)


def _unit(x: jax.Array) -> jax.Array:
    """x / |x| over the last dim, in float32."""
    x_f32 = x.astype(jnp.float32)
    squares = jnp.sum(jnp.square(x_f32), axis=-1, keepdims=True)
    return (x_f32 * jax.lax.rsqrt(squares + 1e-6)).astype(x.dtype)


class Output(nnx.Module):
    """Gate sigmoid(x W) over all heads, then the output projection (our reading of 4.4)."""

    def __init__(self, config: TitansConfig, context: LayerContext, *, rngs: nnx.Rngs):
        D, std = context.d_model, context.std
        H, K = config.heads(D)
        axes = ("embed", "heads", "head_dim")
        self.gate = weight(rngs, (D, H, K), axes, fan_in=D, std=std)
        shape, axes = (H, K, D), ("heads", "head_dim", "embed")
        self.out = weight(rngs, shape, axes, fan_in=H * K, std=std, scale=context.out_scale)

    def __call__(self, y_BLHK: jax.Array, x_BLD: jax.Array) -> jax.Array:
        y_BLHK = y_BLHK * jax.nn.sigmoid(ops.dense(x_BLD, self.gate[...]))
        out = self.out[...]
        return ops.dense(y_BLHK.reshape(*x_BLD.shape[:2], -1), out.reshape(-1, out.shape[-1]))

"""Titans, memory as context (MAC; arXiv 2501.00663, section 4.1).

Shapes: B batch, L length, D model, H heads, K head dim, N windows, C tokens of a window.

A row is cut into windows of `window` tokens, counted from its start. In each, in this order:

    h = M(q) at the weights that the window begins with         (retrieve)
    y = attention over [persistent | h | window]                (attend)
    M learns from y; m_t = M_t(q(y_t)) after each token's write  (write, read)
    o = norm(y) * sigmoid(norm(m))

Attention and the retrieved h_j are causal, and so is the last read: the paper's M_t after
the whole window would tell a token of the tokens after it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from tlm_jax import ops
from tlm_jax.mixers import TitansConfig
from tlm_jax.models.decoder import RMSNorm, weight
from tlm_jax.models.memory_state import MemoryState
from tlm_jax.models.neural_memory import recall
from tlm_jax.models.registry import LayerContext
from tlm_jax.models.titans_memory import Memory, Output, Tail
from tlm_jax.models.window_attention import WindowAttention, blocks
from tlm_jax.validation import round_up


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """What a layer computes of all its tokens before it goes through the windows."""

    ask_BLHK: jax.Array
    """The memory's query."""
    q_BLHK: jax.Array
    """Attention's query, key and value."""
    k_BLHK: jax.Array
    v_BLHK: jax.Array
    positions_BL: jax.Array
    document_ids_BL: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowKeys:
    """Keys and values of the tokens of the present window and of what they retrieved."""

    kv_BC4HK: jax.Array
    """Of each token: key and value of h, key and value of x."""
    document_ids_BC: jax.Array
    """int32; 0 where the window has no token yet."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextCache:
    """Decoding state of a layer."""

    memory: MemoryState
    retrieved: MemoryState
    """The memory as the present window found it."""
    ask_tail: Tail
    tail: Tail
    keys: WindowKeys
    offset: jax.Array
    """int32 scalar: tokens in the present window."""


class MemoryAsContext(nnx.Module):
    """Windows that attend to what the memory knew before them, then teach it."""

    def __init__(self, config: TitansConfig, context: LayerContext, *, rngs: nnx.Rngs):
        D, std = context.d_model, context.std
        H, K = config.heads(D)
        self.config = config
        self.memory = Memory(config, context, rngs=rngs)
        self.attention = WindowAttention(config, context, D, rngs=rngs)
        axes = ("heads", "head_dim", "embed")
        self.retrieved_out = weight(rngs, (H, K, D), axes, fan_in=H * K, std=std)
        self.attention_out = weight(rngs, (H, K, D), axes, fan_in=H * K, std=std)
        self.retrieved_norm = RMSNorm(K, context.norm_eps)
        self.attention_norm = RMSNorm(K, context.norm_eps)
        self.memory_norm = RMSNorm(K, context.norm_eps)
        self.output = Output(config, context, rngs=rngs)

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> ContextCache:
        """An empty cache for `batch` rows; its size does not depend on `length`."""
        H, K = self.memory.qkv[...].shape[-2:]
        C = self.config.window
        state = self.memory.init_state(batch)
        return ContextCache(
            memory=state,
            retrieved=state,
            ask_tail=self.memory.init_tail(batch, dtype, 1),
            tail=self.memory.init_tail(batch, dtype),
            keys=WindowKeys(
                kv_BC4HK=jnp.zeros((batch, C, 4, H, K), dtype),
                document_ids_BC=jnp.zeros((batch, C), jnp.int32),
            ),
            offset=jnp.int32(0),
        )

    def retrieve(self, tokens: Tokens, state: MemoryState) -> tuple[jax.Array, jax.Array]:
        """Keys and values of what the memory knew of the tokens before their window."""
        precision = self.config.precision
        h_BLHK = recall(
            self.memory.start, state, tokens.ask_BLHK, tokens.document_ids_BL, precision
        )
        h_BLD = _merge(self.retrieved_norm(h_BLHK), self.retrieved_out[...])
        k_BLHK, v_BLHK = self.attention.project(h_BLD, tokens.positions_BL, queries=False)
        return k_BLHK, v_BLHK

    def learn(
        self,
        a_BLHK: jax.Array,
        document_ids_BL: jax.Array,
        state: MemoryState,
        tail: Tail,
        *,
        aligned: bool,
    ) -> tuple[jax.Array, MemoryState, Tail]:
        """Teaches the memory what attention gave, and gates that by what it then says."""
        y_BLD = _merge(a_BLHK, self.attention_out[...])
        (q_BLHK, k_BLHK, v_BLHK), new_tail = self.memory.project(y_BLD, document_ids_BL, tail)
        gates = self.memory.gate(y_BLD)
        m_BLHK, new_state = self.memory.learn(
            q_BLHK, k_BLHK, v_BLHK, gates, document_ids_BL, state, aligned=aligned
        )
        assert new_state is not None
        assert new_tail is not None
        gate_BLHK = jax.nn.sigmoid(self.memory_norm(m_BLHK))
        return self.attention_norm(a_BLHK) * gate_BLHK, new_state, new_tail

    def __call__(
        self,
        x_BLD: jax.Array,
        positions_BL: jax.Array,
        document_ids_BL: jax.Array,
        cache: ContextCache | None = None,
    ) -> tuple[jax.Array, ContextCache | None]:
        """Mixes tokens of equal document id; document id 0 is padding.

        With a cache tokens go one by one.
        """
        ask_tail = None if cache is None else cache.ask_tail
        (ask_BLHK,), ask_tail = self.memory.project(x_BLD, document_ids_BL, ask_tail, first=1)
        q_BLHK, k_BLHK, v_BLHK = self.attention.project(x_BLD, positions_BL)
        tokens = Tokens(
            ask_BLHK=ask_BLHK,
            q_BLHK=q_BLHK,
            k_BLHK=k_BLHK,
            v_BLHK=v_BLHK,
            positions_BL=positions_BL,
            document_ids_BL=document_ids_BL,
        )
        if cache is None or ask_tail is None:
            return self.output(self.windows(tokens), x_BLD), None
        y_BLHK, cache = self.one_by_one(tokens, dataclasses.replace(cache, ask_tail=ask_tail))
        return self.output(y_BLHK, x_BLD), cache

    def one_by_one(self, tokens: Tokens, cache: ContextCache) -> tuple[jax.Array, ContextCache]:
        """Decoding: the next tokens of the present window and those after it."""
        tokens_LB1 = jax.tree.map(lambda a: a.swapaxes(0, 1)[:, :, None], tokens)
        cache, y_LB1HK = jax.lax.scan(self.one_token, cache, tokens_LB1)
        return y_LB1HK[:, :, 0].swapaxes(0, 1), cache

    def windows(self, tokens: Tokens) -> jax.Array:
        """All windows of a row, one after the other -> (B, L, H, K)."""
        B, L = tokens.positions_BL.shape
        C, chunk = self.config.window, self.config.chunk
        if L < C:  # one window, no longer than it need be
            C = round_up(L, chunk)
        causal_CC = jnp.arange(C)[:, None] >= jnp.arange(C)
        persistent = self.attention.persistent_kv()

        def split(x_BL: jax.Array) -> jax.Array:
            return blocks(x_BL, C).reshape(B, -1, C, *x_BL.shape[2:]).swapaxes(0, 1)

        def one(carry: tuple, window: Tokens) -> tuple[tuple, jax.Array]:
            state, tail = carry
            kh, vh = self.retrieve(window, state)
            keys = jnp.concatenate([kh, window.k_BLHK], axis=1)
            values = jnp.concatenate([vh, window.v_BLHK], axis=1)
            ids = window.document_ids_BL
            mask = jnp.tile(causal_CC & (ids[:, :, None] == ids[:, None, :]), (1, 1, 2))
            a_BCHK = self.attention.attend(window.q_BLHK, keys, values, mask, persistent)
            y_BCHK, state, tail = self.learn(a_BCHK, ids, state, tail, aligned=True)
            return (state, tail), y_BCHK

        start = (self.memory.init_state(B), self.memory.init_tail(B, tokens.q_BLHK.dtype))
        body = jax.checkpoint(one, prevent_cse=False)
        _, y_NBCHK = jax.lax.scan(body, start, jax.tree.map(split, tokens))
        y_BNCHK = y_NBCHK.swapaxes(0, 1)
        return y_BNCHK.reshape(B, -1, *y_BNCHK.shape[3:])[:, :L]

    def one_token(self, cache: ContextCache, token: Tokens) -> tuple[ContextCache, jax.Array]:
        """The next token of the present window -> (B, 1, H, K)."""
        keys, ids_B1, C = cache.keys, token.document_ids_BL, self.config.window
        write = jax.lax.dynamic_update_slice_in_dim
        kv = jnp.stack([*self.retrieve(token, cache.retrieved), token.k_BLHK, token.v_BLHK], axis=2)
        keys = WindowKeys(
            kv_BC4HK=write(keys.kv_BC4HK, kv.astype(keys.kv_BC4HK.dtype), cache.offset, axis=1),
            document_ids_BC=write(keys.document_ids_BC, ids_B1, cache.offset, axis=1),
        )
        kh, vh, k, v = (keys.kv_BC4HK[:, :, i] for i in range(4))
        seen_C = jnp.arange(C) <= cache.offset
        mask = jnp.tile(seen_C & (ids_B1[:, :, None] == keys.document_ids_BC[:, None]), (1, 1, 2))
        a_B1HK = self.attention.attend(
            token.q_BLHK,
            jnp.concatenate([kh, k], axis=1),
            jnp.concatenate([vh, v], axis=1),
            mask,
            self.attention.persistent_kv(),
        )
        y_B1HK, memory, tail = self.learn(a_B1HK, ids_B1, cache.memory, cache.tail, aligned=False)
        full = cache.offset + 1 == C
        retrieved = jax.tree.map(lambda a, b: jnp.where(full, a, b), memory, cache.retrieved)
        cache = dataclasses.replace(
            cache,
            memory=memory,
            retrieved=retrieved,
            tail=tail,
            keys=keys,
            offset=(cache.offset + 1) % C,
        )
        return cache, y_B1HK


def _merge(heads_BLHK: jax.Array, w_HKD: jax.Array) -> jax.Array:
    """Heads to the model's width."""
    flat = heads_BLHK.reshape(*heads_BLHK.shape[:2], -1)
    return ops.dense(flat, w_HKD.reshape(-1, w_HKD.shape[-1]))

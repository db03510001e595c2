"""Titans: a neural memory, alone or with windowed attention (arXiv 2501.00663, section 4).

Shapes: B batch, L length, D model, H heads, K head dim.

The paper leaves much open; what is our choice is said where it is made and listed in
docs/architectures.md.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from tlm_jax.mixers import TitansConfig
from tlm_jax.models import registry
from tlm_jax.models.decoder import RMSNorm
from tlm_jax.models.kv_cache import KVCache
from tlm_jax.models.memory_state import MemoryState
from tlm_jax.models.titans_context import MemoryAsContext
from tlm_jax.models.titans_memory import Learner, Memory, Output, Tail
from tlm_jax.models.window_attention import WindowAttention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TitansCache:
    """Decoding state of a layer (lmm, mag, mal)."""

    memory: MemoryState
    local: tuple[MemoryState, ...]
    tail: Tail
    kv: KVCache | None


class Titans(nnx.Module):
    """Memory alone (lmm), gating windowed attention (mag), or before it (mal).

    mag: out((attention(x) normed) * sigmoid(memory(x) normed)); the gate's non-linearity is a
    sigmoid on the memory's side (our choice: the paper names none). mal: attention reads the
    normed memory output, head by head concatenated. The memory itself gets no persistent
    tokens: they would only lead M_0, which is learned, to another constant state.

    With `local_chunks` memory(x) is a sum over several memories (TNT, arXiv 2511.07343): a global
    one with long chunks and local ones with short chunks, which start over in every shard, so that
    shards are computed side by side. All learn from the same keys and values.
    """

    def __init__(self, config: TitansConfig, context: registry.LayerContext, *, rngs: nnx.Rngs):
        H, K = config.heads(context.d_model)
        self.config = config
        self.memory = Memory(config, context, rngs=rngs)
        self.local = nnx.Dict(
            {
                str(index): Learner(config, context, rngs=rngs, local=chunk)
                for index, chunk in enumerate(config.local_chunks)
            }
        )
        self.memory_norm = RMSNorm(K, context.norm_eps)
        inputs = H * K if config.variant == "mal" else context.d_model
        self.attention = (
            WindowAttention(config, context, inputs, rngs=rngs) if config.attends else None
        )
        self.attention_norm = RMSNorm(K, context.norm_eps) if config.attends else None
        self.output = Output(config, context, rngs=rngs)

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> TitansCache:
        """An empty cache for `batch` rows of at most `length` tokens."""
        H, K = self.memory.qkv[...].shape[-2:]
        kv = KVCache.empty(batch, length, H, K, dtype) if self.config.attends else None
        tail = self.memory.init_tail(batch, dtype)
        local = tuple(learner.init_state(batch) for learner in self.local.values())
        return TitansCache(memory=self.memory.init_state(batch), local=local, tail=tail, kv=kv)

    def __call__(
        self,
        x_BLD: jax.Array,
        positions_BL: jax.Array,
        document_ids_BL: jax.Array,
        cache: TitansCache | None = None,
    ) -> tuple[jax.Array, TitansCache | None]:
        """Mixes tokens of equal document id; document id 0 is padding."""
        memory = self.memory
        state, tail, kv = (cache.memory, cache.tail, cache.kv) if cache else (None, None, None)
        (q_BLHK, k_BLHK, v_BLHK), tail = memory.project(x_BLD, document_ids_BL, tail)
        y_BLHK, state = memory.learn(
            q_BLHK, k_BLHK, v_BLHK, memory.gate(x_BLD), document_ids_BL, state
        )
        local = []
        for index, learner in enumerate(self.local.values()):
            more_BLHK, one = learner.learn(
                q_BLHK,
                k_BLHK,
                v_BLHK,
                learner.gate(x_BLD),
                document_ids_BL,
                cache.local[index] if cache else None,
            )
            y_BLHK = y_BLHK + more_BLHK
            local += [] if one is None else [one]
        y_BLHK = self.memory_norm(y_BLHK)
        if self.attention is not None and self.attention_norm is not None:
            mal = self.config.variant == "mal"
            inputs = y_BLHK.reshape(*x_BLD.shape[:2], -1) if mal else x_BLD
            a_BLHK, kv = self.attention(inputs, positions_BL, document_ids_BL, kv)
            a_BLHK = self.attention_norm(a_BLHK)
            y_BLHK = a_BLHK if mal else a_BLHK * jax.nn.sigmoid(y_BLHK)
        if state is not None and tail is not None:
            cache = TitansCache(memory=state, local=tuple(local), tail=tail, kv=kv)
        return self.output(y_BLHK, x_BLD), cache


def make_titans(
    config: TitansConfig, context: registry.LayerContext, *, rngs: nnx.Rngs
) -> nnx.Module:
    """The module of the config's variant."""
    if config.variant == "mac":
        return MemoryAsContext(config, context, rngs=rngs)
    return Titans(config, context, rngs=rngs)


registry.register(TitansConfig, make_titans)

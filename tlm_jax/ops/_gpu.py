"""Versions for NVIDIA GPUs.

Shapes: B batch, L length, H query heads, N key/value heads, K head dim, M documents of a row.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tlm_jax.ops import rows


def cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    document_ids_BL: jax.Array,
    *,
    otherwise: Callable[..., jax.Array],
) -> jax.Array:
    """cuDNN's flash attention, which takes the bounds of documents instead of a mask.

    What the rows hold decides how: those of a device, when the program runs, unless it was traced
    for one kind (`rows.of_kind`).

    - one document each: the plain causal kernel;
    - at most 32 (`rows.MOST_DOCUMENTS`): the packed one;
    - at most L / 16: the same with more places, its log-sums computed again instead of kept;
    - more: `otherwise`, many times slower.
    """
    begins_BL = rows.begins(document_ids_BL)
    few, *many = rows.limits(q.shape[1])[1:]
    kinds: list[Callable[..., jax.Array]] = [_causal, functools.partial(_packed, most=few)]
    kinds += [jax.checkpoint(functools.partial(_packed, most=number)) for number in many]
    kinds.append(jax.checkpoint(lambda q, k, v, _: otherwise(q, k, v)))
    chosen = rows.kind_of_program()
    if chosen is not None:
        return kinds[chosen](q, k, v, begins_BL)
    y: jax.Array = jax.lax.switch(rows.kind(document_ids_BL), kinds, q, k, v, begins_BL)
    return y


def _causal(q: jax.Array, k: jax.Array, v: jax.Array, begins_BL: jax.Array) -> jax.Array:
    del begins_BL
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _packed(
    q: jax.Array, k: jax.Array, v: jax.Array, begins_BL: jax.Array, *, most: int
) -> jax.Array:
    # No public function of JAX takes these yet; MaxText calls this one too.
    from jax._src.cudnn import fused_attention_stablehlo as fused

    offsets_BM1, lengths_BM = packed_bounds(begins_BL, most)
    return fused.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=lengths_BM,
        kv_seqlen=lengths_BM,
        q_offsets=offsets_BM1,
        kv_offsets=offsets_BM1,
        scale=q.shape[-1] ** -0.5,
        mask_type=fused.MaskType.PADDING_CAUSAL,
    )


def packed_bounds(begins_BL: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Where documents begin (B, M + 1) and how long they are (B, M), int32; -1 fills up.

    Args:
      begins_BL: true at the first token of each document.
      most: M, at least the number of documents in a row.
    """
    number_BL = jnp.cumsum(begins_BL, axis=1) - 1
    is_of_BML = number_BL[:, None] == jnp.arange(most)[:, None]
    lengths_BM = jnp.sum(is_of_BML, axis=2, dtype=jnp.int32)
    offsets_BM = jnp.cumsum(lengths_BM, axis=1) - lengths_BM
    offsets_BM, lengths_BM = (jnp.where(lengths_BM > 0, x, -1) for x in (offsets_BM, lengths_BM))
    return jnp.pad(offsets_BM, ((0, 0), (0, 1)), constant_values=-1), lengths_BM


def runs_cudnn(
    *, target: str, head_dim: int, dtype: str, parts: int = 1, window: int | None = None, **_: Any
) -> bool:
    """On GPUs with whole rows, in bfloat16 or float16, with the head dims that cuDNN takes.

    It has windows too, which have not been tried on a GPU here.
    """
    return (
        target == "gpu"
        and window is None
        and dtype != "float32"
        and head_dim % 8 == 0
        and head_dim <= 128
        and parts == 1
    )

"""Versions for NVIDIA GPUs.

Shapes: B batch, L length, H query heads, N key/value heads, K head dim, M documents of a row.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_MOST_DOCUMENTS = 32
"""Of a row in cuDNN's packed layout. The kernel's time grows with the places for documents that are
left empty, and log-sums take B M H L floats: 67 MB per layer for 8 rows of 4,096 tokens."""
_SHORTEST = 16
"""Mean tokens of a document in a row, below which cuDNN is left."""
_KINDS = jax.make_user_context(default_value=(0, None))
"""The kinds of attention, first and after last, that rows can need in the program being traced."""


def cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    document_ids_BL: jax.Array,
    *,
    otherwise: Callable[..., jax.Array],
) -> jax.Array:
    """cuDNN's flash attention, which takes the bounds of documents instead of a mask.

    What the rows of a device hold decides how, when the program runs:

    - one document each: the plain causal kernel;
    - at most 32 (`_MOST_DOCUMENTS`; runs of padding count too): the packed one;
    - at most L / 16: the same with more places, its log-sums computed again instead of kept;
    - more: `otherwise`, many times slower.
    """
    L = q.shape[1]
    begins_BL = begins(document_ids_BL)
    few, *many = _limits(L)[1:]
    kinds: list[Callable[..., jax.Array]] = [_causal, functools.partial(_packed, most=few)]
    kinds += [jax.checkpoint(functools.partial(_packed, most=number)) for number in many]
    kinds.append(jax.checkpoint(lambda q, k, v, _: otherwise(q, k, v)))
    first, end = _KINDS.value
    kinds = kinds[first:end]
    if len(kinds) == 1:
        return kinds[0](q, k, v, begins_BL)
    y: jax.Array = jax.lax.switch(_kind(begins_BL) - first, kinds, q, k, v, begins_BL)
    return y


def choose_once(function: Callable[[], Any], document_ids_BL: jax.Array) -> Any:
    """`function()`, where the kind of attention is chosen around it and not in each layer.

    The host waits for the device wherever a program chooses. The first two kinds get a copy of
    the function each, so that it is compiled three times; in the third copy each attention
    chooses among the rest. All devices of a mesh take the same copy.
    """
    copies = ((0, 1), (1, 2), (2, None))

    def copy(kinds: tuple[int, int | None]) -> Any:
        with _KINDS(kinds):
            return function()

    kind = jnp.minimum(_kind(begins(document_ids_BL)), len(copies) - 1)
    return jax.lax.switch(kind, [functools.partial(copy, kinds) for kinds in copies])


def _limits(length: int) -> list[int]:
    """The most documents of a row for each kind but the last."""
    few, many = min(_MOST_DOCUMENTS, length), length // _SHORTEST
    return [1, few, *([many] if many > few else [])]


def _kind(begins_BL: jax.Array) -> jax.Array:
    """int32 scalar: the kind that the row with the most documents needs."""
    most = jnp.max(jnp.sum(begins_BL, axis=1))
    return jnp.sum(most > jnp.asarray(_limits(begins_BL.shape[1])))


def begins(document_ids_BL: jax.Array) -> jax.Array:
    """(B, L) bool: a token whose predecessor is of another document, or that has none."""
    changes = document_ids_BL[:, 1:] != document_ids_BL[:, :-1]
    return jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)


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

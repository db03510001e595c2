"""Softmax attention; causal self-attention within documents by the kernel of the backend.

Shapes: B batch, L queries, S keys, H query heads, N key/value heads, G query heads per
key/value head (H = N*G), K head dim.

| kernel | where | what it is |
|---|---|---|
| splash | TPU | Pallas kernel of JAX that never writes the L x L scores |
| cudnn | GPU | cuDNN's flash attention, bfloat16 |
| xla | everywhere | plain products; blocks of queries leave out later keys |
| reference | everywhere | the definition, as the others are tested against it |
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tlm_jax.distributed.sharding import constrain, sequence_shards
from tlm_jax.ops import _gpu, _tpu
from tlm_jax.ops.backend import REFERENCE, Op, Version, everywhere, target
from tlm_jax.ops.masks import ATTENTION, causal_mask

_BLOCK_LENGTHS, _MOST_BLOCKS = (128, 512), 8
"""Queries of a block: a quarter of the row's, within these bounds unless there were more blocks.

More blocks leave out more keys; longer ones make larger products, until a CPU's cache is full.
"""


def self_attention(
    q_BLHK: jax.Array,
    k_BLNK: jax.Array,
    v_BLNK: jax.Array,
    document_ids_BL: jax.Array,
    *,
    kernel: str = "auto",
) -> jax.Array:
    """softmax(q k / sqrt(K)) v over the tokens before in the same document -> (B, L, H, K).

    Query head h reads key/value head h // (H / N). Scores and softmax are float32. On a mesh
    with a sequence axis the queries stay where they are and keys and values are gathered. Only
    xla and the reference know branches (see `branches`).

    Raises:
      ValueError: no such kernel, or one that cannot do these shapes.
    """
    _, L, _, K = q_BLHK.shape
    version = SELF_ATTENTION.choose(
        kernel,
        target=target(),
        length=L // sequence_shards(),
        head_dim=K,
        dtype=q_BLHK.dtype.name,
    )
    q_BLHK = constrain(q_BLHK, "batch", "sequence", "heads", None)
    k_BLNK, v_BLNK = (constrain(a, "batch", None, "kv_heads", None) for a in (k_BLNK, v_BLNK))
    return checkpoint_name(version.function(q_BLHK, k_BLNK, v_BLNK, document_ids_BL), ATTENTION)


def attend(
    q_BLHK: jax.Array,
    k_BSNK: jax.Array,
    v_BSNK: jax.Array,
    mask_BLS: jax.Array,
    *,
    causal: bool = False,
) -> jax.Array:
    """Softmax attention -> (B, L, H, K); scores and softmax in float32.

    Query head h reads key/value head h // G. `mask_BLS` is True where a query
    may look; a row without any True gives the mean of the values. `causal` promises
    that query t looks at keys 0..t only: then blocks of queries leave out later keys.
    """
    B, L, H, K = q_BLHK.shape
    N = k_BSNK.shape[2]
    # Heads outside, so that the products are plain ones: on a CPU several times as fast.
    q_BNGLK = (q_BLHK * K**-0.5).reshape(B, L, N, H // N, K).transpose(0, 2, 3, 1, 4)
    k_BNKS, v_BNSK = k_BSNK.transpose(0, 2, 3, 1), v_BSNK.transpose(0, 2, 1, 3)
    least, most = _BLOCK_LENGTHS
    in_blocks = causal and L % least == 0 and sequence_shards() == 1
    block = max(least, min(L // 4, most), L // _MOST_BLOCKS) if in_blocks else L
    blocks = []
    for begin in range(0, L, block):
        end = min(begin + block, L)
        keys = end if causal else k_BNKS.shape[-1]
        blocks.append(
            _attend_block(
                q_BNGLK[:, :, :, begin:end],
                k_BNKS[..., :keys],
                v_BNSK[:, :, :keys],
                mask_BLS[:, begin:end, :keys],
            )
        )
    y_BNGLK = jnp.concatenate(blocks, axis=3)
    return y_BNGLK.transpose(0, 3, 1, 2, 4).reshape(B, L, H, K)


def _attend_block(
    q_BNGLK: jax.Array, k_BNKS: jax.Array, v_BNSK: jax.Array, mask_BLS: jax.Array
) -> jax.Array:
    B, N, G, L, K = q_BNGLK.shape
    mask_BNML = jnp.broadcast_to(mask_BLS[:, None, None], (B, 1, G, *mask_BLS.shape[1:]))
    mask = mask_BNML.reshape(B, 1, G * L, -1)
    q_BNMK = q_BNGLK.reshape(B, N, G * L, K)
    return _softmax_attention(q_BNMK, k_BNKS, v_BNSK, mask).reshape(B, N, G, L, K)


@jax.custom_vjp
def _softmax_attention(
    q_BNMK: jax.Array, k_BNKS: jax.Array, v_BNSK: jax.Array, mask_B1MS: jax.Array
) -> jax.Array:
    """softmax(q k) v where the mask is True -> (B, N, M, K).

    Its own backward pass keeps one array of (M, S), exp(score - max), and divides by its sums
    where rows have K values and not S.
    """
    return _softmax_forward(q_BNMK, k_BNKS, v_BNSK, mask_B1MS)[0]


def _softmax_forward(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> Any:
    scores = jnp.matmul(q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    inverse = 1.0 / jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(v.dtype)
    y = (jnp.matmul(weights, v, preferred_element_type=jnp.float32) * inverse).astype(v.dtype)
    return y, (q, k, v, y, weights, inverse, highest > jnp.finfo(jnp.float32).min)


def _softmax_backward(residuals: Any, dy: jax.Array) -> Any:
    q, k, v, y, weights, inverse, sees_some = residuals
    dy_f32 = dy.astype(jnp.float32) * inverse
    dv = jnp.matmul(weights.swapaxes(-1, -2), dy_f32.astype(dy.dtype))
    # Where all is masked, the scores are constants.
    dy_f32 = jnp.where(sees_some, dy_f32, 0.0)
    along_y = jnp.sum(dy_f32 * y, axis=-1, keepdims=True)
    dweights = jnp.matmul(
        dy_f32.astype(dy.dtype), v.swapaxes(-1, -2), preferred_element_type=jnp.float32
    )
    dscores = (weights * (dweights - along_y)).astype(q.dtype)
    dq = jnp.matmul(dscores, k.swapaxes(-1, -2))
    dk = jnp.matmul(q.swapaxes(-1, -2), dscores)
    return dq, dk, dv, None


_softmax_attention.defvjp(_softmax_forward, _softmax_backward)


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, document_ids_BL: jax.Array) -> jax.Array:
    return attend(q, k, v, causal_mask(document_ids_BL), causal=True)


def _reference(q: jax.Array, k: jax.Array, v: jax.Array, document_ids_BL: jax.Array) -> jax.Array:
    B, L, H, K = q.shape
    q_BLNGK = q.reshape(B, L, k.shape[2], -1, K)
    scores = jnp.einsum("BLNGK,BSNK->BNGLS", q_BLNGK, k, preferred_element_type=jnp.float32)
    mask_BLL = causal_mask(document_ids_BL)[:, None, None]
    weights = jax.nn.softmax(jnp.where(mask_BLL, scores * K**-0.5, -jnp.inf), axis=-1)
    return jnp.einsum("BNGLS,BSNK->BLNGK", weights.astype(v.dtype), v).reshape(B, L, H, K)


SELF_ATTENTION = Op(
    name="attention",
    versions=(
        Version(name="splash", function=_tpu.splash, runs=_tpu.runs_splash),
        Version(name="cudnn", function=_gpu.cudnn, runs=_gpu.runs_cudnn),
        Version(name="xla", function=_xla, runs=everywhere),
        Version(name=REFERENCE, function=_reference, runs=everywhere),
    ),
)
"""Facts: `target`, `length` (tokens of a row on one device), `head_dim`, `dtype` (its name)."""

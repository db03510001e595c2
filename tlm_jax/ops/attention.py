"""Softmax attention; causal self-attention within documents by the kernel of the backend.

Shapes: B batch, L queries, S keys, H query heads, N key/value heads, G query heads per
key/value head (H = N*G), K head dim.

| kernel | where | what it is |
|---|---|---|
| splash | TPU | Pallas kernel of JAX |
| cudnn | GPU | cuDNN's flash attention, bfloat16 |
| chunked | everywhere | plain products, for some queries of a row at a time |
| xla | everywhere | plain products; blocks of queries leave out later keys |
| reference | everywhere | the definition, as the others are tested against it |

Only the last two hold an array of L x L.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tlm_jax.distributed.sharding import constrain, fitting_spec, sequence_shards
from tlm_jax.ops import _gpu, _tpu
from tlm_jax.ops.backend import REFERENCE, Op, Version, everywhere, target
from tlm_jax.ops.masks import ATTENTION, causal_mask, sees, within
from tlm_jax.ops.products import float32_product, product
from tlm_jax.validation import require

_BLOCK_LENGTHS, _MOST_BLOCKS = (128, 512), 8
"""Queries of a block: a quarter of the row's, within these bounds unless there were more blocks.

More blocks leave out more keys; longer ones make larger products, until a CPU's cache is full.
"""

_LEAST_READ, _MOST_READS = 128, 8
"""Slots of a cache between one length that is read and the next, and the number of such lengths."""
_CHUNK = 256
"""Queries of a chunk, whose scores over all keys exist at a time."""


def self_attention(
    q_BLHK: jax.Array,
    k_BLNK: jax.Array,
    v_BLNK: jax.Array,
    document_ids_BL: jax.Array,
    *,
    window: int | None = None,
    kernel: str = "auto",
) -> jax.Array:
    """softmax(q k / sqrt(K)) v over the tokens before in the same document -> (B, L, H, K).

    Of these tokens, with a window, the last `window` in the row, the query among them. Query head h
    reads key/value head h // (H / N). Scores and softmax are float32. On a mesh with a sequence
    axis the queries stay where they are and keys and values are gathered. splash and cudnn do not
    know branches (see `branches`), and cudnn no windows.

    Raises:
      ValueError: no such kernel, or one that cannot do these shapes.
    """
    _, L, _, K = q_BLHK.shape
    version = SELF_ATTENTION.choose(
        kernel,
        target=target(),
        length=L // sequence_shards(),
        parts=sequence_shards(),
        head_dim=K,
        dtype=q_BLHK.dtype.name,
        window=window,
    )
    q_BLHK = constrain(q_BLHK, "batch", "sequence", "heads", None)
    k_BLNK, v_BLNK = _gathered(k_BLNK), _gathered(v_BLNK)
    y_BLHK = version.function(q_BLHK, k_BLNK, v_BLNK, document_ids_BL, window=window)
    return checkpoint_name(y_BLHK, ATTENTION)


def _gathered(x_BLNK: jax.Array) -> jax.Array:
    """Keys or values of whole rows, each device having made those of its own tokens.

    Without the first constraint every device would make all of them.
    """
    x_BLNK = constrain(x_BLNK, "batch", "sequence", "kv_heads", None)
    return constrain(x_BLNK, "batch", None, "kv_heads", None)


def attend(
    q_BLHK: jax.Array,
    k_BSNK: jax.Array,
    v_BSNK: jax.Array,
    mask_BLS: jax.Array,
    *,
    causal: bool = False,
    window: int | None = None,
) -> jax.Array:
    """Softmax attention -> (B, L, H, K); scores and softmax in float32.

    Query head h reads key/value head h // G. `mask_BLS` is True where a query
    may look; a row without any True gives the mean of the values. `causal` promises
    that query t looks at keys 0..t only, the last `window` of them: then blocks of queries leave
    out the other keys.
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
        first = max(0, begin + 1 - window) if causal and window is not None else 0
        last = end if causal else k_BNKS.shape[-1]
        blocks.append(
            _attend_block(
                q_BNGLK[:, :, :, begin:end],
                k_BNKS[..., first:last],
                v_BNSK[:, :, first:last],
                mask_BLS[:, begin:end, first:last],
            )
        )
    y_BNGLK = jnp.concatenate(blocks, axis=3)
    return y_BNGLK.transpose(0, 3, 1, 2, 4).reshape(B, L, H, K)


def attend_cache(
    q_BLHK: jax.Array,
    k_BNSK: jax.Array,
    v_BNSK: jax.Array,
    mask_BLS: jax.Array,
    written: jax.Array,
) -> jax.Array:
    """`attend` for keys and values of a cache, of which only a written part is read.

    Args:
      written: int32 scalar, slots of the cache that hold something; the mask is False in others.
    """
    B, L, H, K = q_BLHK.shape
    N, S = k_BNSK.shape[1:3]
    q_BNGLK = (q_BLHK * K**-0.5).reshape(B, L, N, H // N, K).transpose(0, 2, 3, 1, 4)
    # On GPUs each choice waits for the host, which takes longer than reading all of the cache.
    part = S if target() == "gpu" else max(_LEAST_READ, -(-S // _MOST_READS))
    sizes = [min(end, S) for end in range(part, S + part, part)]

    def first(size: int) -> Callable[..., jax.Array]:
        return lambda q, k, v, mask: _attend_block(
            q, k[:, :, :size].swapaxes(2, 3), v[:, :, :size], mask[:, :, :size]
        )

    index = jnp.minimum((written - 1) // part, len(sizes) - 1)
    y_BNGLK = jax.lax.switch(index, [first(n) for n in sizes], q_BNGLK, k_BNSK, v_BNSK, mask_BLS)
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
    scores = float32_product(q, k)
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    inverse = 1.0 / jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(v.dtype)
    y = (float32_product(weights, v) * inverse).astype(v.dtype)
    return y, (q, k, v, y, weights, inverse, highest > jnp.finfo(jnp.float32).min)


def _softmax_backward(residuals: Any, dy: jax.Array) -> Any:
    q, k, v, y, weights, inverse, sees_some = residuals
    dy_f32 = dy.astype(jnp.float32) * inverse
    # Not weights^T dy: of the two, dy is the smaller to transpose.
    dv = product(dy_f32.astype(dy.dtype).swapaxes(-1, -2), weights).swapaxes(-1, -2)
    # Where all is masked, the scores are constants.
    dy_f32 = jnp.where(sees_some, dy_f32, 0.0)
    along_y = jnp.sum(dy_f32 * y, axis=-1, keepdims=True)
    dweights = float32_product(dy_f32.astype(dy.dtype), v.swapaxes(-1, -2))
    dscores = (weights * (dweights - along_y)).astype(q.dtype)
    dq = product(dscores, k.swapaxes(-1, -2))
    dk = product(q.swapaxes(-1, -2), dscores)
    return dq, dk, dv, None


_softmax_attention.defvjp(_softmax_forward, _softmax_backward)


def _xla(
    q: jax.Array, k: jax.Array, v: jax.Array, document_ids_BL: jax.Array, *, window: int | None
) -> jax.Array:
    return attend(q, k, v, causal_mask(document_ids_BL, window), causal=True, window=window)


def _chunks(
    q_BLHK: jax.Array,
    k_BSNK: jax.Array,
    v_BSNK: jax.Array,
    ids_BL: jax.Array,
    ids_BS: jax.Array,
    index_L: jax.Array,
    *,
    window: int | None,
) -> jax.Array:
    """Attention of queries number `index_L` of a row, _CHUNK at a time, in both passes."""
    L, S = q_BLHK.shape[1], k_BSNK.shape[1]
    chunk = min(_CHUNK, L)
    read = S if window is None else min(S, window + chunk - 1)

    def split(x: jax.Array, axis: int) -> jax.Array:
        x = jnp.pad(x, [(0, -L % chunk if dim == axis else 0) for dim in range(x.ndim)])
        x = x.reshape(*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    # Gradients of keys and values are sums over chunks, in the dtype that the loop is given.
    k_f32, v_f32 = k_BSNK.astype(jnp.float32), v_BSNK.astype(jnp.float32)

    def one(part: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q_BCHK, ids_BC, index_C = part
        begin = jnp.clip(index_C[0] + chunk - read, 0, S - read)
        k, v, ids = (
            jax.lax.dynamic_slice_in_dim(x, begin, read, 1) if read < S else x
            for x in (k_f32, v_f32, ids_BS)
        )
        mask_BCS = within(index_C, begin + jnp.arange(read), window) & sees(ids_BC, ids)
        return attend(q_BCHK, k.astype(k_BSNK.dtype), v.astype(v_BSNK.dtype), mask_BCS)

    parts = split(q_BLHK, 1), split(ids_BL, 1), split(index_L, 0)
    y = jax.lax.map(jax.checkpoint(one, prevent_cse=False), parts)
    return jnp.moveaxis(y, 0, 1).reshape(q_BLHK.shape[0], -1, *q_BLHK.shape[2:])[:, :L]


def _chunked(
    q: jax.Array, k: jax.Array, v: jax.Array, document_ids_BL: jax.Array, *, window: int | None
) -> jax.Array:
    return _on_each_device(functools.partial(_chunks, window=window), q, k, v, document_ids_BL)


def _cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, document_ids_BL: jax.Array, *, window: int | None
) -> jax.Array:
    require(window is None, "attention_kernel=cudnn has no windows; use chunked")

    def rows(q, k, v, ids_BL, ids_BS, index_L):  # type: ignore[no-untyped-def]
        chunks = functools.partial(
            _chunks, ids_BL=ids_BL, ids_BS=ids_BS, index_L=index_L, window=None
        )
        return _gpu.cudnn(q, k, v, ids_BL, otherwise=chunks)

    return _on_each_device(rows, q, k, v, document_ids_BL)


def _on_each_device(
    function: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, ids_BL: jax.Array
) -> jax.Array:
    """`function(q, k, v, ids_BL, ids_BS, index_L)` of the queries that a device holds."""
    args = (q, k, v, ids_BL, ids_BL, jnp.arange(q.shape[1]))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*args)
    keys = ("batch", None, "kv_heads", None)
    split = fitting_spec(k.shape, keys)[2] is not None  # else no device has the keys of its heads
    names: tuple[tuple[str | None, ...], ...] = (
        ("batch", "sequence", "heads" if split else None, None),
        keys,
        keys,
        ("batch", "sequence"),
        ("batch", None),
        ("sequence",),
    )
    specs = tuple(fitting_spec(x.shape, axes) for x, axes in zip(args, names, strict=True))
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(
        *args
    )


def _reference(
    q: jax.Array, k: jax.Array, v: jax.Array, document_ids_BL: jax.Array, *, window: int | None
) -> jax.Array:
    B, L, H, K = q.shape
    q_BLNGK = q.reshape(B, L, k.shape[2], -1, K)
    scores = jnp.einsum("BLNGK,BSNK->BNGLS", q_BLNGK, k, preferred_element_type=jnp.float32)
    mask_BLL = causal_mask(document_ids_BL, window)[:, None, None]
    weights = jax.nn.softmax(jnp.where(mask_BLL, scores * K**-0.5, -jnp.inf), axis=-1)
    return jnp.einsum("BNGLS,BSNK->BLNGK", weights.astype(v.dtype), v).reshape(B, L, H, K)


def _runs_chunked(*, target: str, **_: Any) -> bool:
    return target != "cpu"


SELF_ATTENTION = Op(
    name="attention",
    versions=(
        Version(name="splash", function=_tpu.splash, runs=_tpu.runs_splash),
        Version(name="cudnn", function=_cudnn, runs=_gpu.runs_cudnn),
        Version(name="chunked", function=_chunked, runs=_runs_chunked),
        Version(name="xla", function=_xla, runs=everywhere),
        Version(name=REFERENCE, function=_reference, runs=everywhere),
    ),
)
"""Facts: `target`, `length` (tokens of a row on one device), `parts` (devices that share a row),
`head_dim`, `dtype` (its name), `window` (tokens that a query sees, or None)."""

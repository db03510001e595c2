"""Softmax attention; causal self-attention within documents by the kernel of the backend.

Shapes: B batch, L queries, S keys, H query heads, N key/value heads, G query heads per
key/value head (H = N*G), K head dim.

| kernel | where | what it is |
|---|---|---|
| xla | everywhere | plain products; blocks of queries leave out later keys |
| splash | TPU | Pallas kernel of JAX that never writes the L x L scores |
| cudnn | GPU | cuDNN's flash attention, bfloat16 |
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from tlm_jax.branches import BRANCH
from tlm_jax.config import ModelConfig
from tlm_jax.distributed.sharding import RULES, constrain, mesh_size, sequence_shards
from tlm_jax.mixers import AttentionConfig
from tlm_jax.models.segments import ATTENTION

_BLOCK_LENGTHS, _MOST_BLOCKS = (128, 512), 8
"""Queries of a block: a quarter of the row's, within these bounds unless there were more blocks.

More blocks leave out more keys; longer ones make larger products, until a CPU's cache is full.
"""
_BLOCKS = (1024, 512, 256, 128)
"""Sizes of a splash block, the largest that divides a device's queries."""


def choose(wanted: str, *, length: int, head_dim: int, backend: str, dtype: str) -> str:
    """The kernel for `auto`; what was asked for otherwise.

    Args:
      wanted: the model's setting.
      length: tokens of a row that one device holds.
      head_dim: of queries and keys.
      backend: cpu, tpu or gpu.
      dtype: of the layers' arithmetic.
    """
    if wanted != "auto":
        return wanted
    if backend == "tpu" and length % _BLOCKS[-1] == 0:
        return "splash"
    if backend in ("gpu", "cuda") and dtype != "float32" and head_dim % 8 == 0 and head_dim <= 128:
        return "cudnn"
    return "xla"


def of_model(config: ModelConfig, *, length: int, backend: str, dtype: str) -> str | None:
    """The kernel of a model's attention layers, or None if it has none; see `choose`."""
    for mixer in config.mixers:
        if isinstance(mixer, AttentionConfig):
            _, _, head_dim = mixer.heads(config.d_model)
            return choose(
                config.attention_kernel,
                length=length,
                head_dim=head_dim,
                backend=backend,
                dtype=dtype,
            )
    return None


def self_attention(
    q_BLHK: jax.Array,
    k_BLNK: jax.Array,
    v_BLNK: jax.Array,
    segment_ids_BL: jax.Array,
    *,
    kernel: str,
) -> jax.Array:
    """softmax(q k / sqrt(K)) v over the tokens before in the same document -> (B, L, H, K).

    Query head h reads key/value head h // (H / N). Scores and softmax are float32. On a mesh
    with a sequence axis the queries stay where they are and keys and values are gathered. Only
    xla knows branches (see `branches`).

    Raises:
      ValueError: no such kernel, or one that cannot do these shapes.
    """
    q_BLHK = constrain(q_BLHK, "batch", "sequence", "heads", None)
    k_BLNK, v_BLNK = (constrain(a, "batch", None, "kv_heads", None) for a in (k_BLNK, v_BLNK))
    if kernel not in _KERNELS:
        raise ValueError(f"unknown attention kernel {kernel!r}; known: {', '.join(_KERNELS)}")
    y_BLHK = _KERNELS[kernel](q_BLHK, k_BLNK, v_BLNK, segment_ids_BL)
    return checkpoint_name(y_BLHK, ATTENTION)


def sees(query_ids_BL: jax.Array, key_ids_BS: jax.Array) -> jax.Array:
    """(B, L, S) bool: the key is of the query's document and branch, or of the trunk."""
    query_ids, key_ids = query_ids_BL[:, :, None], key_ids_BS[:, None, :]
    return (key_ids == query_ids) | (key_ids == query_ids % BRANCH)


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


def _mask(segment_ids_BL: jax.Array) -> jax.Array:
    """(B, L, L) bool: a token sees itself and what is before it in its document."""
    index_L = jnp.arange(segment_ids_BL.shape[1])
    return (index_L[:, None] >= index_L) & sees(segment_ids_BL, segment_ids_BL)


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
    return attend(q, k, v, _mask(segment_ids_BL), causal=True)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
    mask_B1LL = _mask(segment_ids_BL)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask_B1LL, implementation="cudnn")


def _splash(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids_BL: jax.Array, interpret: bool = False
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, L, H, K = q.shape
    mesh = jax.sharding.get_abstract_mesh()
    heads, parts = mesh_size(mesh, RULES.heads), sequence_shards()
    block = next((b for b in _BLOCKS if (L // parts) % b == 0), None)
    if block is None:
        raise ValueError(
            f"splash attention needs rows in multiples of {_BLOCKS[-1]} tokens a device, and has "
            f"{L} on {parts}; use model.attention_kernel=xla"
        )
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((L, L), shard_count=parts)] * H),
        head_shards=heads,
        q_seq_shards=parts,
        block_sizes=sizes,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )

    def rows(kernel: Callable[..., jax.Array], q, k, v, query_ids, key_ids):  # type: ignore[no-untyped-def]
        ids = splash.SegmentIds(q=query_ids, kv=key_ids)
        return jax.vmap(kernel)(q, k, v, segment_ids=ids)

    q, k, v = ((x.transpose(0, 2, 1, 3)) for x in (q * K**-0.5, k, v))
    if not mesh.empty:
        where = RULES.spec(("batch", "heads", "sequence", None))
        whole = RULES.spec(("batch", "kv_heads", None, None))
        ids, all_ids = RULES.spec(("batch", "sequence")), RULES.spec(("batch", None))
        split = kernel.manual_sharding_spec(NamedSharding(mesh, RULES.spec(("heads", "sequence"))))
        rows = jax.shard_map(
            rows,
            mesh=mesh,
            in_specs=(split, where, whole, whole, ids, all_ids),
            out_specs=where,
            check_vma=False,  # Pallas does not say how its results vary over the mesh
        )
    return rows(kernel, q, k, v, segment_ids_BL, segment_ids_BL).transpose(0, 2, 1, 3)


_KERNELS: dict[str, Callable[..., jax.Array]] = {"xla": _xla, "splash": _splash, "cudnn": _cudnn}

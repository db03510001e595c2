"""Versions for TPUs."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding

from tlm_jax.distributed.sharding import RULES, mesh_size, sequence_shards
from tlm_jax.ops.masks import ATTENTION

_BLOCKS = (1024, 512, 256, 128)
"""Sizes of a splash block, the largest that divides a device's queries."""
_WIDE_HEAD = 128
"""Head dim above which the gradient of keys and values takes half a block at a time: whole ones of
1,024 need 16.9 MiB of a v5e's 16 MiB of scoped VMEM with 256 dims and 8 rows."""


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    document_ids_BL: jax.Array,
    *,
    window: int | None,
    interpret: bool = False,
) -> jax.Array:
    """JAX's Pallas kernel, which never writes the L x L scores.

    Raises:
      ValueError: the length does not divide into blocks.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, L, H, K = q.shape
    mesh = jax.sharding.get_abstract_mesh()
    heads, parts = mesh_size(mesh, RULES.heads), sequence_shards()
    block = next((b for b in _BLOCKS if (L // parts) % b == 0), None)
    if block is None:
        raise ValueError(
            f"splash attention needs rows in multiples of {_BLOCKS[-1]} tokens per device, and has "
            f"{L} on {parts}; use model.attention_kernel=xla"
        )
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block if K <= _WIDE_HEAD else min(block, 512),
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = (
        masks.CausalMask((L, L), shard_count=parts)
        if window is None
        else masks.LocalMask((L, L), (window - 1, 0), offset=0, shard_count=parts)
    )
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * H),
        head_shards=heads,
        q_seq_shards=parts,
        block_sizes=sizes,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )

    def rows(kernel: Callable[..., jax.Array], q, k, v, query_ids, key_ids):  # type: ignore[no-untyped-def]
        ids = kernels.SegmentIds(q=query_ids, kv=key_ids)
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
    return rows(kernel, q, k, v, document_ids_BL, document_ids_BL).transpose(0, 2, 1, 3)


def runs_splash(*, target: str, length: int, **_: Any) -> bool:
    """On TPUs, where a device's part of a row divides into blocks."""
    return target == "tpu" and length % _BLOCKS[-1] == 0

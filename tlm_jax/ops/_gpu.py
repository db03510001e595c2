"""Versions for NVIDIA GPUs."""

from typing import Any

import jax

from tlm_jax.ops.masks import causal_mask


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, document_ids_BL: jax.Array) -> jax.Array:
    """cuDNN's flash attention."""
    mask_B1LL = causal_mask(document_ids_BL)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask_B1LL, implementation="cudnn")


def runs_cudnn(*, target: str, head_dim: int, dtype: str, **_: Any) -> bool:
    """On GPUs, in bfloat16 or float16, with the head dims that cuDNN takes."""
    return target == "gpu" and dtype != "float32" and head_dim % 8 == 0 and head_dim <= 128

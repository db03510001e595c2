"""What `auto` means on the hardware at hand."""

import jax.numpy as jnp

from tlm_jax import ops
from tlm_jax.config import ModelConfig
from tlm_jax.distributed.sharding import sequence_shards
from tlm_jax.mixers import AttentionConfig
from tlm_jax.ops.attention import SELF_ATTENTION


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The dtype of the layers' arithmetic: as configured, or by the backend."""
    name = config.compute_dtype
    if name == "auto":
        name = "float32" if ops.target() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def scans_layers(config: ModelConfig) -> bool:
    """Whether the layers of a segment run as a loop: as configured, or by the backend."""
    if config.scan_layers is None:
        # A loop stacks what its backward pass needs, array by array: copies that straight-line
        # code does without. With rematerialisation there is little to stack.
        return ops.target() == "tpu" or config.remat != "none"
    return config.scan_layers


def attention_kernel(
    config: ModelConfig, *, length: int, parts: int, target: str, dtype: str
) -> str | None:
    """The kernel of a model's attention layers, or None if it has none.

    Args:
      config: the model.
      length: tokens of a row that one device holds.
      parts: devices that share a row.
      target: cpu, gpu or tpu.
      dtype: name of the layers' dtype.
    """
    for layer in config.layers:
        if isinstance(layer.mixer, AttentionConfig):
            _, _, head_dim = layer.mixer.heads(config.d_model)
            return SELF_ATTENTION.choose(
                config.attention_kernel,
                target=target,
                length=length,
                parts=parts,
                head_dim=head_dim,
                dtype=dtype,
                window=layer.mixer.window,
            ).name
    return None


def attention_kernel_here(config: ModelConfig, seq_len: int) -> str | None:
    """`attention_kernel` for the current mesh and what is traced for, in rows of so many tokens."""
    parts = sequence_shards()
    return attention_kernel(
        config,
        length=seq_len // parts,
        parts=parts,
        target=ops.target(),
        dtype=compute_dtype(config).name,
    )

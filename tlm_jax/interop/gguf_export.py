"""A model as a GGUF file for llama.cpp, every layer at its own width.

Layers that are alike go out as llama.cpp's architecture `llama` (`qwen3` if they normalise queries
and keys), others as `deci`: the graph of `llama` with an MLP width and numbers of query and
key/value heads for each layer. Names, order and metadata follow llama.cpp's conversion
(conversion/deci.py and src/models/deci.cpp of the llama.cpp inside llama-cpp-python 0.3.36).
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tlm_jax import storage
from tlm_jax.config import ModelConfig, RunConfig, UserError
from tlm_jax.interop import gguf_file, gguf_header, llama
from tlm_jax.interop.tensors import needs_extra
from tlm_jax.mixers import AttentionConfig

FILE = "model.gguf"
_RECORD = "tlm_jax.export"
_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
_FILE_TYPES = {
    "float32": "ALL_F32",
    "float16": "MOSTLY_F16",
    "bfloat16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
}
_MOST_LAYERS = 512
"""LLAMA_MAX_LAYERS."""


def why_not(model: ModelConfig) -> str | None:
    """What of a model llama.cpp's graph cannot express, or None."""
    if model.num_layers > _MOST_LAYERS:
        return f"{model.num_layers} layers (llama.cpp has room for {_MOST_LAYERS})"
    return llama.why_not(model, "gguf")


def record(path: pathlib.Path) -> str | None:
    """The digest that `write` was given, of a whole GGUF file; else None."""
    try:
        with storage.local(path) as here:
            found = gguf_header.read(here).fields.get(_RECORD)
    except (OSError, gguf_header.DamagedError):
        return None
    return found.decode(errors="replace") if isinstance(found, bytes) else None


def write(
    path: pathlib.Path,
    config: RunConfig,
    tensors: Sequence[tuple[str, np.ndarray]],
    *,
    dtype: str,
    context_length: int,
    vocabulary: Mapping[str, Any],
    digest: str,
) -> None:
    """Writes the file; one tensor at a time is converted in memory.

    Vectors (the scales of norms, biases) stay float32, as in llama.cpp's own files. With q8_0,
    matrices whose rows are not whole blocks of 32 numbers become float16.

    Args:
      path: the file to make.
      config: of the run.
      tensors: float32, under Hugging Face's names for Llama, (outputs, inputs).
      dtype: a key of `_TYPES`.
      context_length: tokens of the longest text that the model was trained to read.
      vocabulary: metadata of the tokenizer; see `gguf_vocabulary`.
      digest: of everything that determines the file; see `record`.

    Raises:
      UserError: package gguf is missing, or a number is too large for float16.
    """
    with needs_extra():
        import gguf
    mixers = llama.attention(config.model)
    heads, kv_heads, dims = zip(*(m.heads(config.model.d_model) for m in mixers), strict=True)
    architecture = _architecture(config, mixers)
    writer = gguf.GGUFWriter(path, architecture)

    def each(numbers: Sequence[int]) -> Any:
        return list(numbers) if architecture == "deci" else numbers[0]

    writer.add_name(config.name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string(_RECORD, digest)
    writer.add_block_count(config.model.num_layers)
    writer.add_context_length(context_length)
    writer.add_embedding_length(config.model.d_model)
    writer.add_feed_forward_length(each(config.model.mlp_widths))
    writer.add_head_count(each(heads))
    writer.add_head_count_kv(each(kv_heads))
    writer.add_key_length(dims[0])
    writer.add_value_length(dims[0])
    writer.add_rope_dimension_count(dims[0])
    theta, scaling = mixers[0].rope_theta or 0.0, mixers[0].rope_scaling
    writer.add_rope_freq_base(theta)
    if scaling.method == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling.factor)
    elif scaling.method == "llama3":
        writer.add_rope_scaling_orig_ctx_len(scaling.original_length)
        divisors = np.asarray(scaling.divisors(theta, dims[0]), np.float32)
        tensors = [*tensors, (gguf_file.ROPE_FREQS, divisors)]
    writer.add_layer_norm_rms_eps(config.model.norm_eps)
    writer.add_vocab_size(config.model.vocab_size)
    for name, value in vocabulary.items():
        _add(writer, f"tokenizer.{name}", value)

    types = [_type(array.shape, gguf.GGMLQuantizationType[_TYPES[dtype]]) for _, array in tensors]
    for (name, array), kind in zip(tensors, types, strict=True):
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(
            gguf_file.stored_name(name),
            array.shape,
            np.dtype(np.float32),  # not the bytes of a quantised type: the shape is in numbers
            array.size // block * block_bytes,
            raw_dtype=kind,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for (name, array), kind in zip(tensors, types, strict=True):
        if gguf_file.is_rotated(name) and architecture in gguf_file.INTERLEAVED:
            array = _interleaved(array, dims[0])
        writer.write_tensor_data(_packed(name, array, kind))
    writer.close()


def _architecture(config: RunConfig, mixers: Sequence[AttentionConfig]) -> str:
    if len(set(mixers)) > 1 or len(set(config.model.mlp_widths)) > 1:
        return "deci"
    return "qwen3" if mixers[0].qk_norm else "llama"


def _add(writer: Any, name: str, value: Any) -> None:
    """One field; Python's types say which of GGUF's, but ids of tokens are not negative."""
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def _type(shape: tuple[int, ...], wanted: Any) -> Any:
    """The type of a tensor: a `gguf.GGMLQuantizationType`."""
    import gguf

    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    return gguf.GGMLQuantizationType.F16 if shape[-1] % block else wanted


def _interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of a query or key matrix, whose halves of a head llama.cpp wants in turn."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _packed(name: str, array: np.ndarray, kind: Any) -> np.ndarray:
    import gguf

    with np.errstate(over="ignore"):  # reported below
        packed = gguf.quants.quantize(np.ascontiguousarray(array, np.float32), kind)
    if packed.dtype == np.float16 and not np.isfinite(packed).all():
        raise UserError(
            f"{name} holds numbers of up to {np.abs(array).max():.3g}, too large for float16; use "
            "--dtype bfloat16 or float32"
        )
    return packed

"""What the tests of import and export share: run folders and Llama models without training."""

import json
import pathlib
import re
from typing import Any

import jax
import numpy as np

from tlm_jax import config as c
from tlm_jax.data import load_tokenizer
from tlm_jax.models import skeleton
from tlm_jax.training import checkpoint, restore

ATTENTION = c.AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, rope_theta=500.0)
TAPERED = c.ModelConfig(
    vocab_size=257,
    num_layers=5,
    d_model=32,
    mlp_width=64,
    mixer=ATTENTION,
    norm_eps=1e-5,
    remat="none",
)
"""Widths 96, 80, 64, 48, 32."""


def random_params(model: c.ModelConfig, seed: int = 0) -> Any:
    """Parameters, norms' scales included, of which no two are alike."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (rng.normal(size=leaf.shape) * 0.3 + (leaf.ndim < 3)).astype(np.float32),
        skeleton(model).shapes,
    )


def write_run(
    folder: pathlib.Path,
    model: c.ModelConfig,
    tokenizer: str | None = "bytes",
    seed: int = 0,
    **data: Any,
) -> Any:
    """Makes a run folder with one checkpoint; returns its parameters."""
    config = c.RunConfig(model=model, data=c.DataConfig(tokenizer=tokenizer, seq_len=64, **data))
    params = jax.tree.map(jax.numpy.asarray, random_params(model, seed))
    layout = {"tokenizer": load_tokenizer(tokenizer).fingerprint, "dataset": "0123"}
    with checkpoint.Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save_params(0, params, checkpoint.metadata(config, params, layout))
    return params


def read_run(folder: pathlib.Path) -> tuple[c.RunConfig, Any]:
    """Config and parameters of a run folder's checkpoint 0."""
    from tlm_jax.distributed import mesh as mesh_lib

    _, metadata = restore.saved_metadata(folder, 0)
    config = restore.saved_config(metadata)
    tokenizer = load_tokenizer(config.data.tokenizer)
    mesh = mesh_lib.single_device_mesh()
    return config, restore.load_params(folder, 0, skeleton(config.model), tokenizer, mesh)


def assert_bit_equal(first: Any, second: Any) -> None:
    """Both trees have the same names, shapes, types and bytes."""
    one, two = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (first, second))
    assert one.keys() == two.keys()
    for name in one:
        a, b = np.asarray(one[name]), np.asarray(two[name])
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert a.tobytes() == b.tobytes(), name


def logits(model: c.ModelConfig, params: Any, tokens_BL: np.ndarray) -> np.ndarray:
    """Our logits (B, L, V), float32."""

    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        merged = skeleton(model).merge(params)
        return merged.logits(merged(tokens)[0])

    return np.asarray(jax.jit(forward)(params, tokens_BL))


def llama_tensors(config: dict[str, Any], seed: int = 1) -> dict[str, np.ndarray]:
    """Random float32 tensors of a LlamaForCausalLM, under its names."""
    rng = np.random.default_rng(seed)
    d, f = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads, k = (
        config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], d)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (d,),
                "self_attn.q_proj": (heads * k, d),
                "self_attn.k_proj": (kv_heads * k, d),
                "self_attn.v_proj": (kv_heads * k, d),
                "self_attn.o_proj": (d, heads * k),
                "post_attention_layernorm": (d,),
                "mlp.gate_proj": (f, d),
                "mlp.up_proj": (f, d),
                "mlp.down_proj": (d, f),
            }.items()
        }
    shapes["model.norm.weight"] = (d,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    return {
        name: (rng.normal(size=shape) * 0.2 + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }


LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 100,
}


def first_layers(file: pathlib.Path, count: int, out: pathlib.Path) -> pathlib.Path:
    """Writes a GGUF file without the layers that follow so many; returns it."""
    import gguf

    reader = gguf.GGUFReader(file)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":  # the writer's own
            continue
        value = count if name == f"{architecture}.block_count" else field.contents()
        writer.add_key_value(name, value, field.types[0], sub_type=field.types[-1])
    for tensor in reader.tensors:
        layer = re.match(r"blk\.(\d+)\.", tensor.name)
        if layer is None or int(layer[1]) < count:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def write_llama(folder: pathlib.Path, tokenizer: pathlib.Path, **changes: Any) -> pathlib.Path:
    """Writes a Hugging Face folder of a small random Llama; returns it."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    save_file(llama_tensors(LLAMA | changes), folder / "model.safetensors")
    return folder

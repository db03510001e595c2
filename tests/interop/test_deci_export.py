"""Exports for vLLM's DeciLMForCausalLM, against the rules by which it reads a folder."""

import copy
import importlib.util
import json
import pathlib
import sys
from typing import Any

import numpy as np
import pytest
from folders import TAPERED, assert_bit_equal, read_run, write_run
from helpers import only_error
from test_gguf_export import MODELS

from tlm_jax import cli
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.interop import exporting, importing


def _export(folder: pathlib.Path, name: str) -> pathlib.Path:
    write_run(folder / "run", MODELS[name])
    exporting.export_model(folder / "run", folder / "out", form="deci")
    return folder / "out"


def _expected_tensors(config: Any) -> dict[str, tuple[int, ...]]:
    """What DeciLMForCausalLM.load_weights has parameters for, by vLLM's nemotron_nas.py.

    Attention as LlamaAttention has it, MLPs as LlamaMLP; q, k, v and gate, up are named apart in
    files. `config` is read as there, with dots.
    """
    width, vocab = config.hidden_size, config.vocab_size
    heads, head_dim = config.num_attention_heads, config.head_dim
    found = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (vocab, width)
    for layer in range(config.num_hidden_layers):
        block = config.block_configs[layer]
        assert not block.attention.no_op
        assert not block.ffn.no_op
        assert not hasattr(block.ffn, "ffn_mult")  # would be rounded up to 256
        assert block.ffn.hidden_act == "silu"
        kv_heads, mlp = heads // block.attention.n_heads_in_group, block.ffn.intermediate_size
        found |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (width,),
                "self_attn.q_proj": (heads * head_dim, width),
                "self_attn.k_proj": (kv_heads * head_dim, width),
                "self_attn.v_proj": (kv_heads * head_dim, width),
                "self_attn.o_proj": (width, heads * head_dim),
                "post_attention_layernorm": (width,),
                "mlp.gate_proj": (mlp, width),
                "mlp.up_proj": (mlp, width),
                "mlp.down_proj": (width, mlp),
            }.items()
        }
    return found


def _config(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """config.json through the module in the folder, as `AutoConfig` with remote code reads it."""
    values = json.loads((folder / "config.json").read_text())
    module, _, name = values.pop("auto_map")["AutoConfig"].partition(".")
    if importlib.util.find_spec("transformers") is None:
        fake = type(sys)("transformers")
        fake.LlamaConfig = _PlainConfig  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "transformers", fake)
    spec = importlib.util.spec_from_file_location(module, folder / f"{module}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return getattr(loaded, name)(**values)


class _PlainConfig:
    """Keeps its fields, where transformers is not installed."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


@pytest.mark.parametrize("name", ["tapered", "untied", "uniform"])
def test_vllm_finds_every_tensor(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and shapes are what the loader makes of the config; nothing else is there."""
    from safetensors.numpy import load_file

    out = _export(tmp_path, name)
    config = _config(out, monkeypatch)
    tensors = load_file(out / "model.safetensors")
    assert {key: array.shape for key, array in tensors.items()} == _expected_tensors(config)
    widths = [block.ffn.intermediate_size for block in config.block_configs]
    assert widths == list(MODELS[name].mlp_widths)
    assert config.architectures == ["DeciLMForCausalLM"]
    assert config.model_type == "nemotron-nas"  # by which vLLM counts key/value heads
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500.0}
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-5, 64)
    assert (config.attention_bias, config.mlp_bias) == (False, False)
    assert not hasattr(config, "position_embedding_type")  # rotates halves, as ours


def test_tensors_are_those_of_compact(tmp_path: pathlib.Path) -> None:
    """Which transformers has been compared with (test_transformers.py)."""
    from safetensors.numpy import load_file

    out = _export(tmp_path, "tapered")
    exporting.export_model(tmp_path / "run", tmp_path / "compact", form="compact")
    one, two = (load_file(f / "model.safetensors") for f in (out, tmp_path / "compact"))
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


def test_transformers_reads_the_config(tmp_path: pathlib.Path) -> None:
    """AutoConfig with remote code: fields with dots, and it can be copied, printed and saved."""
    transformers = pytest.importorskip("transformers")
    out = _export(tmp_path, "tapered")
    config = transformers.AutoConfig.from_pretrained(out, trust_remote_code=True)
    for read in (config, copy.deepcopy(config)):
        assert [block.ffn.intermediate_size for block in read.block_configs] == [96, 80, 64, 48, 32]
        assert read.block_configs[0].attention.n_heads_in_group == 2
        assert (read.head_dim, read.rope_parameters["rope_theta"]) == (8, 500.0)
    assert '"intermediate_size": 80' in repr(config)
    config.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["block_configs"] == json.loads((out / "config.json").read_text())["block_configs"]


def test_there_and_back_from_deci(tmp_path: pathlib.Path) -> None:
    """The folder can be imported again, bit for bit, with its own config."""
    params = write_run(tmp_path / "run", TAPERED)
    words = ["export", "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--format", "deci"]) == 0
    importing.import_model(tmp_path / "out", tmp_path / "back", None, mesh_lib.single_device_mesh())
    config, back = read_run(tmp_path / "back")
    assert config == read_run(tmp_path / "run")[0]
    assert_bit_equal(params, back)
    assert "vllm serve FOLDER --trust-remote-code" in (tmp_path / "out" / "README.md").read_text()


def test_tapered_heads_are_for_gguf(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """vLLM has one number of query heads; the message says which formats have one a layer."""
    write_run(tmp_path / "run", MODELS["heads"])
    words = ["export", "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--format", "deci"]) == 1
    error = only_error(capsys.readouterr().err)
    assert "--format deci cannot express layers with unequal numbers of heads" in error
    assert error.endswith("use --format compact, gguf or native")
    assert not (tmp_path / "out").exists()

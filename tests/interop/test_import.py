"""Import from Hugging Face folders and GGUF files that the tests write."""

import json
import pathlib
import shutil
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from folders import LLAMA, assert_bit_equal, llama_tensors, read_run, write_llama
from helpers import only_error, run

from tlm_jax import cli
from tlm_jax.config import MeshConfig, UserError
from tlm_jax.data import load_tokenizer
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.distributed import sharding
from tlm_jax.interop import gguf_file, gguf_tokenizer, importing, parameters
from tlm_jax.interop.tensors import SafetensorsFolder
from tlm_jax.models import skeleton

TEXT = "In 1812 it DIDN'T rain;\n\n\t  7040 cats ½ ٣ (x = 37) slept — naïvely ☃ <|endoftext|> 🙂"


def _import(model: pathlib.Path, out: pathlib.Path, tokenizer: pathlib.Path | None = None) -> Any:
    importing.import_model(model, out, tokenizer, mesh_lib.single_device_mesh())
    return read_run(out)


def _write_gguf(
    path: pathlib.Path,
    tokenizer: pathlib.Path | None,
    kind: str = "F32",
    *,
    pre: str = "smollm",
    extra: dict[str, np.ndarray] | None = None,
    fields: dict[str, Any] | None = None,
    architecture: str = "llama",
) -> dict[str, np.ndarray]:
    """Writes the model LLAMA as llama.cpp does; returns the tensors as they can be read back."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LLAMA["num_hidden_layers"])
    writer.add_context_length(LLAMA["max_position_embeddings"])
    writer.add_embedding_length(LLAMA["hidden_size"])
    writer.add_feed_forward_length(LLAMA["intermediate_size"])
    writer.add_head_count(LLAMA["num_attention_heads"])
    writer.add_head_count_kv(LLAMA["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(LLAMA["rms_norm_eps"])
    writer.add_rope_freq_base(LLAMA["rope_theta"])
    for name, value in (fields or {}).items():
        if isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_uint32(name, value)
    if tokenizer is not None:
        content = json.loads(tokenizer.read_text())
        vocab = content["model"]["vocab"]
        specials = {token["content"] for token in content["added_tokens"]}
        tokens = sorted(vocab, key=vocab.get)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in specials else 1 for token in tokens])
        writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LLAMA["num_hidden_layers"])
    stored = gguf.GGMLQuantizationType[kind]
    expected = {}
    for name, array in llama_tensors(LLAMA).items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        field = next((field for key, field in heads.items() if key in name), None)
        rows = array
        if (
            field and architecture == "llama"
        ):  # as LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py
            rows = array.reshape(LLAMA[field], 2, -1, array.shape[1]).swapaxes(1, 2)
            rows = rows.reshape(array.shape)
        target = names.get_name(name, try_suffixes=(".weight",))
        if array.ndim == 1 or kind == "F32":
            writer.add_tensor(target, rows)
            expected[name] = array
            continue
        packed = gguf.quants.quantize(rows, stored)
        writer.add_tensor(target, packed, raw_dtype=stored)
        # Rows are quantised one by one, so the order does not matter.
        expected[name] = gguf.quants.dequantize(gguf.quants.quantize(array, stored), stored)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
def test_gguf_equals_the_same_weights_from_hugging_face(
    kind: str, bpe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Names, the order of q's and k's rows, dequantisation, config and tokenizer."""
    from safetensors.numpy import save_file

    tensors = _write_gguf(tmp_path / "tiny.gguf", bpe, kind)
    folder = write_llama(tmp_path / "hf", bpe)
    save_file(tensors, folder / "model.safetensors")
    first, params = _import(tmp_path / "tiny.gguf", tmp_path / "a")
    second, others = _import(folder, tmp_path / "b")
    assert first.model == second.model
    assert_bit_equal(params, others)
    assert first.model.norm_eps == 1e-5
    assert first.data.seq_len == 100
    one, two = (load_tokenizer(config.data.tokenizer) for config in (first, second))
    assert one.encode(TEXT) == two.encode(TEXT)
    assert one.decode(one.encode(TEXT)) == TEXT
    assert one.vocab_size == two.vocab_size
    assert one.eot_id == 0
    assert one.decode([0, 1]) == ""  # special tokens stay special


def test_qwen2_in_gguf(bpe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Biases, rows of q and k in Hugging Face's order, and the tokenizer's way to cut text."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(3)
    stored, tensors = {}, llama_tensors(LLAMA)
    for layer in range(LLAMA["num_hidden_layers"]):
        for name, size in (("q", 64), ("k", 32), ("v", 32)):
            array = rng.normal(size=size).astype(np.float32)
            stored[f"blk.{layer}.attn_{name}.bias"] = array
            tensors[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = array
    _write_gguf(tmp_path / "a.gguf", bpe, pre="qwen2", extra=stored, architecture="qwen2")
    folder = write_llama(tmp_path / "hf", bpe, model_type="qwen2")
    save_file(tensors, folder / "model.safetensors")
    first, params = _import(tmp_path / "a.gguf", tmp_path / "a")
    second, others = _import(folder, tmp_path / "b")
    assert first.model == second.model
    assert_bit_equal(params, others)
    reader = load_tokenizer(first.data.tokenizer)
    assert reader.decode(reader.encode(TEXT)) == TEXT
    mesh = mesh_lib.device_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    importing.import_model(folder, tmp_path / "sharded", None, mesh)
    assert_bit_equal(params, read_run(tmp_path / "sharded")[1])


def test_every_type_that_gguf_knows(tmp_path: pathlib.Path) -> None:
    """Rows in the middle of a tensor of each quantised type are those of gguf's own reading."""
    rng = np.random.default_rng(0)
    kinds = [kind for kind in gguf.quants._type_traits if "F" not in kind.name]
    writer = gguf.GGUFWriter(tmp_path / "all.gguf", "llama")
    expected = {}
    for kind in kinds:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        packed = rng.integers(0, 60, (6, 512 // block * size), np.uint8)  # no float16 that is NaN
        writer.add_tensor(kind.name, packed, raw_dtype=kind)
        expected[kind.name] = gguf.quants.dequantize(packed, kind)[2:5]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = gguf_file.GgufFile(tmp_path / "all.gguf")
    for name, rows in expected.items():
        assert file.shapes[name] == (6, 512)
        np.testing.assert_array_equal(file.read(name, 2, 5), rows)
    assert {"Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"} <= expected.keys()


def test_sentencepiece_inside_gguf(tmp_path: pathlib.Path) -> None:
    """Pieces, scores and types make the model they came from."""
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text(
        "\n".join(f"a small text, number {i}, for {i * 7919 % 1013}" for i in range(500))
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "sp"), vocab_size=300, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    path = tmp_path / "sp.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    ids = range(model.vocab_size())
    writer.add_token_list([model.id_to_piece(i) for i in ids])
    writer.add_token_scores([model.get_score(i) for i in ids])
    kinds = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
        for i in ids
    ]
    writer.add_token_types(kinds)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    name, content = gguf_tokenizer.tokenizer_file(gguf_file.GgufFile(path))
    (tmp_path / name).write_bytes(content)
    written = load_tokenizer(str(tmp_path / name))
    given = load_tokenizer(str(tmp_path / "sp.model"))
    for sample in (TEXT, "a small text,  number 12", " leading", ""):
        assert written.encode(sample) == given.encode(sample)
        assert written.decode(written.encode(sample)) == given.decode(given.encode(sample))
    assert (written.eot_id, written.vocab_size) == (given.eot_id, given.vocab_size)


def test_each_device_reads_its_share(bpe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """On eight devices: the shardings of training, the same numbers, only one tensor at a time."""
    folder = write_llama(tmp_path / "hf", bpe)
    config, params = _import(folder, tmp_path / "run")
    structure = skeleton(config.model)
    source = SafetensorsFolder(folder)
    rows: dict[str, set[tuple[int, int]]] = {}
    read = source.read

    def spy(name: str, start: int, stop: int) -> np.ndarray:
        rows.setdefault(name, set()).add((start, stop))
        return read(name, start, stop)

    source.read = spy  # type: ignore[method-assign]
    mesh = mesh_lib.device_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    with jax.set_mesh(mesh):
        loaded = parameters.load(structure, source, mesh, native=False)
    assert_bit_equal(params, loaded)
    wanted = sharding.param_shardings(structure.shapes, structure.logical_axes, mesh)
    for leaf, placed in zip(jax.tree.leaves(loaded), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding == placed
    gate = loaded["segments"]["000"]["mlp"]["0"]["gate"]
    assert gate.addressable_shards[0].data.shape == (2, 64 // 4, 96 // 2)
    assert rows["model.layers.1.mlp.gate_proj.weight"] == {(0, 48), (48, 96)}
    assert rows["model.layers.1.self_attn.q_proj.weight"] == {(0, 32), (32, 64)}
    assert rows["model.layers.1.mlp.down_proj.weight"] == {(i * 16, i * 16 + 16) for i in range(4)}
    importing.import_model(folder, tmp_path / "sharded", None, mesh)
    assert_bit_equal(params, read_run(tmp_path / "sharded")[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "cannot be imported; llama, mistral, qwen2, qwen3, smollm3 can"),
        ({"model_type": "olmo2"}, "model_type 'olmo2' cannot be imported; llama, "),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "has no tensor model.layers.0.self_attn.k_proj.bias"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias is True"),
        ({"model_type": "qwen2"}, "has no tensor model.layers.0.self_attn.k_proj.bias"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling.rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5; it must be at"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.factor is None; it"),
        (
            {"rope_parameters": {"rope_theta": 1}, "rope_scaling": {"type": "linear", "factor": 2}},
            "rope_parameters and rope_scaling say different things",
        ),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0; it must be a whole"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 2}, "layer_types[0] is"),
        ({"model_type": "qwen3", "use_sliding_window": 1}, "use_sliding_window is 1; it must be"),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 2}, "layer_types[0]"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "the attention of 2 layers"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 2]}, "no_rope_layers is [1, 2]; it must"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types[1] is 'sliding"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"hidden_size": None}, "hidden_size is None; it must be a number"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"num_hidden_layers": 3}, "has no tensor model.layers.2."),
        ({"num_hidden_layers": 1}, "tensor model.layers.1.input_layernorm.weight has no place"),
        ({"intermediate_size": 64}, "has shape (64, 96), and its config asks for (64, 64)"),
        ({"vocab_size": 299}, "model.embed_tokens.weight has shape (300, 64)"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(
    changes: dict[str, Any],
    message: str,
    bpe: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What cannot be computed exactly is one line, and nothing is written."""
    folder = write_llama(tmp_path / "hf", bpe)
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    words = ["import", "--model", str(folder), "--out", str(tmp_path / "out")]
    assert cli.main(words) == 1
    assert message in only_error(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra": {"blk.0.ffn_up.bias": np.zeros(96, np.float32)}}, "up_proj.bias has no place"),
        (
            {"extra": {"blk.0.attn_q.bias": np.zeros(64, np.float32)}},
            "has no tensor model.layers.0.self_attn.k_proj.bias",
        ),
        (
            {"extra": {"rope_freqs.weight": np.linspace(1, 8, 8, dtype=np.float32)}},
            "tensor rope_freqs.weight is not Llama 3's scaling",
        ),
        ({"fields": {"llama.rope.scaling.type": "yarn"}}, "llama.rope.scaling.type is 'yarn'"),
        ({"fields": {"llama.expert_count": 8}}, "llama.expert_count is 8"),
        ({"fields": {"llama.rope.dimension_count": 8}}, "llama.rope.dimension_count is 8"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre 'tekken' is not known here; give the model's own"),
        ({"architecture": "gemma"}, "'gemma' cannot be imported; llama, deci, qwen2, qwen3 can"),
    ],
)  # fmt: skip
def test_refusals_of_gguf_files(
    options: dict[str, Any], message: str, bpe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The same for GGUF, tokenizers included."""
    _write_gguf(tmp_path / "tiny.gguf", bpe, **options)
    with pytest.raises(UserError) as error:
        _import(tmp_path / "tiny.gguf", tmp_path / "out")
    assert message in str(error.value)
    if "pre" in options:  # the message says what works
        assert not (tmp_path / "out").exists()
        _import(tmp_path / "tiny.gguf", tmp_path / "out", bpe)


def test_damaged_and_missing_files(bpe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """One line each."""
    folder = write_llama(tmp_path / "hf", bpe)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for harm, message in (
        (lambda: weights.write_bytes(content[:-7]), "model.safetensors is damaged"),
        (weights.unlink, r"has neither model.safetensors nor model.safetensors.index.json"),
        ((folder / "config.json").unlink, "has no config.json"),
    ):
        harm()
        with pytest.raises(UserError, match=message):
            _import(folder, tmp_path / "out")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF junk")
    for path, message in (("bad.gguf", "is not a whole GGUF file"), ("gone", "does not exist")):
        with pytest.raises(UserError, match=message):
            _import(tmp_path / path, tmp_path / "out")


def test_a_run_folder_can_be_moved_but_not_trained(
    bpe: pathlib.Path,
    config_file: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its tokenizer goes with it and it writes text; `tlm train` says what it lacks, in a line."""
    folder = write_llama(tmp_path / "hf", bpe)
    importing.import_model(folder, tmp_path / "run", None, mesh_lib.single_device_mesh())
    shutil.move(tmp_path / "run", tmp_path / "moved")
    config, _ = read_run(tmp_path / "moved")
    words = ["generate", "--checkpoint", str(tmp_path / "moved"), "--prompt", "In 1812 it"]
    assert cli.main([*words, "--num_tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("In 1812 it")
    assert config.data.tokenizer == str(tmp_path / "moved" / "tokenizer.json")
    result = run("train.py", "--config", config_file, "--workdir", tmp_path / "moved")
    assert result.returncode == 1
    assert "holds parameters without optimizer state" in only_error(result.stderr)
    # Another tokenizer in its place is not taken for the model's.
    other = tmp_path / "moved" / "tokenizer.json"
    other.write_text(other.read_text() + "\n")
    with pytest.raises(UserError, match="does not exist"):
        read_run(tmp_path / "moved")

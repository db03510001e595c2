"""Exports as GGUF: what llama.cpp reads, and the way back."""

import dataclasses
import json
import pathlib
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from folders import ATTENTION, TAPERED, assert_bit_equal, logits, read_run, write_run
from helpers import only_error

from tlm_jax import cli, mixers
from tlm_jax import config as c
from tlm_jax.data import load_tokenizer
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.interop import exporting, gguf_vocabulary, importing
from tlm_jax.interop.gguf_file import GgufFile

UNEVEN = dataclasses.replace(
    ATTENTION, num_heads=16, num_kv_heads=8, heads_taper=c.TaperConfig(start=1.5, end=0.5)
)
LINEAR = c.RopeScaling(method="linear", factor=3.0)
LLAMA3 = c.RopeScaling(method="llama3", factor=8.0, original_length=64)
UNIFORM = dataclasses.replace(TAPERED, taper=c.TaperConfig(schedule="uniform"))
MODELS = {
    "tapered": TAPERED,
    "untied": dataclasses.replace(TAPERED, tie_embeddings=False),
    "heads": dataclasses.replace(TAPERED, mixer=UNEVEN),
    "uniform": UNIFORM,
    "llama3": dataclasses.replace(
        UNIFORM, mixer=dataclasses.replace(ATTENTION, bias="qkv", rope_scaling=LLAMA3)
    ),
    "linear": dataclasses.replace(
        TAPERED, mixer=dataclasses.replace(ATTENTION, bias="all", rope_scaling=LINEAR)
    ),
    "qwen3": dataclasses.replace(UNIFORM, mixer=dataclasses.replace(ATTENTION, qk_norm=True)),
}
DEFAULT_BPE = 4096
TEXT = "In 1812 it DIDN'T rain;\n\n\t  7040 cats ½ ٣ (x = 37) slept — naïvely ☃ 🙂"


def export(folder: pathlib.Path, model: c.ModelConfig, dtype: Any = "float32", **run: Any) -> Any:
    """(parameters, the GGUF file) of a random model, below `folder`."""
    params = write_run(folder / "run", model, **run)
    form = exporting.export_model(folder / "run", folder / "out", form="gguf", dtype=dtype)
    assert form == "gguf"
    return params, folder / "out" / "model.gguf"


def with_vocabulary(model: c.ModelConfig, size: int = DEFAULT_BPE) -> c.ModelConfig:
    return dataclasses.replace(model, vocab_size=size)


def _fields(path: pathlib.Path) -> dict[str, Any]:
    """Metadata as the reader of package gguf has it."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_metadata_of_each_layer(tmp_path: pathlib.Path) -> None:
    """Widths and heads are arrays; all else is one number for all layers."""
    _, path = export(tmp_path, MODELS["heads"])
    found = _fields(path)
    expected = {
        "general.architecture": "deci",
        "deci.block_count": 5,
        "deci.context_length": 64,
        "deci.embedding_length": 32,
        "deci.feed_forward_length": [96, 80, 64, 48, 32],
        "deci.attention.head_count": [24, 22, 16, 10, 8],
        "deci.attention.head_count_kv": [12, 11, 8, 5, 4],
        "deci.attention.key_length": 8,
        "deci.attention.value_length": 8,
        "deci.rope.dimension_count": 8,
        "deci.rope.freq_base": 500.0,
        "deci.attention.layer_norm_rms_epsilon": np.float32(1e-5),
        "deci.vocab_size": 257,
        "general.file_type": gguf.LlamaFileType.ALL_F32,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_tensors_of_each_layer(tmp_path: pathlib.Path) -> None:
    """Names and shapes are llama.cpp's; a tied head is left out, an untied one is not."""
    _, path = export(tmp_path / "heads", MODELS["heads"])
    shapes = {t.name: tuple(map(int, t.shape[::-1])) for t in gguf.GGUFReader(path).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, 5)
    expected = {"token_embd.weight": (257, 32), "output_norm.weight": (32,)}
    sizes = zip(TAPERED.mlp_widths, (24, 22, 16, 10, 8), strict=True)
    for layer, (width, heads) in enumerate(sizes):
        for name, shape in {
            "input_layernorm": (32,),
            "self_attn.q_proj": (heads * 8, 32),
            "self_attn.k_proj": (heads * 4, 32),
            "self_attn.v_proj": (heads * 4, 32),
            "self_attn.o_proj": (32, heads * 8),
            "post_attention_layernorm": (32,),
            "mlp.gate_proj": (width, 32),
            "mlp.up_proj": (width, 32),
            "mlp.down_proj": (32, width),
        }.items():
            expected[f"{names.get_name(f'model.layers.{layer}.{name}')}.weight"] = shape
    assert shapes == expected
    _, path = export(tmp_path / "untied", MODELS["untied"])
    assert "output.weight" in {tensor.name for tensor in gguf.GGUFReader(path).tensors}


def test_layers_that_are_alike_are_a_llama(tmp_path: pathlib.Path) -> None:
    """The architecture that more tools know, with numbers in place of arrays."""
    found = _fields(export(tmp_path, MODELS["uniform"])[1])
    assert found["general.architecture"] == "llama"
    assert found["llama.feed_forward_length"] == 64
    assert found["llama.attention.head_count"] == 4


def test_rows_of_queries_are_in_llama_cpps_order(tmp_path: pathlib.Path) -> None:
    """Row i of a head's first half is row 2i, as LlamaModel.permute has it; keys too."""
    params, path = export(tmp_path, TAPERED)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    for name, heads in (("query", 4), ("key", 2)):
        ours = np.asarray(params["segments"]["000"]["mixer"][name][0])  # (D, heads, K)
        stored = tensors[f"blk.0.attn_{name[0]}.weight"].reshape(heads, 8, 32)
        np.testing.assert_array_equal(stored[:, 0::2], ours.transpose(1, 2, 0)[:, :4])
        np.testing.assert_array_equal(stored[:, 1::2], ours.transpose(1, 2, 0)[:, 4:])


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_bit_for_bit(name: str, tmp_path: pathlib.Path) -> None:
    """Parameters, sizes of each layer, length and tokens come back."""
    model = with_vocabulary(MODELS[name])
    params, path = export(tmp_path, model, tokenizer=None)
    words = ["import", "--model", str(path), "--out", str(tmp_path / "back")]
    assert cli.main(words) == 0
    config, back = read_run(tmp_path / "back")
    assert_bit_equal(params, back)
    assert config.model.mlp_widths == model.mlp_widths
    assert config.model.mixers == model.mixers
    assert config.model.tie_embeddings == model.tie_embeddings
    assert (config.model.norm_eps, config.data.seq_len) == (1e-5, 64)
    one, two = load_tokenizer(config.data.tokenizer), load_tokenizer(None)
    assert one.encode(TEXT) == two.encode(TEXT)
    assert one.eot_id == two.eot_id
    tokens = np.arange(24).reshape(2, 12)
    np.testing.assert_array_equal(logits(model, params, tokens), logits(config.model, back, tokens))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_types_that_round(dtype: str, tmp_path: pathlib.Path) -> None:
    """Every number is the nearest of its type; norms are exact, odd rows float16 in q8_0."""
    _, exact = export(tmp_path / "exact", TAPERED)
    _, path = export(tmp_path / dtype, TAPERED, dtype)
    assert path.stat().st_size < 0.75 * exact.stat().st_size
    first, second = GgufFile(exact), GgufFile(path)
    assert first.shapes == second.shapes
    for name, shape in first.shapes.items():
        one, two = (file.read(name, 0, shape[0]) for file in (first, second))
        if len(shape) == 1:
            np.testing.assert_array_equal(one, two)
        elif dtype == "bfloat16":
            np.testing.assert_array_equal(one.astype(ml_dtypes.bfloat16).astype(np.float32), two)
        elif dtype == "float16" or shape[-1] % 32:
            np.testing.assert_array_equal(one.astype(np.float16).astype(np.float32), two)
        else:  # 255 steps over twice the largest of 32 numbers, whose scale is a float16
            assert np.any(one != two), name
            largest = np.abs(one.reshape(*shape[:-1], -1, 32)).max(-1).repeat(32, -1)
            bound = largest * (0.5 / 127 + 2**-11)
            assert np.all(np.abs(one - two) <= bound), name
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    wanted = {"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    assert types["token_embd.weight"] == wanted
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert types["blk.1.ffn_down.weight"] == ("F16" if dtype == "q8_0" else wanted)  # rows of 80
    assert _fields(path)["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{wanted}"]


def test_what_float16_cannot_hold(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A weight beyond 65,504 is refused, not written as infinity."""
    from tlm_jax.interop import gguf_export

    array = np.full((4, 32), 1e5, np.float32)
    run = c.RunConfig(model=TAPERED)
    with pytest.raises(c.UserError, match=r"embed_tokens.*1e\+05, too large for float16"):
        gguf_export.write(
            tmp_path / "model.gguf",
            run,
            [("model.embed_tokens.weight", array)],
            dtype="float16",
            context_length=64,
            vocabulary={},
            digest="",
        )


@pytest.mark.parametrize("tokenizer", ["own", "bytes", "smollm", "sentencepiece"])
def test_tokenizers(tokenizer: str, bpe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Tokens, types, merges or scores, the ways to cut, and the special tokens."""
    from test_import import TEXT as WITH_NAMES

    path = {"own": None, "bytes": "bytes", "smollm": str(bpe)}.get(tokenizer)
    if tokenizer == "sentencepiece":
        path = str(sentencepiece_model(tmp_path))
    reader = load_tokenizer(path)
    model = with_vocabulary(TAPERED, reader.vocab_size + 3)
    _, file = export(tmp_path, model, tokenizer=path)
    found = _fields(file)
    pre = {"own": "gpt-2", "bytes": "gpt-2", "smollm": "smollm", "sentencepiece": None}
    assert found.get("tokenizer.ggml.pre") == pre[tokenizer]
    assert len(found["tokenizer.ggml.tokens"]) == model.vocab_size
    assert found["tokenizer.ggml.token_type"][-3:] == [5, 5, 5]
    assert found["tokenizer.ggml.token_type"][reader.eot_id] == 3
    assert found["tokenizer.ggml.bos_token_id"] == reader.eot_id  # as texts begin in training
    assert found["tokenizer.ggml.eos_token_id"] == reader.eot_id
    assert found["tokenizer.ggml.add_bos_token"] is True
    if tokenizer == "bytes":
        import tokenizers.pre_tokenizers as pre_tokenizers

        cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        spelled = cut.pre_tokenize_str(TEXT)[0][0]
        tokens = found["tokenizer.ggml.tokens"]
        assert [tokens.index(name) for name in spelled] == list(TEXT.encode())
        return
    importing.import_model(file, tmp_path / "back", None, mesh_lib.single_device_mesh())
    config, _ = read_run(tmp_path / "back")
    back = load_tokenizer(config.data.tokenizer)
    for sample in (WITH_NAMES, "a small text,  number 12", " leading", ""):
        assert back.encode(sample) == reader.encode(sample)
        assert back.encode_prompt(sample) == reader.encode_prompt(sample)


def sentencepiece_model(folder: pathlib.Path, **options: Any) -> pathlib.Path:
    import sentencepiece

    text = folder / "text.txt"
    text.write_text(
        "\n".join(f"a small text, number {i}, for {i * 7919 % 1013}" for i in range(500))
    )
    options = {"byte_fallback": True, "normalization_rule_name": "identity"} | options
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "sp"), vocab_size=300, model_type="bpe",
        remove_extra_whitespaces=False, minloglevel=2, **options,
    )  # fmt: skip
    return folder / "sp.model"


def test_tokenizers_that_gguf_cannot_express(bpe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A way to cut that llama.cpp has no name for, and SentencePiece that normalises."""
    content = json.loads(bpe.read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps(content))
    with pytest.raises(c.UserError, match="its way to cut text is not GPT-2's"):
        gguf_vocabulary.fields(other, load_tokenizer(str(other)), (), 300)
    other = sentencepiece_model(tmp_path, normalization_rule_name="nmt_nfkc")
    with pytest.raises(c.UserError, match="it is not SentencePiece BPE of the text as it is"):
        gguf_vocabulary.fields(other, load_tokenizer(str(other)), (), 300)


def test_special_tokens_and_chat_template(bpe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Those of an imported model go out again: each end of a text, padding, the template."""
    from folders import write_llama

    folder = write_llama(tmp_path / "hf", bpe)
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 0})
    )
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    mesh = mesh_lib.single_device_mesh()
    importing.import_model(folder, tmp_path / "run", None, mesh)
    exporting.export_model(tmp_path / "run", tmp_path / "out", form="gguf")
    found = _fields(tmp_path / "out" / "model.gguf")
    for name, value in {
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.eot_token_id": 0,
        "ggml.padding_token_id": 0,
        "ggml.add_bos_token": False,
        "chat_template": "{{ messages[0].content }}",
    }.items():
        assert found[f"tokenizer.{name}"] == value
    assert found["llama.context_length"] == 100
    back = importing.import_model(tmp_path / "out" / "model.gguf", tmp_path / "b", None, mesh)
    first = json.loads((tmp_path / "run" / "config.json").read_text())
    assert json.loads(json.dumps(back["special_tokens"])) == first["special_tokens"]
    assert back["chat_template"] == first["chat_template"]


@pytest.mark.parametrize(
    ("mixer", "message", "works"),
    [
        (
            mixers.GatedAttentionConfig(num_heads=4),
            "elementwise gated attention",
            "compact or native",
        ),
        (mixers.TitansConfig(num_heads=2), "Titans MAG", "compact or native"),
        (
            dataclasses.replace(ATTENTION, qk_norm=True),
            "mixer.qk_norm in unlike layers",
            "llama, compact or native",
        ),
        (
            dataclasses.replace(ATTENTION, qk_norm=True, rope_scaling=LLAMA3),
            "rope_scaling llama3",
            "llama or native",
        ),
        (dataclasses.replace(ATTENTION, window=8), "mixer.window", "llama or native"),
        (
            dataclasses.replace(ATTENTION, rope_theta=None),
            "layers without positions",
            "llama or native",
        ),
        (
            mixers.ListedConfig(
                mixers=(*[ATTENTION] * 4, dataclasses.replace(ATTENTION, head_dim=4))
            ),
            "layers whose attention differs in more than the number of heads",
            "compact or native",
        ),
    ],
)
def test_models_that_gguf_cannot_express(
    mixer: c.MixerConfig,
    message: str,
    works: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line that names it and what works, and nothing written."""
    write_run(tmp_path / "run", dataclasses.replace(TAPERED, mixer=mixer))
    words = ["export", "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--format", "gguf"]) == 1
    error = only_error(capsys.readouterr().err)
    assert message in error
    assert error.endswith(f"use --format {works}")
    assert not (tmp_path / "out").exists()


def test_dtypes_of_other_formats(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Quantised types are GGUF's alone."""
    write_run(tmp_path / "run", TAPERED)
    words = ["export", "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--dtype", "q8_0"]) == 1
    error = only_error(capsys.readouterr().err)
    assert error.endswith("--dtype q8_0 needs --format gguf; llama has float32, bfloat16")


def test_a_gguf_export_is_not_made_again(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command succeeds and writes nothing; another type is refused."""
    _, path = export(tmp_path, TAPERED)
    words = ["export", "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    before = path.stat().st_mtime_ns
    assert cli.main([*words, "--format", "gguf"]) == 0
    assert path.stat().st_mtime_ns == before
    capsys.readouterr()
    assert cli.main([*words, "--format", "gguf", "--dtype", "q8_0"]) == 1
    assert "is not an empty folder" in only_error(capsys.readouterr().err)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "llama-cli -m FOLDER/model.gguf" in card
    assert "tlm import --model FOLDER/model.gguf" in card


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feed_forward_length": [96, 80, 64, 48]}, "5 positive numbers, one for each layer"),
        ({"attention.head_count_kv": [2, 2, 0, 2, 2]}, "[2, 2, 0, 2, 2]; 5 positive numbers"),
        ({"feed_forward_length": [96, 80, 64, 48, 48]}, "mlp_width"),
        (
            {"feed_forward_length": [80, 96, 64, 48, 32]},
            "shape (32, 96), and its config asks for (32, 80)",
        ),
        ({"block_count": 1 << 30}, "deci.block_count is 1,073,741,824, and there are only"),
    ],
)
def test_damaged_arrays_are_refused(
    changes: dict[str, Any], message: str, tmp_path: pathlib.Path
) -> None:
    """Layers that are missing, linear attention, and widths that no tensor has."""
    model = with_vocabulary(TAPERED)
    _, path = export(tmp_path, model, tokenizer=None)
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "changed.gguf", "deci")
    for name, field in reader.fields.items():
        if name.startswith("deci."):
            value = changes.get(name.removeprefix("deci."), field.contents())
            if isinstance(value, list):
                writer.add_array(name, value)
            else:
                add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
                add(name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(c.UserError) as error:
        importing.import_model(
            tmp_path / "changed.gguf", tmp_path / "b", None, mesh_lib.single_device_mesh()
        )
    assert message in str(error.value)

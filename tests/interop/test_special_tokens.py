"""Length, beginnings, ends and chat template of a model, from import to export."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from folders import LLAMA, llama_tensors, read_run, write_llama
from helpers import Fails
from test_import import _write_gguf

from tlm_jax import cli
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.interop import exporting, importing
from tlm_jax.training import restore

SEPARATOR, BOS, EOS = 0, 1, 2
"""<|endoftext|>, <|im_start|> and <|im_end|> of the tokenizer `bpe`."""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {
    "bos_token": "<|im_start|>",
    "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
    "pad_token": "<|im_end|>",
}


def _import(model: pathlib.Path, out: pathlib.Path) -> dict[str, Any]:
    return importing.import_model(model, out, None, mesh_lib.single_device_mesh())


def _folder(folder: pathlib.Path, bpe: pathlib.Path, **changes: Any) -> pathlib.Path:
    """A Llama whose BOS, EOS and end-of-text differ, with a chat template."""
    write_llama(folder, bpe, **changes)
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, SEPARATOR]}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def _json(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("known", "rows", "chunk"), [(100, 81, 100), (8192, 1, 128), (1000, 8, 125), (40960, 1, 128)]
)
def test_a_models_own_length(
    known: int, rows: int, chunk: int, bpe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """What it was trained on is what it is evaluated on, in batches of about 8,192 tokens."""
    _import(write_llama(tmp_path / "hf", bpe, max_position_embeddings=known), tmp_path / "run")
    config, _ = read_run(tmp_path / "run")
    assert (config.data.seq_len, config.data.batch_size) == (known, rows)
    assert config.training.loss_chunk == chunk


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ("long", "max_position_embeddings is 'long'; it must be a number"),
        (0, "max_position_embeddings is 0; it must lie between 1 and"),
        (10**9, "max_position_embeddings is 1000000000; it must lie between"),
    ],
)
def test_a_damaged_length(
    known: Any, message: str, bpe: pathlib.Path, tmp_path: pathlib.Path, fails: Fails
) -> None:
    """One line that names the field."""
    folder = write_llama(tmp_path / "hf", bpe, max_position_embeddings=known)
    assert message in fails("import", "--model", folder, "--out", tmp_path / "out")


def test_from_a_folder_to_an_export_and_back(bpe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Each token and the template stay what they were."""
    metadata = _import(_folder(tmp_path / "hf", bpe), tmp_path / "run")
    special = {"bos": BOS, "eos": [EOS, SEPARATOR], "pad": EOS, "separator": SEPARATOR}
    assert json.loads(json.dumps(metadata["special_tokens"])) == special
    exporting.export_model(tmp_path / "run", tmp_path / "out")
    ids = {"bos_token_id": BOS, "eos_token_id": [EOS, SEPARATOR], "pad_token_id": EOS}
    assert _json(tmp_path / "out" / "generation_config.json") == ids
    assert _json(tmp_path / "out" / "config.json").items() >= ids.items()
    settings = _json(tmp_path / "out" / "tokenizer_config.json")
    assert settings["bos_token"] == "<|im_start|>"
    assert settings["eos_token"] == settings["pad_token"] == "<|im_end|>"
    assert settings["chat_template"] == TEMPLATE
    assert settings["model_max_length"] == 100
    again = _import(tmp_path / "out", tmp_path / "back")
    for name in ("special_tokens", "chat_template"):
        assert json.dumps(again[name]) == json.dumps(metadata[name])
    assert again["data_layout"] == metadata["data_layout"]


def test_a_model_without_bos(bpe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """It gets none: transformers' Llama would take 1 where config.json is silent."""
    folder = _folder(tmp_path / "hf", bpe, bos_token_id=BOS)
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG | {"bos_token": None}))
    assert _import(folder, tmp_path / "run")["special_tokens"]["bos"] is None
    exporting.export_model(tmp_path / "run", tmp_path / "out")
    assert _json(tmp_path / "out" / "config.json")["bos_token_id"] is None
    assert "bos_token" not in _json(tmp_path / "out" / "tokenizer_config.json")
    config, _ = read_run(tmp_path / "run")
    saved = restore.saved_metadata(tmp_path / "run", None)[1]
    assert restore.model_tokenizer(config, saved).begin_id == EOS  # as lm-eval does


@pytest.mark.parametrize("adds_bos", [False, True, None])
def test_from_a_gguf_file(adds_bos: bool | None, bpe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The file's own fields; whether BOS begins a text is one of them."""
    fields: dict[str, Any] = {
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.ggml.eot_token_id": SEPARATOR,
        "tokenizer.ggml.padding_token_id": EOS,
        "tokenizer.chat_template": TEMPLATE,
    }
    if adds_bos is not None:
        fields["tokenizer.ggml.add_bos_token"] = adds_bos
    _write_gguf(tmp_path / "tiny.gguf", bpe, fields=fields)
    metadata = _import(tmp_path / "tiny.gguf", tmp_path / "run")
    special = {"bos": BOS, "eos": (EOS, SEPARATOR), "pad": EOS, "separator": SEPARATOR}
    assert metadata["special_tokens"] == special
    assert metadata["chat_template"] == TEMPLATE
    assert metadata["data_layout"]["document_prefix"] == ([BOS] if adds_bos else [])
    # Its tokenizer.json says the same to transformers.
    import tokenizers

    reader = tokenizers.Tokenizer.from_file(str(tmp_path / "run" / "tokenizer.json"))
    assert (reader.encode("a").ids[0] == BOS) == bool(adds_bos)


def test_ids_that_there_are_not(bpe: pathlib.Path, tmp_path: pathlib.Path, fails: Fails) -> None:
    """One line that names the field."""
    _write_gguf(tmp_path / "tiny.gguf", bpe, fields={"tokenizer.ggml.eos_token_id": 300})
    line = fails("import", "--model", tmp_path / "tiny.gguf", "--out", tmp_path / "a")
    assert "tokenizer.ggml.eos_token_id is damaged: there are 300 tokens" in line
    folder = _folder(tmp_path / "hf", bpe)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ["2"]}))
    line = fails("import", "--model", folder, "--out", tmp_path / "b")
    assert "generation_config.json: eos_token_id is '2'; it must be the id of a token" in line


@pytest.fixture
def alternating(bpe: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """The run folder of a model that writes EOS and Z in turn, EOS first."""
    from safetensors.numpy import save_file

    folder = _folder(tmp_path / "alternating", bpe)
    z = json.loads(bpe.read_text())["model"]["vocab"]["Z"]
    tensors = {name: np.zeros_like(a) for name, a in llama_tensors(LLAMA).items()}
    for name, array in tensors.items():
        if "norm" in name:
            array[:] = 1
    direction = np.ones(LLAMA["hidden_size"], np.float32)
    tensors["model.embed_tokens.weight"][:] = direction
    tensors["model.embed_tokens.weight"][EOS] = -direction
    tensors["lm_head.weight"][EOS], tensors["lm_head.weight"][z] = direction, -direction
    save_file(tensors, folder / "model.safetensors")
    _import(folder, tmp_path / "run")
    return tmp_path / "run"


def test_a_text_ends_at_eos(alternating: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is neither passed nor shown, with a chat template and without."""
    words = ["generate", "--checkpoint", str(alternating), "--temperature", "0", "--prompt", "a Z"]
    assert cli.main([*words, "--num_tokens", "7"]) == 0
    assert capsys.readouterr().out == "a Z\n"
    assert cli.main([*words, "--num_tokens", "7", "--chat"]) == 0
    assert capsys.readouterr().out == "\n"  # the answer alone
    # EOS in the prompt is read as such: Z follows it, and then EOS.
    assert cli.main([*words[:-1], "a<|im_end|>", "--num_tokens", "7"]) == 0
    assert capsys.readouterr().out == "aZ\n"


def test_special_tokens_in_prompts(alternating: pathlib.Path) -> None:
    """One token each; a chat is what the template makes of it; texts are still texts."""
    config, _ = read_run(alternating)
    saved = restore.saved_metadata(alternating, None)[1]
    tokenizer = restore.model_tokenizer(config, saved)
    plain = tokenizer.encode
    ids = restore.prompt_ids(alternating, saved, tokenizer, "<|im_start|>user\nHi<|im_end|>")
    assert ids == [BOS, *plain("user\nHi"), EOS]
    chat = restore.prompt_ids(alternating, saved, tokenizer, "Hi", as_chat=True)
    assert chat == [*ids, *plain("\n"), BOS, *plain("assistant\n")]
    assert not {BOS, EOS} & set(plain("<|im_start|>user\nHi<|im_end|>"))
    assert restore.prompt_ids(alternating, saved, tokenizer, "") == [BOS]


def test_bos_is_put_before_a_prompt_once(bpe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Where the tokenizer's template says so, unless the prompt has it."""
    import tokenizers
    from tokenizers import processors

    reader = tokenizers.Tokenizer.from_file(str(bpe))
    reader.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", BOS)]
    )
    folder = _folder(tmp_path / "hf", bpe)
    reader.save(str(folder / "tokenizer.json"))
    _import(folder, tmp_path / "run")
    config, _ = read_run(tmp_path / "run")
    saved = restore.saved_metadata(tmp_path / "run", None)[1]
    tokenizer = restore.model_tokenizer(config, saved)
    for prompt in ("Hi", "<|im_start|>Hi"):
        ids = restore.prompt_ids(tmp_path / "run", saved, tokenizer, prompt)
        assert ids == [BOS, *tokenizer.encode("Hi")]


def test_chat_without_a_template(bpe: pathlib.Path, tmp_path: pathlib.Path, fails: Fails) -> None:
    """One line."""
    _import(write_llama(tmp_path / "hf", bpe), tmp_path / "run")
    line = fails("generate", "--checkpoint", tmp_path / "run", "--chat")
    assert line == f"{tmp_path / 'run'} has no chat template; leave out --chat"


def test_writing_beyond_the_trained_length(
    bpe: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line on stderr, and only then."""
    _import(write_llama(tmp_path / "hf", bpe, max_position_embeddings=8), tmp_path / "run")
    words = ["generate", "--checkpoint", str(tmp_path / "run"), "--prompt", "abc", "--num_tokens"]
    assert cli.main([*words, "5"]) == 0
    assert capsys.readouterr().err == ""
    assert cli.main([*words, "6"]) == 0
    assert "has 9 tokens, and the model was trained on at most 8" in capsys.readouterr().err


@pytest.mark.parametrize("adds_bos", [None, False])
def test_a_sentencepiece_model(
    adds_bos: bool | None, bpe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """It puts BOS before a text unless its settings say otherwise; so does its tokenizer.json."""
    import sentencepiece
    import tokenizers

    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"a small text, number {i}, for {i * 7919}" for i in range(500)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    folder = write_llama(tmp_path / "hf", bpe)
    (folder / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").rename(folder / "tokenizer.model")
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    settings |= {} if adds_bos is None else {"add_bos_token": adds_bos}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    metadata = _import(folder, tmp_path / "run")
    prefix = [1] if adds_bos is None else []
    assert metadata["data_layout"]["document_prefix"] == prefix
    assert metadata["special_tokens"]["bos"] == 1
    assert metadata["special_tokens"]["eos"] == (2,)
    exporting.export_model(tmp_path / "run", tmp_path / "out")
    reader = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    ids = reader.encode("a small text").ids
    assert ids == [*prefix, *reader.encode("a small text", add_special_tokens=False).ids]
    assert _json(tmp_path / "out" / "tokenizer_config.json")["add_bos_token"] == bool(prefix)

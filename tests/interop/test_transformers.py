"""The same numbers as transformers, both ways, in float32 on the CPU."""

import dataclasses
import json
import os
import pathlib
import re
import sys
import unicodedata
from typing import Any

import numpy as np
import pytest
from folders import LLAMA, TAPERED, assert_bit_equal, logits, read_run, write_llama, write_run

from tlm_jax.data import load_tokenizer
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.interop import exporting, importing
from tlm_jax.models import skeleton

EXTRA = "needs the extra reference (transformers with torch)"
torch = pytest.importorskip("torch", reason=EXTRA)
transformers = pytest.importorskip("transformers", reason=EXTRA)

SMOLLM2 = os.environ.get("TLM_SMOLLM2", "")
NUMERALS = re.escape(
    "".join(c for c in map(chr, range(0x3000)) if unicodedata.category(c)[0] == "N")
)
TEXTS = (
    "The capital of France is Paris, and the year is 1984; 3.14159 rounds to 3.",
    "def f(x):\n    return {'a': x ** 2, \"b\": [1, 22, 333]}  # TODO\n\n\tif x != 10_000:\r\n",
    "naïve café — “quotes” ½ ٣٤ 北京 🙂🏳️‍🌈 ﬁ Ω\u00a0\u200b end",
    "   leading,   inner\t\ttabs and trailing   \n\n\n",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune",
)


@pytest.fixture(autouse=True)
def _remote_code_in_a_folder_of_its_own(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers copies remote code into a cache and imports it from there."""
    from transformers import dynamic_module_utils

    folder = str(tmp_path / "modules")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", folder)
    monkeypatch.setattr(sys, "path", [folder, *sys.path])


def _theirs(folder: pathlib.Path, tokens_BL: np.ndarray, **options: Any) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    )
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens_BL)).logits.numpy()


def _import(model: pathlib.Path, out: pathlib.Path) -> Any:
    importing.import_model(model, out, None, mesh_lib.single_device_mesh())
    return read_run(out)


def _tokens(vocab_size: int, shape: tuple[int, int] = (2, 60)) -> np.ndarray:
    return np.random.default_rng(2).integers(vocab_size, size=shape)


@pytest.mark.parametrize("form", ["llama", "compact"])
def test_an_export_computes_the_same(form: exporting.Format, tmp_path: pathlib.Path) -> None:
    """A tapered checkpoint in both formats: logits within 1e-4 of ours."""
    params = write_run(tmp_path / "run", TAPERED)
    exporting.export_model(tmp_path / "run", tmp_path / "out", form=form)
    tokens = _tokens(TAPERED.vocab_size)
    ours = logits(TAPERED, params, tokens)
    theirs = _theirs(tmp_path / "out", tokens, trust_remote_code=form == "compact")
    assert np.abs(ours).max() > 1
    assert np.abs(ours - theirs).max() < 1e-4
    if form == "compact":
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", trust_remote_code=True
        )
        widths = tuple(layer.mlp.up_proj.out_features for layer in model.model.layers)
        assert widths == TAPERED.mlp_widths
        assert model.num_parameters() == sum(a.size for a in _leaves(params))


def test_what_transformers_saves_again_comes_back(tmp_path: pathlib.Path) -> None:
    """`save_pretrained` keeps the padding and our record, so parameters are bit-equal."""
    params = write_run(tmp_path / "run", TAPERED)
    exporting.export_model(tmp_path / "run", tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    config, back = _import(tmp_path / "again", tmp_path / "back")
    assert config.model == TAPERED
    assert_bit_equal(params, back)


def test_the_exported_tokenizer(bpe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """AutoTokenizer gives our ids, and the separator as first and last token of a text."""
    model = dataclasses.replace(TAPERED, vocab_size=4096)
    for name in (str(bpe), None):
        write_run(tmp_path / f"run{name is None}", model, name)
        out = tmp_path / f"out{name is None}"
        exporting.export_model(tmp_path / f"run{name is None}", out)
        theirs = transformers.AutoTokenizer.from_pretrained(out)
        ours = load_tokenizer(name)
        for text in TEXTS:
            ids = ours.encode(text)
            assert theirs.encode(text, add_special_tokens=False) == ids
            assert theirs.decode(ids) == text
        assert theirs.bos_token_id == theirs.eos_token_id == ours.eot_id


def test_an_exported_sentencepiece_model(tmp_path: pathlib.Path) -> None:
    """The same for a tokenizer.model."""
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"a small text, number {i}, for {i * 7919}" for i in range(500)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "sp"), vocab_size=320, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2,
    )  # fmt: skip
    name = str(tmp_path / "sp.model")
    write_run(tmp_path / "run", dataclasses.replace(TAPERED, vocab_size=320), name)
    exporting.export_model(tmp_path / "run", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = load_tokenizer(name)
    for sample in ("a small text,  number 12", *TEXTS, " "):
        assert theirs.encode(sample, add_special_tokens=False) == ours.encode(sample)
        assert theirs.decode(ours.encode(sample)) == sample
    assert theirs.eos_token_id == ours.eot_id
    _, _ = _import(tmp_path / "out", tmp_path / "back")
    assert load_tokenizer(str(tmp_path / "back" / "tokenizer.model")).encode("a") == ours.encode(
        "a"
    )


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "tied", "sharded"])
def test_an_import_computes_the_same(kind: str, bpe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Models that transformers made and saved: logits within 1e-4 of theirs."""
    values = {key: value for key, value in LLAMA.items() if key != "model_type"}
    values |= {"tie_word_embeddings": kind == "tied", "initializer_range": 0.3}
    family = {"mistral": "Mistral", "qwen3": "Qwen3"}.get(kind, "Llama")
    if family == "Mistral":
        values["sliding_window"] = None
    config = getattr(transformers, f"{family}Config")(**values)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    size = {"max_shard_size": "40KB"} if kind == "sharded" else {}
    model.save_pretrained(tmp_path / "hf", **size)
    (tmp_path / "hf" / "tokenizer.json").write_bytes(bpe.read_bytes())
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == (12 if kind == "sharded" else 1)
    run, params = _import(tmp_path / "hf", tmp_path / "run")
    tokens = _tokens(300)
    ours, theirs = logits(run.model, params, tokens), _theirs(tmp_path / "hf", tokens)
    assert np.abs(ours).max() > 1
    assert np.abs(ours - theirs).max() < 1e-4
    if kind == "llama":
        _same_alignment(run.model, params, model.eval(), tokens)


def test_an_import_in_half_precision(bpe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """bfloat16 and float16 files become the float32 numbers that they say."""
    for dtype in (torch.bfloat16, torch.float16):
        folder = write_llama(tmp_path / f"{dtype}", bpe)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        model.save_pretrained(folder)
        assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype)[6:]
        run, params = _import(folder, tmp_path / f"run{dtype}")
        tokens = _tokens(300)
        difference = logits(run.model, params, tokens) - _theirs(folder, tokens)
        assert np.abs(difference).max() < 1e-4


@pytest.mark.skipif(
    not pathlib.Path(SMOLLM2).is_file(),
    reason="TLM_SMOLLM2 does not name SmolLM2-135M-Instruct.Q4_1.gguf (docs/interop.md)",
)
@pytest.mark.usefixtures("gguf_files_read_once")
def test_smollm2(tmp_path: pathlib.Path) -> None:
    """SmolLM2-135M from GGUF: ids and logits as transformers' own reading of the same file."""
    file = pathlib.Path(SMOLLM2)
    run, params = _import(file, tmp_path / "run")
    ours = load_tokenizer(run.data.tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert (ours.eot_id, ours.vocab_size, run.model.vocab_size) == (0, 49152, 49152)
    rows = [[0, *ours.encode(text)] for text in TEXTS]
    for text, row in zip(TEXTS, rows, strict=True):
        # Their reading does not know that `smollm` cuts digits off, one by one.
        pieces = re.split(f"([{NUMERALS}])", text)
        ids = [i for piece in pieces for i in theirs.encode(piece, add_special_tokens=False)]
        assert ids == row[1:]
        assert ours.decode(row) == text
    length = min(map(len, rows))
    tokens = np.asarray([row[:length] for row in rows])
    reference = _read_gguf_by_transformers(file)
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens)).logits.numpy()
    actual = logits(run.model, params, tokens)
    worst = np.abs(actual - expected).max()
    print(f"largest difference of logits {worst:.2e} of at most {np.abs(expected).max():.1f}")
    assert worst < 1e-3
    _same_alignment(run.model, params, reference, tokens)


def _same_alignment(model: Any, params: Any, reference: Any, tokens_BL: np.ndarray) -> None:
    """Our cosines are those of what hooks in transformers see."""
    from tlm_jax.analysis import alignment, hf_alignment

    positions = np.broadcast_to(np.arange(tokens_BL.shape[1]), tokens_BL.shape)
    batch = {"inputs": tokens_BL, "positions": positions, "document_ids": np.ones_like(tokens_BL)}
    ours = alignment.align(skeleton(model), params, [batch])
    theirs = hf_alignment.align(reference, [tokens_BL])
    assert (ours.mlp_widths, ours.tokens) == (theirs.mlp_widths, theirs.tokens)
    assert ours.first_tokens == theirs.first_tokens == len(tokens_BL)
    for name in alignment.REFERENCES:
        np.testing.assert_allclose(ours.rho[name], theirs.rho[name], atol=4e-6)
    assert len({values[0] for values in ours.rho.values()}) == len(alignment.REFERENCES)


def _read_gguf_by_transformers(file: pathlib.Path) -> Any:
    """Their config, names, order of rows and dequantisation; from_pretrained wants accelerate."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    values = load_gguf_checkpoint(str(file))["config"]
    config = transformers.LlamaConfig(**values, attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config)
    loaded = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)
    tensors = {k: torch.as_tensor(v).float() for k, v in loaded["tensors"].items()}
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def _leaves(params: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(params)

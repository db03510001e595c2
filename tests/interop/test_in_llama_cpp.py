"""Exports as GGUF in llama.cpp itself, where llama-cpp-python is installed."""

import dataclasses
import pathlib

import numpy as np
import pytest
from folders import TAPERED, logits
from test_gguf_export import (
    DEFAULT_BPE,
    MODELS,
    TEXT,
    export,
    sentencepiece_model,
    with_vocabulary,
)

from benchmarks import llama_cpp_worker
from tlm_jax.data import load_tokenizer
from tlm_jax.models import sampling, skeleton

llama_cpp = pytest.importorskip("llama_cpp")


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(name: str, tmp_path: pathlib.Path) -> None:
    """Logits within 5e-3, every argmax and 100 greedy tokens equal, in llama.cpp itself."""
    model = with_vocabulary(MODELS[name])
    params, path = export(tmp_path, model, tokenizer=None, seed=5)
    tokens = np.random.default_rng(0).integers(0, DEFAULT_BPE, 48).tolist()
    answer = llama_cpp_worker.answer(str(path), tokens, TEXT, 100)
    ours = logits(model, params, np.asarray([tokens]))[0]
    assert np.abs(ours - answer["logits"]).max() < 5e-3
    np.testing.assert_array_equal(ours.argmax(-1), answer["logits"].argmax(-1))
    greedy = sampling.stream(
        skeleton(model),
        params,
        np.asarray([tokens], np.int32),
        sampling.SamplingConfig(temperature=0.0),
        num_tokens=100,
        vocab_size=DEFAULT_BPE,
    )
    assert answer["written"] == [int(token) for (token,) in greedy]
    assert answer["tokens"] == load_tokenizer(None).encode(TEXT)


@pytest.mark.parametrize("tokenizer", ["bytes", "smollm", "sentencepiece"])
def test_llama_cpp_cuts_text_alike(
    tokenizer: str, bpe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The same ids of the same text, and the same first one."""
    path = {"bytes": "bytes", "smollm": str(bpe)}.get(tokenizer) or str(
        sentencepiece_model(tmp_path)
    )
    reader = load_tokenizer(path)
    model = dataclasses.replace(TAPERED, vocab_size=reader.vocab_size)
    _, file = export(tmp_path, model, tokenizer=path)
    theirs = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    for sample in (TEXT, "a small text,  number 12", " leading", "x  y\n\n z ▁ <s>"):
        cut = theirs.tokenize(sample.encode(), add_bos=True, special=False)
        assert cut == [reader.eot_id, *reader.encode(sample)]
    theirs.close()

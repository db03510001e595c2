import functools
import pathlib
from typing import Any

import pytest

TEXTS = [
    f"In 18{i:02d} it didn't rain; 7{i} cats (x = {i * 37}) slept — naïvely\n\n" for i in range(80)
]


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A byte-level BPE of 300 tokens that splits digits, as SmolLM's does, with special tokens."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    # Learned without the split, so that merges of digits exist, as in SmolLM's vocabulary.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@functools.cache
def _read_once(reader: Any) -> Any:
    return functools.cache(lambda path: reader(path))


@pytest.fixture
def gguf_files_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers reads a GGUF file for its config, its tokenizer and its tensors, 5 s each."""
    import gguf

    monkeypatch.setattr(gguf, "GGUFReader", _read_once(gguf.GGUFReader))

import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tlm_jax.config import UserError
from tlm_jax.data import load_tokenizer

SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data" / "tokenizers"
EMBEDDED = load_tokenizer(None)
BYTES = load_tokenizer("bytes")

unicode_text = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with small tokenizers: hf.json, sp.model and ones without a separator."""
    import sentencepiece
    import tokenizers

    folder = tmp_path_factory.mktemp("tokenizers")
    text = [f"a small text, number {i}, to train on: {i * 7919 % 1013}" for i in range(500)]
    for name, special in (("hf", ["</s>"]), ("hf_bare", [])):
        hf = tokenizers.Tokenizer(tokenizers.models.BPE())
        hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        hf.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        hf.train_from_iterator(text, trainer)
        hf.enable_truncation(4)
        hf.enable_padding(length=50)
        hf.save(str(folder / f"{name}.json"))
    (folder / "text.txt").write_text("\n".join(text))
    for name, options in (("sp", {}), ("sp_bos", {"eos_id": -1}),
                          ("sp_bare", {"eos_id": -1, "bos_id": -1})):  # fmt: skip
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "text.txt"), model_prefix=str(folder / name), vocab_size=300,
            byte_fallback=True, minloglevel=2, **options,
        )  # fmt: skip
    return folder


@settings(deadline=None, max_examples=200)
@given(unicode_text)
def test_round_trip(text: str) -> None:
    for tokenizer in (EMBEDDED, BYTES):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.eot_id not in ids


@pytest.mark.parametrize("text", ["<|endoftext|>", " leading", "trailing ", "\r\n\t\0", "ﬁ é é"])
def test_round_trip_of_awkward_texts(text: str) -> None:
    for tokenizer in (EMBEDDED, BYTES):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.eot_id not in tokenizer.encode(text)


def test_bytes() -> None:
    assert (BYTES.vocab_size, BYTES.eot_id) == (257, 256)
    assert BYTES.encode("é") == [0xC3, 0xA9]


def test_decode_takes_broken_utf8_and_drops_separators(trained: pathlib.Path) -> None:
    assert BYTES.decode([0x61, 0xC3, 256, 0x62]) == "a\N{REPLACEMENT CHARACTER}b"
    broken = EMBEDDED.encode("é")[:1] if len(EMBEDDED.encode("é")) > 1 else []
    assert "\N{REPLACEMENT CHARACTER}" in EMBEDDED.decode([*broken, *EMBEDDED.encode("☃")[:1]])
    for tokenizer in (EMBEDDED, load_tokenizer(str(trained / "sp.model"))):
        ids = tokenizer.encode("a small text")
        assert tokenizer.decode([tokenizer.eot_id, *ids, tokenizer.eot_id]) == "a small text"


def test_hugging_face_file(trained: pathlib.Path) -> None:
    path = str(trained / "hf.json")
    tokenizer = load_tokenizer(path)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot_id) == (path, 300, 0)
    text = "a small text, longer than the truncation that the file asks for"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("a")) == 1  # nor padded
    assert tokenizer.fingerprint != EMBEDDED.fingerprint


def test_sentencepiece_file(trained: pathlib.Path) -> None:
    tokenizer = load_tokenizer(str(trained / "sp.model"))
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (300, 2)
    text = "a small text, é ☃ </s>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not {1, 2} & set(tokenizer.encode(text))
    assert load_tokenizer(str(trained / "sp_bos.model")).eot_id == 1


def test_special_tokens_are_read_from_prompts_alone(trained: pathlib.Path) -> None:
    """A text that names them is text."""
    for name, token in (("hf.json", "</s>"), ("sp.model", "</s>"), (None, "<|endoftext|>")):
        tokenizer = load_tokenizer(str(trained / name) if name else None)
        read = tokenizer.encode_prompt(f"a small{token}text")
        assert read == [*tokenizer.encode("a small"), tokenizer.eot_id, *tokenizer.encode("text")]
        assert tokenizer.encode_prompt("a small text") == tokenizer.encode("a small text")
        assert tokenizer.eot_id not in tokenizer.encode(f"a small{token}text")
        assert tokenizer.token_of(tokenizer.eot_id) == token
        assert tokenizer.id_of(token) == tokenizer.eot_id
        assert tokenizer.id_of("no such token") is None
        assert tokenizer.begin_id == tokenizer.eot_id
        assert tokenizer.end_ids == (tokenizer.eot_id,)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.json", "does not exist"),
        ("gone.model", "does not exist"),
        ("text.txt", "must be a tokenizer.json, a SentencePiece .model, or the word bytes"),
        ("junk.json", "is not a Hugging Face tokenizer.json"),
        ("junk.model", "is not a SentencePiece model"),
        ("hf_bare.json", "has no token to put between documents; it needs one of <|endoftext|> "
         "<|end_of_text|> </s> <eos> <s> <bos>"),
        ("sp_bare.model", "has no token to put between documents; it needs eos or bos"),
    ],
)  # fmt: skip
def test_bad_tokenizers(trained: pathlib.Path, name: str, message: str) -> None:
    for suffix in ("json", "model"):
        (trained / f"junk.{suffix}").write_bytes(b"\xff junk")
    with pytest.raises(UserError) as error:
        load_tokenizer(str(trained / name))
    assert str(error.value) == f"tokenizer {trained / name} {message}"


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real tokenizers at {SHARED}")
def test_real_tokenizers() -> None:
    text = "The whale, at 40 knots; naïve — ☃!\n\n  Two spaces.</s><|endoftext|>"
    gpt2 = load_tokenizer(str(SHARED / "gpt2_tokenizer.json"))
    assert (gpt2.vocab_size, gpt2.eot_id) == (50257, 50256)
    llama = load_tokenizer(str(SHARED / "llama2_tokenizer.model"))
    assert (llama.vocab_size, llama.eot_id) == (32000, 2)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert llama.encode("Hello world") == [15043, 3186]
    for tokenizer in (gpt2, llama):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.eot_id not in tokenizer.encode(text)

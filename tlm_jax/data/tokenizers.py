"""Tokenizers: the package's own, bytes, Hugging Face tokenizer.json, SentencePiece."""

import dataclasses
import functools
import hashlib
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from tlm_jax import storage
from tlm_jax.config import UserError

EMBEDDED = pathlib.Path(__file__).parent / "corpus" / "tokenizer.json"
BYTES_EOT = 256

# Names that published tokenizers give to the token between documents, best first.
_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<s>", "<bos>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Special ids that a model was trained with, besides the document separator."""

    bos: int | None = None
    """Begins a text; None where the model has no such token."""
    eos: tuple[int, ...] = ()
    """Each of them ends a text, the tokenizer's own first; () is the end-of-text token."""
    pad: int | None = None
    """Fills rows up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Text to token ids and back."""

    name: str
    """For messages: `embedded`, `bytes` or the file's path."""
    vocab_size: int
    """One more than the largest id."""
    eot_id: int
    """The id that separates documents."""
    fingerprint: str
    """16 hex digits that change with the tokenizer's content."""
    prefix_ids: tuple[int, ...]
    """What the tokenizer's own template puts before a text, such as a begin-of-text token."""
    encode: Callable[[str], list[int]]
    """Ids of a text. No special tokens are added, and none are read from the text."""
    encode_prompt: Callable[[str], list[int]]
    """Ids of a text in which the name of a special token is that token. None are added."""
    encode_batch: Callable[[list[str]], list[list[int]]]
    """Ids of many texts, the same as one by one, in less time."""
    decode: Callable[[Sequence[int]], str]
    """Text of ids. Special tokens give nothing, broken UTF-8 gives U+FFFD."""
    token_of: Callable[[int], str | None]
    """The name of an id; None for an id without one."""
    id_of: Callable[[str], int | None]
    """The id of a name; None for a name without one."""
    special: SpecialTokens = SpecialTokens()
    """What a model read its texts with; the default is that of models trained here."""

    @property
    def begin_id(self) -> int:
        """What stands before a whole text: BOS, else the first of `end_ids` (as in lm-eval)."""
        return self.end_ids[0] if self.special.bos is None else self.special.bos

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids of which each ends a text that a model writes."""
        return self.special.eos or (self.eot_id,)


def load_tokenizer(name: str | None) -> Tokenizer:
    """Opens a tokenizer.

    Args:
      name: None for the package's own 4,096-token byte-level BPE; `bytes` for one token per
        byte; else the path of a Hugging Face tokenizer.json or of a
        SentencePiece .model.

    Raises:
      UserError: no such file, not a tokenizer, or one without an end-of-text token.
    """
    if name is None:
        return _hugging_face(EMBEDDED, "embedded")
    if name == "bytes":
        return _bytes()
    path = storage.path(name).expanduser()
    readers = {".json": _hugging_face, ".model": _sentencepiece}
    if path.suffix not in readers:
        raise UserError(
            f"tokenizer {name} must be a tokenizer.json, a SentencePiece .model, or the word bytes"
        )
    if not path.is_file():
        raise UserError(f"tokenizer {name} does not exist")
    return readers[path.suffix](path, name)


def file_fingerprint(path: pathlib.Path) -> str:
    """The fingerprint of the tokenizer in a file, without opening it."""
    return _fingerprint(_read(path, str(path)))


def _fingerprint(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _read(path: pathlib.Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer {name} cannot be read: {error.strerror}") from error


def _bytes() -> Tokenizer:
    def decode(ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < BYTES_EOT).decode("utf-8", errors="replace")

    return Tokenizer(
        name="bytes",
        vocab_size=BYTES_EOT + 1,
        eot_id=BYTES_EOT,
        fingerprint=_fingerprint(b"bytes, end of text 256"),
        prefix_ids=(),
        encode=lambda text: list(text.encode("utf-8")),
        encode_prompt=lambda text: list(text.encode("utf-8")),
        encode_batch=lambda texts: [list(text.encode("utf-8")) for text in texts],
        decode=decode,
        token_of=lambda _: None,
        id_of=lambda _: None,
    )


def _hugging_face(path: pathlib.Path, name: str) -> Tokenizer:
    import tokenizers

    content = _read(path, name)

    def opened() -> Any:
        found = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        # Files may ask for these; both would lose or add tokens.
        found.no_truncation()
        found.no_padding()
        return found

    try:
        reader = opened()
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer {name} is not a Hugging Face tokenizer.json") from error
    vocabulary = reader.get_vocab(with_added_tokens=True)
    eot = next((vocabulary[s] for s in _SEPARATORS if s in vocabulary), None)
    if eot is None:
        raise _no_separator(name, f"one of {' '.join(_SEPARATORS)}")
    # A text that happens to contain "<|endoftext|>" is text.
    reader.encode_special_tokens = True
    for_prompts = functools.cache(opened)  # whether it reads special tokens is a reader's state

    def encode_batch(texts: list[str]) -> list[list[int]]:
        # The fast one leaves out the offsets of tokens in the text, and only these.
        return [e.ids for e in reader.encode_batch_fast(texts, add_special_tokens=False)]

    return Tokenizer(
        name=name,
        vocab_size=max(vocabulary.values()) + 1,
        eot_id=eot,
        fingerprint=_fingerprint(content),
        prefix_ids=_template_prefix(reader),
        encode=lambda text: reader.encode(text, add_special_tokens=False).ids,
        encode_prompt=lambda text: for_prompts().encode(text, add_special_tokens=False).ids,
        encode_batch=encode_batch,
        decode=lambda ids: reader.decode(list(ids), skip_special_tokens=True),
        token_of=reader.id_to_token,
        id_of=reader.token_to_id,
    )


def _template_prefix(reader: Any) -> tuple[int, ...]:
    """Ids that a tokenizer.json's post-processor puts before a text."""
    bare, whole = (reader.encode("a", add_special_tokens=special).ids for special in (False, True))
    starts = range(len(whole) - len(bare) + 1)
    found = next((at for at in starts if whole[at : at + len(bare)] == bare), 0)
    return tuple(whole[:found])


def _sentencepiece(path: pathlib.Path, name: str) -> Tokenizer:
    import sentencepiece

    content = _read(path, name)
    reader: Any = sentencepiece.SentencePieceProcessor()
    try:
        reader.LoadFromSerializedProto(content)
    except RuntimeError as error:
        raise UserError(f"tokenizer {name} is not a SentencePiece model") from error
    eot = reader.eos_id() if reader.eos_id() >= 0 else reader.bos_id()
    if eot < 0:
        raise _no_separator(name, "eos or bos")
    names = [reader.id_to_piece(i) for i in range(reader.vocab_size())]
    ids = {piece: i for i, piece in enumerate(names)}
    controls = sorted((n for i, n in enumerate(names) if reader.is_control(i)), key=len)
    special = re.compile(f"({'|'.join(map(re.escape, controls[::-1]))})")

    def encode_prompt(text: str) -> list[int]:
        # The model itself never reads these from a text.
        parts = special.split(text) if controls else [text]
        pieces = [
            [ids[p]] if i % 2 else reader.encode(p, out_type=int) for i, p in enumerate(parts)
        ]
        return [i for piece in pieces for i in piece]

    return Tokenizer(
        name=name,
        vocab_size=reader.vocab_size(),
        eot_id=eot,
        fingerprint=_fingerprint(content),
        prefix_ids=(reader.bos_id(),) if reader.bos_id() >= 0 else (),
        encode=lambda text: reader.encode(text, out_type=int),
        encode_prompt=encode_prompt,
        encode_batch=lambda texts: reader.encode(texts, out_type=int, num_threads=1),
        decode=lambda ids: reader.decode([int(i) for i in ids]),
        token_of=lambda i: names[i] if i < len(names) else None,
        id_of=ids.get,
    )


def _no_separator(name: str, wanted: str) -> UserError:
    return UserError(f"tokenizer {name} has no token to put between documents; it needs {wanted}")

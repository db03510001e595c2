"""A tokenizer as the metadata of a GGUF file: the way back of `gguf_tokenizer`.

Byte-level BPE whose text is cut as GPT-2, SmolLM, Llama 3 or Qwen2 cut it, SentencePiece BPE that
takes text as it is, and bytes. llama.cpp knows ways to cut by name only, so others are refused.
"""

import json
import pathlib
from typing import Any

from tlm_jax.config import UserError
from tlm_jax.data import Tokenizer
from tlm_jax.data.tokenizers import BYTES_EOT
from tlm_jax.interop import gguf_tokenizer, sentencepiece_json

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # of tokenizer.ggml.token_type
_NEVER = "ÿ ÿ"
"""A merge of two bytes that no UTF-8 text holds: llama.cpp demands that there be merges."""


def fields(
    path: pathlib.Path | None, tokenizer: Tokenizer, prefix: tuple[int, ...], vocab_size: int
) -> dict[str, Any]:
    """Metadata below `tokenizer.`, by name.

    Args:
      path: the tokenizer's file; None for bytes.
      tokenizer: the same, with the model's special tokens.
      prefix: ids that stand before every text.
      vocab_size: rows of the model's embedding table; ids without a token are filled up.

    Raises:
      UserError: GGUF cannot say how the tokenizer works.
    """
    if path is None:
        found = _bytes()
    elif path.suffix == ".model":
        found = _sentencepiece(path)
    else:
        found = _byte_level_bpe(path)
    missing = range(len(found["tokens"]), vocab_size)
    found["tokens"] += [f"[PAD{index}]" for index in missing]
    found["token_type"] += [_UNUSED for _ in missing]
    if "scores" in found:
        found["scores"] += [0.0 for _ in missing]
    begin = prefix[0] if prefix else tokenizer.special.bos
    ends = dict(zip(("eos", "eot", "eom"), tokenizer.end_ids, strict=False))
    ids = {"bos": begin, **ends, "padding": tokenizer.special.pad}
    found |= {f"{name}_token_id": index for name, index in ids.items() if index is not None}
    found["add_bos_token"] = bool(prefix)
    return {f"ggml.{name}": value for name, value in found.items()}


def _bytes() -> dict[str, Any]:
    """Every byte under the name that GPT-2's byte-level BPE has for it, and end-of-text."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # stand for themselves
    others = [byte for byte in range(BYTES_EOT) if byte not in plain]
    names = {byte: chr(byte) for byte in plain}
    names |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*(names[byte] for byte in range(BYTES_EOT)), "<|endoftext|>"],
        "token_type": [*[_NORMAL] * BYTES_EOT, _CONTROL],
        "merges": [_NEVER],
    }


def _byte_level_bpe(path: pathlib.Path) -> dict[str, Any]:
    content = json.loads(path.read_bytes())
    model = content["model"]
    if model.get("type", "BPE") != "BPE" or content.get("normalizer") is not None:
        raise _refusal(path, "it is not byte-level BPE of the text as it is")
    added = {token["id"]: token for token in content.get("added_tokens", ())}
    tokens = {index: token for token, index in model["vocab"].items()}
    tokens |= {index: token["content"] for index, token in added.items()}
    kinds = {
        index: _CONTROL if token["special"] else _USER_DEFINED for index, token in added.items()
    }
    ids = range(max(tokens) + 1)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return {
        "model": "gpt2",
        "pre": _pre(content, path),
        "tokens": [tokens.get(index, f"[PAD{index}]") for index in ids],
        "token_type": [kinds.get(index, _NORMAL if index in tokens else _UNUSED) for index in ids],
        "merges": merges or [_NEVER],
    }


def _pre(content: dict[str, Any], path: pathlib.Path) -> str:
    """The name of the way to cut a text that does what this tokenizer.json does."""
    wanted = _cutting(content["pre_tokenizer"]), bool(content["model"].get("ignore_merges"))
    for name in gguf_tokenizer.PRE_TOKENIZERS:
        pre_tokenizer, whole_words = gguf_tokenizer.pre_tokenizer(name)
        if wanted == (_cutting(json.loads(pre_tokenizer.__getstate__())), whole_words):
            return name
    raise _refusal(path, "its way to cut text is not GPT-2's, SmolLM's, Llama 3's or Qwen2's")


def _cutting(spec: Any) -> Any:
    """What a pre-tokenizer does: without its name for offsets, which tokens do not depend on."""
    if isinstance(spec, dict):
        return {k: _cutting(v) for k, v in spec.items() if k != "trim_offsets"}
    return [_cutting(one) for one in spec] if isinstance(spec, list) else spec


def _sentencepiece(path: pathlib.Path) -> dict[str, Any]:
    model = sentencepiece_json.read(path)
    if model is None:
        raise _refusal(path, "it is not SentencePiece BPE of the text as it is")
    return {
        "model": "llama",
        "tokens": [piece.piece for piece in model.pieces],
        "scores": [piece.score for piece in model.pieces],
        "token_type": [piece.type for piece in model.pieces],
        "unknown_token_id": model.trainer_spec.unk_id,
        "add_space_prefix": model.normalizer_spec.add_dummy_prefix,
    }


def _refusal(path: pathlib.Path, why: str) -> UserError:
    return UserError(
        f"--format gguf cannot express the tokenizer {path}: {why}; use another --format"
    )

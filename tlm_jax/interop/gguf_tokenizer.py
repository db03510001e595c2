"""The tokenizer inside a GGUF file, written as the file it was made from.

Byte-level BPE becomes a tokenizer.json, SentencePiece a tokenizer.model.
"""

from typing import Any

from tlm_jax.config import UserError
from tlm_jax.interop.gguf_file import GgufFile

PRE_TOKENIZERS = ("gpt-2", "smollm", "llama-bpe", "qwen2")
"""Values of tokenizer.ggml.pre that are known here."""
_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace("{1,3}", "")  # digits one by one


def tokenizer_file(file: GgufFile) -> tuple[str, bytes]:
    """Name and content of the file that holds the same tokenizer.

    Raises:
      UserError: its kind is not known; a tokenizer file can be given instead.
    """
    kind = file.field("tokenizer.ggml.model")
    if kind == "gpt2":
        _check_vocabulary(file, merges=True)
        return "tokenizer.json", _byte_level_bpe(file).to_str().encode()
    if kind == "llama":
        _check_vocabulary(file, merges=False)
        return "tokenizer.model", _sentencepiece(file)
    raise _unknown(file, "tokenizer.ggml.model", kind)


def _check_vocabulary(file: GgufFile, *, merges: bool) -> None:
    """Refuses tokens, types, scores, merges and ids that do not fit together."""
    kinds: dict[str, type] = {"tokens": str, "token_type": int}
    kinds |= {"merges": str} if merges else {"scores": float}
    found: dict[str, list[Any]] = {}
    for name, kind in kinds.items():
        value = file.field(f"tokenizer.ggml.{name}")
        if value is None and name == "token_type" and merges:
            continue
        if not isinstance(value, list) or any(type(one) is not kind for one in value):
            raise _damaged(file, name, f"it must be a list of {kind.__name__}")
        if name != "merges" and len(value) != len(found.get("tokens", value)):
            raise _damaged(file, name, "its length is not that of the tokens")
        if name in ("tokens", "merges") and len(set(value)) != len(value):
            raise _damaged(file, name, "an entry is there twice")
        found[name] = value
    if not set(found.get("token_type", ())) <= set(range(1, 7)):
        raise _damaged(file, "token_type", "types are 1 to 6")
    vocabulary = set(found["tokens"])
    for merge in found.get("merges", ()):
        first, _, second = merge.partition(" ")
        if not {first, second, first + second} <= vocabulary:
            raise _damaged(file, "merges", f"{merge!r} does not merge two tokens into a third")
    for name in ("bos", "eos", "unknown"):
        index = file.field(f"tokenizer.ggml.{name}_token_id", 0)
        if type(index) is not int or not 0 <= index < len(vocabulary):
            raise _damaged(file, f"{name}_token_id", f"there are {len(vocabulary)} tokens")


def _damaged(file: GgufFile, name: str, why: str) -> UserError:
    return UserError(
        f"{file.where}: tokenizer.ggml.{name} is damaged: {why}; give the model's own "
        "tokenizer.json or tokenizer.model with --tokenizer FILE"
    )


def _byte_level_bpe(file: GgufFile) -> Any:
    import tokenizers
    from tokenizers import decoders, models

    tokens = file.field("tokenizer.ggml.tokens")
    kinds = file.field("tokenizer.ggml.token_type") or [1] * len(tokens)
    pre = file.field("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise _unknown(file, "tokenizer.ggml.pre", pre)
    splitter, whole_words = pre_tokenizer(pre)
    result = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(m.split(" ")) for m in file.field("tokenizer.ggml.merges")],
            ignore_merges=whole_words,
        )
    )
    result.pre_tokenizer = splitter
    result.decoder = decoders.ByteLevel()
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            tokenizers.AddedToken(token, normalized=False, special=special)
            for token, k in zip(tokens, kinds, strict=True)
            if k == kind
        ]
        (result.add_special_tokens if special else result.add_tokens)(added)
    bos = file.field("tokenizer.ggml.bos_token_id")
    if adds_bos(file) and isinstance(bos, int) and 0 <= bos < len(tokens):
        result.post_processor = begin_with(tokens[bos], bos)
    return result


def adds_bos(file: GgufFile) -> bool:
    """Whether a text begins with BOS.

    Where the file is silent, llama.cpp adds it for these, as their original tokenizers do.
    """
    silent = (
        file.field("tokenizer.ggml.model") == "llama"
        or file.field("tokenizer.ggml.pre") == "llama-bpe"
    )
    return bool(file.field("tokenizer.ggml.add_bos_token", silent))


def begin_with(token: str, index: int) -> Any:
    """The post-processor of a tokenizer.json that puts a token before a text."""
    from tokenizers import processors

    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, index)]
    )


def pre_tokenizer(name: str) -> tuple[Any, bool]:
    """How text is cut before it is merged, and whether a word in the vocabulary stays whole.

    Args:
      name: one of `PRE_TOKENIZERS`.
    """
    from tokenizers import Regex
    from tokenizers import pre_tokenizers as pre

    gpt2 = pre.ByteLevel(add_prefix_space=False, use_regex=True)
    match name:
        case "gpt-2":
            return gpt2, False
        case "smollm":
            return pre.Sequence([pre.Digits(individual_digits=True), gpt2]), False
        case "llama-bpe" | "qwen2":
            pattern = _LLAMA3_SPLIT if name == "llama-bpe" else _QWEN2_SPLIT
            split = pre.Split(Regex(pattern), behavior="isolated")
            whole = pre.ByteLevel(add_prefix_space=False, use_regex=False)
            return pre.Sequence([split, whole]), name == "llama-bpe"
    raise ValueError(f"pre-tokenizer {name!r} is not one of {PRE_TOKENIZERS}")


def _sentencepiece(file: GgufFile) -> bytes:
    """A SentencePiece model: GGUF keeps its pieces, scores and types as they were."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2  # its classes are made at run time
    model = proto.ModelProto()
    columns = (file.field(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type"))
    for piece, score, kind in zip(*columns, strict=True):
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = any(p.type == p.BYTE for p in model.pieces)
    model.trainer_spec.unk_id = file.field("tokenizer.ggml.unknown_token_id", 0)
    model.trainer_spec.bos_id = file.field("tokenizer.ggml.bos_token_id", 1)
    model.trainer_spec.eos_id = file.field("tokenizer.ggml.eos_token_id", 2)
    for name in ("unk", "bos", "eos"):
        piece = model.pieces[getattr(model.trainer_spec, f"{name}_id")].piece
        setattr(model.trainer_spec, f"{name}_piece", piece)
    prefix = file.field("tokenizer.ggml.add_space_prefix", True)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    return model.SerializeToString()


def _unknown(file: GgufFile, field: str, value: Any) -> UserError:
    return UserError(
        f"{file.where}: {field} {value!r} is not known here; give the model's own tokenizer.json "
        "or tokenizer.model with --tokenizer FILE"
    )

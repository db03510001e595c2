"""A SentencePiece BPE model as a Hugging Face tokenizer.json with the same ids."""

import pathlib
from typing import Any

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def read(path: pathlib.Path) -> Any | None:
    """The `ModelProto` of a tokenizer.model of Llama's kind; None for others.

    Llama's kind is BPE with text taken as it is. Others normalise the text or are unigram models.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2  # its classes are made at run time
    model = proto.ModelProto.FromString(path.read_bytes())
    spec = model.normalizer_spec
    if (
        model.trainer_spec.model_type != proto.TrainerSpec.BPE
        or not model.trainer_spec.byte_fallback
        or spec.precompiled_charsmap
        or spec.remove_extra_whitespaces
        or not spec.escape_whitespaces
        or model.trainer_spec.treat_whitespace_as_suffix
    ):
        return None
    return model


def convert(path: pathlib.Path) -> Any | None:
    """The `tokenizers.Tokenizer` of a tokenizer.model; None where it would differ (see `read`)."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    model = read(path)
    if model is None:
        return None
    spec, kinds = model.normalizer_spec, type(model).SentencePiece
    pieces = [(p.piece, p.score, p.type) for p in model.pieces]
    vocab = {piece: index for index, (piece, _, _) in enumerate(pieces)}
    unknown = next(piece for piece, _, kind in pieces if kind == kinds.UNKNOWN)
    result = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges([p[:2] for p in pieces if p[2] == kinds.NORMAL]),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = [normalizers.Prepend(_SPACE)] if spec.add_dummy_prefix else []
    result.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    result.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []),
        ]
    )
    for chosen, add in (
        ((kinds.CONTROL, kinds.UNKNOWN), result.add_special_tokens),
        ((kinds.USER_DEFINED,), result.add_tokens),
    ):
        added = [piece for piece, _, kind in pieces if kind in chosen]
        add([tokenizers.AddedToken(piece, normalized=False) for piece in added])
    return result


def _merges(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """Every pair that makes a piece, best piece first: SentencePiece asks only for the result."""
    known = {piece for piece, _ in pieces}
    best_first = sorted(pieces, key=lambda pair: -pair[1])
    return [
        (piece[:cut], piece[cut:])
        for piece, _ in best_first
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]

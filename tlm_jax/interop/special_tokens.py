"""What a published model says of its special tokens and its chat template.

Of a Hugging Face folder the files that transformers reads count: the tokenizer's settings
(`tokenizer_config.json`, `special_tokens_map.json`), and `generation_config.json` or, where that is
missing, `config.json`. A GGUF file has fields of its own.
"""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

from tlm_jax import files
from tlm_jax.config import UserError
from tlm_jax.data import SpecialTokens, Tokenizer
from tlm_jax.interop import gguf_tokenizer
from tlm_jax.interop.gguf_file import GgufFile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """The special tokens of a model."""

    tokens: SpecialTokens
    prefix: tuple[int, ...]
    """What the tokenizer puts before a text: BOS or nothing."""
    chat_template: str | None
    """A Jinja program; see `data.chat`."""


def of_gguf(file: GgufFile, tokenizer: Tokenizer) -> Found:
    """Those of a GGUF file.

    Raises:
      UserError: an id that the tokenizer does not have.
    """
    where = file.where

    def ids(*names: str) -> tuple[int, ...]:
        fields = ((n, file.field(f"tokenizer.ggml.{n}_token_id")) for n in names)
        return _ids(((f"{where}: tokenizer.ggml.{n}_token_id", v) for n, v in fields), tokenizer)

    sentencepiece = file.field("tokenizer.ggml.model") == "llama"
    bos = ids("bos") or ((1,) if sentencepiece else ())
    eos = ids("eos", "eot", "eom") or ((2,) if sentencepiece else ())
    template = file.field("tokenizer.chat_template")
    return Found(
        tokens=SpecialTokens(bos=_first(bos), eos=eos, pad=_first(ids("padding"))),
        prefix=bos if gguf_tokenizer.adds_bos(file) else (),
        chat_template=template if isinstance(template, str) else None,
    )


def of_folder(folder: pathlib.Path, config: dict[str, Any], tokenizer: Tokenizer) -> Found:
    """Those of a Hugging Face folder.

    Args:
      folder: the folder.
      config: what its config.json holds.
      tokenizer: the model's.

    Raises:
      UserError: a file is damaged, or names an id that the tokenizer does not have.
    """
    own = _settings(folder / "special_tokens_map.json") | _settings(
        folder / "tokenizer_config.json"
    )
    model, where = config, folder / "config.json"
    if (folder / "generation_config.json").is_file():
        where = folder / "generation_config.json"
        model = files.read_json(where)

    def named(name: str) -> tuple[int, ...]:
        token = own.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        known = tokenizer.id_of(token) if isinstance(token, str) else None
        return () if known is None else (known,)

    def listed(name: str) -> tuple[int, ...]:
        field = f"{name}_token_id"
        values = model.get(field)
        values = values if isinstance(values, list) else [values]
        return _ids(((f"{where}: {field}", v) for v in values), tokenizer)

    # A model lists all that end its texts; of the others its tokenizer knows better.
    bos, pad = (named(name) if own else listed(name) for name in ("bos", "pad"))
    eos = tuple(dict.fromkeys((*named("eos"), *listed("eos"))))
    prefix = tokenizer.prefix_ids
    if not (folder / "tokenizer.json").is_file() and own.get("add_bos_token") is False:
        prefix = ()  # the setting of a tokenizer.model; a tokenizer.json says it itself
    return Found(
        tokens=SpecialTokens(bos=_first(bos), eos=eos, pad=_first(pad)),
        prefix=prefix,
        chat_template=chat_template(folder),
    )


def chat_template(folder: pathlib.Path) -> str | None:
    """The chat template of a Hugging Face folder, if it has one.

    Raises:
      UserError: a file is damaged.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
    template = _settings(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _settings(path: pathlib.Path) -> dict[str, Any]:
    return files.read_json(path) if path.is_file() else {}


def _ids(named: Iterable[tuple[str, Any]], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Each once; None and the -1 of old files stand for no token."""
    found: dict[int, None] = {}
    for name, value in named:
        if value is None or value == -1:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"{name} is {value!r}; it must be the id of a token")
        if not 0 <= value < tokenizer.vocab_size:
            raise UserError(
                f"{name} is {value}, and the tokenizer has only {tokenizer.vocab_size} tokens"
            )
        found[value] = None
    return tuple(found)


def _first(ids: tuple[int, ...]) -> int | None:
    return ids[0] if ids else None

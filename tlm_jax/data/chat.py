"""Chat templates: a conversation as the text that a model was taught to answer.

They are Jinja programs that come with a model, so they run in Jinja's sandbox, in the
environment that transformers gives them (`apply_chat_template`).
"""

import datetime
import json
from collections.abc import Sequence
from typing import Any

from tlm_jax.config import UserError
from tlm_jax.data.tokenizers import Tokenizer


def render(template: str, messages: Sequence[dict[str, str]], tokenizer: Tokenizer) -> str:
    """The text of a conversation, up to where the model's next answer begins.

    The names of special tokens in it are meant as those tokens (`Tokenizer.encode_prompt`), and
    none is to be put before it.

    Args:
      template: the model's.
      messages: each with a `role` (system, user, assistant) and its `content`.
      tokenizer: the model's; its special tokens are `bos_token`, `eos_token` and `pad_token`.

    Raises:
      UserError: the template is broken, or refuses the conversation.
    """
    special = tokenizer.special
    ids = {"bos": special.bos, "eos": tokenizer.end_ids[0], "pad": special.pad}
    names = {f"{name}_token": tokenizer.token_of(i) for name, i in ids.items() if i is not None}
    try:
        return (
            _environment()
            .from_string(template)
            .render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **names,
            )
        )
    except Exception as error:  # it is a program, and not ours
        raise UserError(f"the model's chat template cannot be applied: {error}") from None


def _environment() -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the model writes; it changes no text."""

        tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
        # Jinja's own escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)

    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    found.filters["tojson"] = tojson
    found.globals["raise_exception"] = raise_exception
    found.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return found

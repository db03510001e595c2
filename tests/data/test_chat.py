import dataclasses
import re

import pytest

from tlm_jax.config import UserError
from tlm_jax.data import SpecialTokens, chat, load_tokenizer

TOKENIZER = dataclasses.replace(load_tokenizer(None), special=SpecialTokens(bos=0, eos=(0,)))
MESSAGES = [{"role": "user", "content": "2 < 3 & <b>"}]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # Blocks leave no blank lines, and nothing is escaped as HTML.
        ("{% if tools is none %}\n  {% set x = 1 %}\n{{ messages[0].content }}\n{% endif %}",
         "2 < 3 & <b>\n"),
        ("{{ bos_token }}{{ eos_token }}{{ pad_token }}", "<|endoftext|><|endoftext|>"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "2 < 3 & <b>"}]'),
        ("{% for m in messages %}{% generation %}a{% endgeneration %}{% break %}{% endfor %}", "a"),
        ("{{ strftime_now('%Y') | length }}{{ add_generation_prompt }}", "4True"),
    ],
)  # fmt: skip
def test_as_transformers_renders(template: str, expected: str) -> None:
    assert chat.render(template, MESSAGES, TOKENIZER) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ messages.append(1) }}", "access to attribute 'append'"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "access to attribute '__class__'"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_template_that_fails_or_breaks_out(template: str, message: str) -> None:
    with pytest.raises(UserError, match=f"chat template cannot be applied: .*{re.escape(message)}"):
        chat.render(template, MESSAGES, TOKENIZER)

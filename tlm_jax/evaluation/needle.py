"""Needles in a haystack: facts hidden in a long text, asked for at its end.

In the manner of RULER's S-NIAH-1, 2 and 3 and its multi-query variant (arXiv 2404.06654): a
number in noise, a number in prose, a UUID in prose; four numbers in prose, all asked for at once.
A text scores the share of answers that it contains, in any case of letters (RULER's
string_match_all). The wording is ours; for RULER's own, use lm-eval's niah_single_1.
"""

import dataclasses
import functools
import hashlib
import itertools
import pathlib
import random
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tlm_jax.config import UserError
from tlm_jax.data import Tokenizer
from tlm_jax.evaluation.generation import Generator
from tlm_jax.evaluation.journal import Journal
from tlm_jax.evaluation.options import NeedleConfig, Variant
from tlm_jax.validation import largest

LENGTHS = (1024, 2048, 4096, 8192, 16384)
"""Tokens of prompt and answer."""
ANSWER_TOKENS = 128
QUERIES = 4
"""Keys that niah_multiquery asks for, as in RULER's synthetic.yaml."""

NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
_FIRST = "amber brave calm daring early fancy gentle hidden icy jolly keen lively mellow noble odd"
_SECOND = "anchor bridge candle desert engine forest garden harbor island jacket kettle ladder"
WORDS = tuple(f"{a}-{b}" for a in _FIRST.split() for b in _SECOND.split())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One question and what answers it."""

    variant: Variant
    length: int
    depth: float
    """Where the needle of the first answer is: 0 at the beginning, 1 at the end."""
    prompt: str
    answers: tuple[str, ...]
    """One, or that of each key in the order asked."""


def make_examples(
    config: NeedleConfig, lengths: Sequence[int], tokenizer: Tokenizer, prose: str, taken: int = 0
) -> Iterator[Example]:
    """All examples, the same for the same config, tokenizer and prose.

    Args:
      config: which examples.
      lengths: tokens of prompt and answer.
      tokenizer: counts them.
      prose: the haystack of all variants but niah_single_1.
      taken: tokens of each length that something else needs.

    Raises:
      UserError: a length is too short for the question, or the prose too short for a length.
    """
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", prose) if s]
    depths = [i / max(1, config.num_depths - 1) for i in range(config.num_depths)]
    for variant, length, depth, sample in itertools.product(
        config.variants, lengths, depths, range(config.samples)
    ):
        rng = random.Random(f"{config.seed} {variant} {length} {depth:.4f} {sample}")
        yield make_example(variant, length, depth, tokenizer, sentences, rng, taken=taken)


def make_example(
    variant: Variant,
    length: int,
    depth: float,
    tokenizer: Tokenizer,
    sentences: Sequence[str],
    rng: random.Random,
    *,
    taken: int = 0,
    answer_tokens: int = ANSWER_TOKENS,
) -> Example:
    """An example whose prompt leaves room for `taken` and `answer_tokens` in `length` tokens.

    The first needle is at `depth`; further ones are anywhere (our choice: RULER draws all
    depths).
    """
    what = "UUID" if variant == "niah_single_3" else "number"
    if variant == "niah_multiquery":
        keys = rng.sample(WORDS, QUERIES)
        answers = tuple(map(str, rng.sample(range(10**6, 10**7), QUERIES)))
        depths = [depth, *(rng.random() for _ in keys[1:])]
        it, them = f"Some special magic {what}s are", "them"
        asked = f"{', '.join(keys[:-1])}, and {keys[-1]}"
        question = (
            f"What are all the special magic {what}s for {asked}? "
            f"The special magic {what}s for {asked} are:"
        )
    else:
        keys = [rng.choice(WORDS)]
        number = what == "number"
        answers = (
            str(rng.randint(10**6, 10**7 - 1))
            if number
            else str(uuid.UUID(int=rng.getrandbits(128), version=4)),
        )
        depths = [depth]
        it, them = f"A special magic {what} is", "it"
        question = (
            f"What is the special magic {what} for {keys[0]}? "
            f"The special magic {what} for {keys[0]} is:"
        )
    needles = [
        f"One of the special magic {what}s for {key} is: {answer}."
        for key, answer in zip(keys, answers, strict=True)
    ]
    noise = variant == "niah_single_1"
    separator = "\n" if noise else " "
    first = rng.randrange(len(sentences)) if sentences else 0

    def prompt(count: int) -> str:
        if noise:
            hay = [NOISE[i % len(NOISE)] for i in range(count)]
        else:
            hay = [sentences[(first + i) % len(sentences)] for i in range(count)]
        # The deepest first, so that those before it stay where they are.
        for where, needle in sorted(zip(depths, needles, strict=True), reverse=True):
            hay.insert(round(where * count), needle)
        return (
            f"{it} hidden in the following text. Remember {them}; there will be "
            f"a question about {them}.\n{separator.join(hay)}\n{question}"
        )

    room = length - taken - answer_tokens
    if len(tokenizer.encode(prompt(0))) > room:
        raise UserError(
            f"a needle does not fit into {length} tokens: the question and {answer_tokens} tokens "
            f"for the answer need {len(tokenizer.encode(prompt(0))) + taken + answer_tokens}"
        )
    if not noise and not sentences:
        raise UserError("the haystack has no sentences")
    most = largest(lambda count: len(tokenizer.encode(prompt(count))) <= room)
    return Example(
        variant=variant, length=length, depth=depth, prompt=prompt(most), answers=answers
    )


def read_prose(path: pathlib.Path | None) -> str:
    """The haystack of a user, or held-out prose of the package's own.

    Raises:
      UserError: no such file, or not UTF-8.
    """
    if path is None:
        from tlm_jax.data.sources import EmbeddedSource

        return "\n".join(EmbeddedSource().texts("validation"))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def fingerprints(config: NeedleConfig, prose: str) -> dict[str, str]:
    """16 hex digits for each variant that change with its examples (of whatever lengths)."""
    about = f"{config.seed} {config.num_depths} {config.samples}"
    return {
        variant: hashlib.sha256(
            f"{about} {'' if variant == 'niah_single_1' else prose}".encode()
        ).hexdigest()[:16]
        for variant in config.variants
    }


def default_lengths(longest: int) -> tuple[int, ...]:
    """1024 to 16384 tokens, as far as `longest`; that alone where it is less."""
    return tuple(n for n in LENGTHS if n <= longest) or (longest,)


def run(
    generator: Generator,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    prefix: Sequence[int],
    journal: Journal,
    advance: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    """Asks a model and says of each example which share of the answers its text contains.

    Args:
      generator: the model.
      tokenizer: the model's.
      examples: the questions.
      prefix: token ids before every text.
      journal: texts that are known already, and where new ones are kept.
      advance: told of progress.
    """
    keys = [" ".join(("needle", e.prompt, *e.answers)) for e in examples]
    texts = journal.answers(
        keys,
        lambda missing: generator.generate(
            [(*prefix, *tokenizer.encode(examples[i].prompt)) for i in missing],
            max_tokens=[ANSWER_TOKENS] * len(missing),
            # With one answer, its end is the end; of several, none is.
            stops=[examples[i].answers if len(examples[i].answers) == 1 else () for i in missing],
            keep_stop=True,
        ),
        functools.partial(advance, "needles"),
    )
    return [
        {
            "variant": e.variant,
            "length": e.length,
            "depth": e.depth,
            "prompt": e.prompt,
            "answers": list(e.answers),
            "text": text,
            "score": sum(a.lower() in text.lower() for a in e.answers) / len(e.answers),
        }
        for e, text in zip(examples, texts, strict=True)
    ]

"""A needle in a haystack: one fact hidden in a long text, asked for at its end.

In the manner of RULER's S-NIAH-1, 2 and 3 (arXiv 2404.06654): a number in noise, a number in
prose, a UUID in prose. The wording is ours; for RULER's own, use lm-eval's niah_single_1.
"""

import dataclasses
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

LENGTHS = (1024, 2048, 4096, 8192, 16384)
"""Tokens of prompt and answer."""
ANSWER_TOKENS = 128

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
    """One question and its answer."""

    variant: Variant
    length: int
    depth: float
    """Where the needle is: 0 at the beginning, 1 at the end."""
    prompt: str
    answer: str


def make_examples(
    config: NeedleConfig, lengths: Sequence[int], tokenizer: Tokenizer, prose: str, taken: int = 0
) -> Iterator[Example]:
    """All examples, the same for the same config, tokenizer and prose.

    Args:
      config: which examples.
      lengths: tokens of prompt and answer.
      tokenizer: counts them.
      prose: the haystack of variants 2 and 3.
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
    """An example whose prompt leaves room for `taken` and `answer_tokens` in `length` tokens."""
    key = rng.choice(WORDS)
    what = "UUID" if variant == "niah_single_3" else "number"
    answer = (
        str(uuid.UUID(int=rng.getrandbits(128), version=4))
        if what == "UUID"
        else str(rng.randint(10**6, 10**7 - 1))
    )
    needle = f"One of the special magic {what}s for {key} is: {answer}."
    noise = variant == "niah_single_1"
    separator = "\n" if noise else " "
    first = rng.randrange(len(sentences)) if sentences else 0

    def prompt(count: int) -> str:
        if noise:
            hay = [NOISE[i % len(NOISE)] for i in range(count)]
        else:
            hay = [sentences[(first + i) % len(sentences)] for i in range(count)]
        hay.insert(round(depth * count), needle)
        return (
            f"A special magic {what} is hidden in the following text. Remember it; there will be "
            f"a question about it.\n{separator.join(hay)}\n"
            f"What is the special magic {what} for {key}? The special magic {what} for {key} is:"
        )

    room = length - taken - answer_tokens
    if len(tokenizer.encode(prompt(0))) > room:
        raise UserError(
            f"a needle does not fit into {length} tokens: the question and {answer_tokens} tokens "
            f"for the answer need {len(tokenizer.encode(prompt(0))) + taken + answer_tokens}"
        )
    if not noise and not sentences:
        raise UserError("the haystack has no sentences")
    low, high = 0, 1
    while len(tokenizer.encode(prompt(high))) <= room:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = len(tokenizer.encode(prompt(middle))) <= room
        low, high = (middle, high) if fits else (low, middle)
    return Example(variant=variant, length=length, depth=depth, prompt=prompt(low), answer=answer)


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
    """Asks a model and says of each example whether its text contains the answer.

    Args:
      generator: the model.
      tokenizer: the model's.
      examples: the questions.
      prefix: token ids before every text.
      journal: texts that are known already, and where new ones are kept.
      advance: told of progress.
    """
    keys = [f"needle {e.prompt} {e.answer}" for e in examples]
    found = journal.known(keys)
    missing = [i for i, key in enumerate(keys) if key not in found]
    advance("needles", len(found), len(examples))
    for index, text in generator.generate(
        [(*prefix, *tokenizer.encode(examples[i].prompt)) for i in missing],
        max_tokens=[ANSWER_TOKENS] * len(missing),
        stops=[[examples[i].answer] for i in missing],
        keep_stop=True,
    ):
        key = keys[missing[index]]
        found[key] = text
        journal.add(key, text)
        advance("needles", len(found), len(examples))
    return [
        {
            "variant": e.variant,
            "length": e.length,
            "depth": e.depth,
            "answer": e.answer,
            "text": found[key],
            "correct": e.answer.lower() in found[key].lower(),
        }
        for e, key in zip(examples, keys, strict=True)
    ]

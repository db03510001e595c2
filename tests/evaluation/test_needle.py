"""Needles: the same for the same seed, as long as asked for, at the depth asked for."""

import pathlib
import random
import re
from collections.abc import Mapping

import numpy as np
import pytest

from tlm_jax.config import UserError
from tlm_jax.data import load_tokenizer
from tlm_jax.evaluation import needle
from tlm_jax.evaluation.journal import Journal
from tlm_jax.evaluation.options import NeedleConfig

TOKENIZER = load_tokenizer(None)
PROSE = " ".join(f"Sentence {i} is about nothing at all." for i in range(40))


def examples(**changes) -> list[needle.Example]:
    config = NeedleConfig(num_depths=3, samples=2, **changes)
    return list(needle.make_examples(config, (512, 1024), TOKENIZER, PROSE))


def test_examples_are_reproducible() -> None:
    """Equal seeds give equal examples, others others."""
    assert examples() == examples()
    assert [e.answers for e in examples()] != [e.answers for e in examples(seed=1)]
    assert len({a for e in examples() for a in e.answers}) == (3 + needle.QUERIES) * 2 * 3 * 2


def test_lengths_depths_and_answers() -> None:
    """Prompts fill their length up to a sentence, and hide the answer once, where they say."""
    for example in examples():
        size = len(TOKENIZER.encode(example.prompt))
        room = example.length - needle.ANSWER_TOKENS
        assert room - 40 < size <= room
        assert [example.prompt.count(answer) for answer in example.answers] in ([1], [1] * 4)
        hay = example.prompt.split("\n", 1)[1].rsplit("\n", 1)[0]
        first = re.search(rf"One of the special magic \S+ for \S+ is: {example.answers[0]}", hay)
        assert first is not None
        at = first.start() / (len(hay) - len("One of the special magic"))
        assert at == pytest.approx(example.depth, abs=0.3 if len(example.answers) > 1 else 0.12)
        for answer in example.answers:
            assert len(answer) == 36 if example.variant == "niah_single_3" else answer.isdigit()
        noise = "The grass is green." in example.prompt
        assert noise == (example.variant == "niah_single_1")


def test_too_short_a_length_is_an_error() -> None:
    """The message says what is needed."""
    rng = random.Random(0)
    with pytest.raises(UserError, match=r"does not fit into 150 tokens: .* need \d+"):
        needle.make_example("niah_single_1", 150, 0.5, TOKENIZER, (), rng)


def test_several_values_are_asked_for_at_once() -> None:
    """RULER's multi-query: four keys in one question, each with a needle of its own."""
    (example, *_) = examples(variants=("niah_multiquery",))
    question = example.prompt.rsplit("\n", 1)[1]
    keys = re.findall(r"[a-z]+-[a-z]+", question.split("?")[0])
    assert len(set(keys)) == 4
    assert question.endswith(f"for {', '.join(keys[:3])}, and {keys[3]} are:")
    for key, answer in zip(keys, example.answers, strict=True):
        sentence = f"One of the special magic numbers for {key} is: {answer}."
        assert example.prompt.count(sentence) == 1
    orders = set()
    for one in examples(variants=("niah_multiquery",)):
        hay = one.prompt
        orders.add(tuple(sorted(range(4), key=lambda i: hay.index(one.answers[i]))))
    assert len(orders) > 1  # where they stand says nothing of which was asked first


def test_forty_depths_as_ruler_has_them() -> None:
    """np.linspace(0, 100, 40) percent, to its rounding."""
    config = NeedleConfig(num_depths=40, samples=1, variants=("niah_single_1",))
    depths = [e.depth for e in needle.make_examples(config, (512,), TOKENIZER, PROSE)]
    assert np.round(np.linspace(0, 100, 40)) == pytest.approx(100 * np.array(depths), abs=0.5)


class Parrot:
    """Stands for a model: repeats so many of the needles in the prompt, in capitals."""

    def __init__(self, known: Mapping[int, int]) -> None:
        self.known = known

    def generate(self, prompts, *, max_tokens, stops, keep_stop):
        assert keep_stop
        assert set(max_tokens) <= {needle.ANSWER_TOKENS}
        for index, (stop, prompt) in enumerate(zip(stops, prompts, strict=True)):
            assert prompt[0] == 7  # the prefix
            found = re.findall(r"is: (\S+)\.", TOKENIZER.decode(prompt[1:]))
            assert list(stop) == (found if len(found) == 1 else [])
            yield index, f" {' and '.join(found[: self.known.get(index, 0)])}.".upper()


def test_scoring_by_containment(tmp_path: pathlib.Path) -> None:
    """An answer counts wherever it stands and in any case; answers that are known are kept."""
    some = examples()
    parrot = Parrot(dict.fromkeys(range(0, len(some), 3), 1) | {len(some) - 1: 3})
    journal = Journal(tmp_path / "a.jsonl", {})
    answers = needle.run(parrot, TOKENIZER, some, prefix=(7,), journal=journal, advance=_nothing)
    share = [1 / len(e.answers) if i % 3 == 0 else 0 for i, e in enumerate(some)]
    assert [a["score"] for a in answers] == [*share[:-1], 0.75]
    assert [a["prompt"] for a in answers] == [e.prompt for e in some]
    again = needle.run(
        Parrot({}),
        TOKENIZER,
        some,
        prefix=(7,),
        journal=Journal(tmp_path / "a.jsonl", {}),
        advance=_nothing,
    )
    assert again == answers


def _nothing(what: str, done: int, total: int) -> None:
    del what, done, total


def test_a_haystack_of_ones_own(tmp_path: pathlib.Path) -> None:
    """A UTF-8 file; mistakes are named."""
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text(PROSE)
    bad.write_bytes(b"ab\xff")
    assert needle.read_prose(good) == PROSE
    with pytest.raises(UserError, match=r"bad.txt is not UTF-8 \(byte 2\)"):
        needle.read_prose(bad)
    with pytest.raises(UserError, match=r"none.txt cannot be read: No such file"):
        needle.read_prose(tmp_path / "none.txt")
    assert len(needle.read_prose(None)) > 100_000

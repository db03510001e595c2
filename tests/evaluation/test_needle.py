"""Needles: the same for the same seed, as long as asked for, at the depth asked for."""

import pathlib
import random

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
    assert [e.answer for e in examples()] != [e.answer for e in examples(seed=1)]
    assert len({e.answer for e in examples()}) == 3 * 2 * 3 * 2


def test_lengths_depths_and_answers() -> None:
    """Prompts fill their length up to a sentence, and hide the answer once, where they say."""
    for example in examples():
        size = len(TOKENIZER.encode(example.prompt))
        room = example.length - needle.ANSWER_TOKENS
        assert room - 40 < size <= room
        assert example.prompt.count(example.answer) == 1
        hay = example.prompt.split("\n", 1)[1].rsplit("\n", 1)[0]
        at = hay.index("One of the special") / (len(hay) - len("One of the special magic"))
        assert at == pytest.approx(example.depth, abs=0.12)
        kind = {"1": str.isdigit, "2": str.isdigit, "3": lambda a: len(a) == 36}
        assert kind[example.variant[-1]](example.answer)
        noise = "The grass is green." in example.prompt
        assert noise == (example.variant == "niah_single_1")


def test_too_short_a_length_is_an_error() -> None:
    """The message says what is needed."""
    rng = random.Random(0)
    with pytest.raises(UserError, match=r"does not fit into 150 tokens: .* need \d+"):
        needle.make_example("niah_single_1", 150, 0.5, TOKENIZER, (), rng)


class Parrot:
    """Stands for a model: repeats the words around the needle, for some prompts only."""

    def __init__(self, knows: set[int]) -> None:
        self.knows, self.asked = knows, 0

    def generate(self, prompts, *, max_tokens, stops, keep_stop):
        assert keep_stop
        assert set(max_tokens) <= {needle.ANSWER_TOKENS}
        for index, ((answer,), prompt) in enumerate(zip(stops, prompts, strict=True)):
            self.asked += 1
            assert prompt[0] == 7  # the prefix
            yield index, f" it is {answer.upper()}." if index in self.knows else " no idea"


def test_scoring_by_containment(tmp_path: pathlib.Path) -> None:
    """An answer counts wherever it stands and in any case; answers that are known are kept."""
    some = examples()
    parrot = Parrot(set(range(0, len(some), 3)))
    journal = Journal(tmp_path / "a.jsonl", {})
    answers = needle.run(parrot, TOKENIZER, some, prefix=(7,), journal=journal, advance=_nothing)
    assert [a["correct"] for a in answers] == [i % 3 == 0 for i in range(len(some))]
    again = needle.run(
        Parrot(set()),
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

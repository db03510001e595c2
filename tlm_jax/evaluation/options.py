"""What is to be evaluated; needs neither jax nor lm-eval."""

import dataclasses
import pathlib
from typing import Literal

from tlm_jax.validation import require

Variant = Literal["niah_single_1", "niah_single_2", "niah_single_3", "niah_multiquery"]
VARIANTS: tuple[Variant, ...] = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multiquery",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleConfig:
    """Which needles are looked for."""

    variants: tuple[Variant, ...] = VARIANTS
    """niah_single_1: a number in noise; 2: a number in prose; 3: a UUID in prose;
    niah_multiquery: four numbers in prose, all asked for at once."""
    lengths: tuple[int, ...] = ()
    """Tokens of prompt and answer, whatever length the model was trained with (the paper's: 4096
    8192 16384); () is 1024 to 16384, as far as it was trained."""
    num_depths: int = 10
    """Places of the needle, evenly from the beginning to the end; RULER has 40."""
    samples: int = 2
    """Examples of each variant, length and depth."""
    haystack: pathlib.Path | None = None
    """UTF-8 text to hide needles in, for all but 1; None is prose that the package carries."""
    seed: int = 0
    """Seed of keys, values and of where in the prose a haystack begins."""

    def __post_init__(self) -> None:
        if self.num_depths < 1 or self.samples < 1 or any(n < 1 for n in self.lengths):
            raise ValueError("needle lengths, num_depths and samples must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """What is evaluated, and on how much."""

    tasks: tuple[str, ...] = ()
    """Suites and tasks, such as: paper, or lambada piqa."""
    data_dir: pathlib.Path | None = None
    """Folder with TASK/SPLIT.jsonl; None reads the tasks' data from the hub."""
    limit: int | None = None
    """First documents of each task; None is all."""
    num_fewshot: int | None = None
    """Examples before each question; None is what the task says."""
    max_length: int | None = None
    """Most tokens that the model reads; None is data.seq_len."""
    batch_tokens: int | None = None
    """Tokens of a batch; None derives it from the free memory."""
    log_samples: bool = False
    """Write what was asked and answered, with log-likelihoods, to eval/*.samples.jsonl."""
    needle: NeedleConfig = dataclasses.field(default_factory=NeedleConfig)

    def __post_init__(self) -> None:
        for name, least, none in (
            ("limit", 1, "all documents"),
            ("num_fewshot", 0, "what the task says"),
            ("max_length", 1, "data.seq_len"),
            ("batch_tokens", 1, "what the memory allows"),
        ):
            value = getattr(self, name)
            require(
                value is None or value >= least,
                f"{name} must be at least {least}, or None for {none}; it is {value}",
            )

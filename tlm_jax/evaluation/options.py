"""What is to be evaluated; needs neither jax nor lm-eval."""

import dataclasses
import pathlib
from typing import Literal

from tlm_jax.validation import Checked, Count, NaturalNumber, Seed

Variant = Literal["niah_single_1", "niah_single_2", "niah_single_3", "niah_multiquery"]
VARIANTS: tuple[Variant, ...] = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multiquery",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleConfig(Checked):
    """Which needles are looked for."""

    variants: tuple[Variant, ...] = VARIANTS
    """niah_single_1: a number in noise; 2: a number in prose; 3: a UUID in prose;
    niah_multiquery: four numbers in prose, all asked for at once."""
    lengths: tuple[Count, ...] = ()
    """Tokens of prompt and answer, whatever length the model was trained with (the paper's: 4096
    8192 16384); () is 1024 to 16384, as far as it was trained."""
    num_depths: Count = 10
    """Places of the needle, evenly from the beginning to the end; RULER has 40."""
    samples: Count = 2
    """Examples of each variant, length and depth."""
    haystack: pathlib.Path | None = None
    """UTF-8 text to hide needles in, for all but 1; None is prose that the package carries."""
    seed: Seed = 0
    """Seed of keys, values and of where in the prose a haystack begins."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuiteConfig(Checked):
    """What is evaluated, and on how much."""

    tasks: tuple[str, ...] = ()
    """Suites and tasks, such as: paper, or lambada piqa."""
    data_dir: pathlib.Path | None = None
    """Folder with TASK/SPLIT.jsonl; None reads the tasks' data from the hub."""
    limit: Count | None = None
    """First documents of each task; None is all."""
    num_fewshot: NaturalNumber | None = None
    """Examples before each question; None is what the task says."""
    max_length: Count | None = None
    """Most tokens that the model reads; None is data.seq_len."""
    batch_tokens: Count | None = None
    """Tokens of a batch; None derives it from the free memory."""
    log_samples: bool = False
    """Write what was asked and answered, with log-likelihoods, to eval/*.samples.jsonl."""
    needle: NeedleConfig = dataclasses.field(default_factory=NeedleConfig)

"""tlm generate."""

import dataclasses
import pathlib
from collections.abc import Sequence

import tyro

from tlm_jax.cli.parsing import parse, quiet_libraries
from tlm_jax.config import UserError
from tlm_jax.distributed import start


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Continue a prompt with a checkpoint's model."""

    checkpoint: pathlib.Path
    """Run folder."""
    step: int | None = None
    """Step of the checkpoint; None is the newest."""
    prompt: str = "The "
    """Text to continue. Names of special tokens in it, such as <|im_start|>, are read as tokens."""
    chat: bool = False
    """The prompt is a user's message: apply the model's chat template, and print the answer."""
    num_tokens: int = 200
    """Tokens to write."""
    num_samples: int = 1
    """Number of continuations."""
    temperature: float = 0.8
    """0 is greedy."""
    top_k: int = 0
    """Draw among this many likeliest tokens; 0 is all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that hold this share of the probability."""
    seed: int = 0
    """Seed of the draws."""


def run(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm generate`; returns the exit status."""
    command = parse(Command, argv, prog, checkpoint=tyro.MISSING)
    quiet_libraries()
    start.keep_programs()
    from tlm_jax.models.sampling import SamplingConfig
    from tlm_jax.training import restore

    if command.num_tokens < 1 or command.num_samples < 1:
        raise UserError("--num_tokens and --num_samples must be at least 1")
    try:
        how = SamplingConfig(
            temperature=command.temperature, top_k=command.top_k, top_p=command.top_p
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    step, metadata = restore.saved_metadata(command.checkpoint, command.step)
    shown, texts = 0, [""]
    for texts in restore.generate(
        command.checkpoint,
        step,
        restore.saved_config(metadata),
        command.prompt,
        how,
        num_tokens=command.num_tokens,
        num_samples=command.num_samples,
        seed=command.seed,
        as_chat=command.chat,
    ):
        if command.num_samples == 1 and not texts[0].endswith("\N{REPLACEMENT CHARACTER}"):
            print(texts[0][shown:], end="", flush=True)
            shown = len(texts[0])
    if command.num_samples == 1:
        print(texts[0][shown:])
    else:
        for number, text in enumerate(texts, 1):
            print(f"--- {number}\n{text}")
    return 0

"""tlm export."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Literal

import tyro

from tlm_jax import files, output
from tlm_jax.cli.parsing import parse, quiet_libraries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Write a checkpoint's model for other tools, with tokenizer and model card."""

    checkpoint: pathlib.Path
    """Run folder."""
    out: pathlib.Path
    """Folder to make."""
    step: int | None = None
    """Step of the checkpoint; None is the newest."""
    format: Literal["llama", "compact", "native"] | None = None
    """llama: MLPs zero-padded to the widest, for any tool. compact: own widths, for transformers
    with remote code. native: our names, for any model. None: llama where possible, else native."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the tensors; bfloat16 rounds."""


def run(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm export`; returns the exit status."""
    command = parse(Command, argv, prog, checkpoint=tyro.MISSING, out=tyro.MISSING)
    quiet_libraries()
    from tlm_jax.interop import exporting

    with files.named(command.out):
        form = exporting.export_model(
            command.checkpoint,
            command.out,
            step=command.step,
            form=command.format,
            dtype=command.dtype,
        )
    output.console().print(
        f"{command.out} holds the model, format {form}, {command.dtype}; "
        f"its card is {command.out / 'README.md'}",
        highlight=False,
        soft_wrap=True,
    )
    return 0

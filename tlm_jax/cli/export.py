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
    format: Literal["llama", "compact", "deci", "gguf", "native"] | None = None
    """llama: MLPs zero-padded to the widest, for any tool, as Llama or the relative of it that the
    model is (Mistral, Qwen2, Qwen3, SmolLM3). Every layer at its own width: compact for
    transformers with remote code (any architecture), deci for vLLM, gguf for llama.cpp (tapered
    heads too). native: our names, for any model. None: llama where possible, else compact, else
    native."""
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] = "float32"
    """Type of the tensors; all but float32 round. float16 and q8_0 (8 bits and a scale for every
    32 weights) need --format gguf."""


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
    )
    return 0

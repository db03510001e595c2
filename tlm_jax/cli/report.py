"""tlm report."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console

from tlm_jax.cli.parsing import parse
from tlm_jax.config import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Results of tlm eval --tasks, several checkpoints side by side."""

    runs: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional] = ()
    """Run folders, or JSON files that tlm eval wrote."""
    markdown: bool = False
    """Print Markdown."""


def run(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm report`; returns the exit status."""
    command = parse(Command, argv, prog)
    if not command.runs:
        raise UserError(f"{prog} needs run folders: {prog} runs/a runs/b")
    from tlm_jax.evaluation import records

    found = [one for folder in command.runs for one in records.read(folder)]
    if command.markdown:
        print(records.markdown(found))
    else:
        Console().print(records.table(found))
    return 0

"""tlm ladder."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated

import tyro

from tlm_jax.cli.parsing import parse
from tlm_jax.cli.report import show
from tlm_jax.config import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Fit how a taper's gain changes with compute, over sizes and training lengths."""

    sweeps: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional] = ()
    """Folder of a sweep (configs/sweeps/ladder.py), or its JSON lines. Of further ones, the pairs
    of the first one's tapers join the line; give no run twice."""
    page: pathlib.Path | None = None
    """A Markdown page; the part between <!-- NAME --> and <!-- end NAME --> is rewritten."""
    part: str = "ladder"
    """NAME of that part."""


def run(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm ladder`; returns the exit status."""
    command = parse(Command, argv, prog)
    if not command.sweeps:
        raise UserError(f"{prog} needs a sweep: {prog} runs/sweeps/ladder-cpu")
    from tlm_jax.analysis import ladder, sweep_report

    text = ladder.markdown([sweep_report.read(path) for path in command.sweeps])
    show(text, page=command.page, part=command.part)
    return 0

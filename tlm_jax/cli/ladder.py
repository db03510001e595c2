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
    """Whether a taper's gain fades with compute: a line through a sweep over sizes and lengths."""

    sweep: Annotated[pathlib.Path | None, tyro.conf.Positional] = None
    """Folder of the sweep (configs/sweeps/ladder.py), or its JSON lines."""
    page: pathlib.Path | None = None
    """A Markdown page, whose part between <!-- NAME --> and <!-- end NAME --> it rewrites."""
    part: str = "ladder"
    """NAME of that part."""


def run(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm ladder`; returns the exit status."""
    command = parse(Command, argv, prog)
    if command.sweep is None:
        raise UserError(f"{prog} needs a sweep: {prog} runs/sweeps/ladder-cpu")
    from tlm_jax.analysis import ladder, sweep_report

    text = ladder.markdown(sweep_report.read(command.sweep))
    show(text, page=command.page, part=command.part)
    return 0

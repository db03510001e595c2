"""tlm importance."""

import dataclasses
import pathlib
from collections.abc import Sequence

import tyro

from tlm_jax import output
from tlm_jax.cli.align import propose
from tlm_jax.cli.parsing import parse, quiet_libraries
from tlm_jax.config import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Measure how much each MLP's units matter to the loss, and propose widths in proportion."""

    checkpoint: pathlib.Path
    """Run folder, of a run or an imported model."""
    step: int | None = None
    """Step of the checkpoint; None is the newest."""
    rows: int = 64
    """About how many rows to average over, spread evenly over the validation split."""


def run(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm importance`; returns the exit status."""
    command = parse(Command, argv, prog, checkpoint=tyro.MISSING)
    if command.rows < 1:
        raise UserError("--rows must be at least 1")
    quiet_libraries()
    from tlm_jax.analysis import importance
    from tlm_jax.training import restore

    step, metadata = restore.saved_metadata(command.checkpoint, command.step)
    config = restore.saved_config(metadata)
    found = importance.measure(command.checkpoint, step, config, rows=command.rows)
    title = f"{config.name}, step {step}" if step else config.name
    output.console().print(importance.table(title, found))
    propose("importance", [float(one.units.sum()) for one in found], config.model)
    return 0

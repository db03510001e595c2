"""tlm plan."""

import dataclasses
import pathlib
from collections.abc import Sequence

import tyro

from tlm_jax import config_io, output
from tlm_jax.cli.parsing import Run, parse, path_after
from tlm_jax.config import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Widths, segments, parameters, FLOPs and memory of a config, without a device."""

    config: pathlib.Path
    """Python file with get_config(), such as configs/tlm_440m.py or configs/tlm_440m.py:titans."""
    run: Run
    png: pathlib.Path | None = None
    """Where to draw the widths; None is NAME_plan.png in the current folder."""


def run(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm plan`; returns the exit status."""
    defaults = config_io.load_config(path_after("--config", argv, prog))
    command = parse(Command, argv, prog, config=tyro.MISSING, run=defaults)
    from tlm_jax.analysis import plan as plan_lib
    from tlm_jax.analysis import plots

    console = output.console()
    plan_lib.plan(command.run, console)
    png = command.png or pathlib.Path(f"{command.run.name}_plan.png")
    try:
        plots.plot_plan(command.run.model, png)
    except OSError as error:
        raise UserError(f"cannot write {png}: {error.strerror}") from error
    console.print(f"Drawn in {png}", highlight=False)
    return 0

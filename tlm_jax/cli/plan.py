"""tlm plan."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Literal

import tyro
from rich.console import Console

from tlm_jax import config_io, output
from tlm_jax.cli.parsing import Run, parse, path_after, quiet_libraries
from tlm_jax.config import RunConfig, UserError
from tlm_jax.distributed import topology
from tlm_jax.validation import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Widths, segments, parameters, FLOPs and memory of a config, without a device."""

    config: pathlib.Path
    """Python file with get_config(), such as configs/tlm_440m.py or configs/tlm_440m.py:titans, or
    the name of one that ships with the package, such as tlm_440m or tlm_440m:titans."""
    run: Run
    devices: int | None = None
    """Devices sharing a step; None is the topology's, or the fewest that the mesh allows."""
    target: Literal["tpu", "cpu"] = "tpu"
    """Hardware that memory is estimated for."""
    topology: str | None = None
    """TPU slice, such as v5e:4x4: memory on each of its chips, and whether that fits."""
    scale: bool = False
    """Instead: a table of TPU slices from 16 to 2,048 chips, by formula (docs/pods.md)."""
    png: pathlib.Path | None = None
    """Where to draw the widths; None is NAME_plan.png in the current folder."""

    def __post_init__(self) -> None:
        require(
            self.devices is None or self.devices > 0,
            f"devices is {self.devices}; it must be at least 1",
        )
        require(
            self.topology is None or (self.devices is None and self.target == "tpu"),
            f"--topology {self.topology} says which devices there are; leave out --devices and "
            "--target",
        )
        require(
            not self.scale or (self.topology is None and self.devices is None),
            "--scale has its own slices; leave out --topology and --devices",
        )


def run(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm plan`; returns the exit status."""
    defaults = config_io.load_config(path_after("--config", argv, prog))
    command = parse(Command, argv, prog, config=tyro.MISSING, run=defaults)
    os.environ["JAX_PLATFORMS"] = "cpu"  # layers are traced: no accelerator is asked for
    quiet_libraries()
    from tlm_jax.analysis import plan as plan_lib
    from tlm_jax.analysis import plots

    console = output.console()
    if command.scale:
        _scale(command.run, console)
        return 0
    devices, limit = command.devices, None
    if command.topology is not None:
        wanted = topology.parse(command.topology)
        devices, limit = math.prod(wanted.shape), topology.memory_limit(wanted.chip)
    plan_lib.plan(command.run, console, devices=devices, target=command.target, limit=limit)
    png = command.png or pathlib.Path(f"{command.run.name}_plan.png")
    try:
        plots.plot_plan(command.run.model, png)
    except OSError as error:
        raise UserError(f"cannot write {png}: {error.strerror}") from error
    console.print(f"Drawn in {png}")
    return 0


def _scale(config: RunConfig, console: Console) -> None:
    """One block per slice: the table is too wide for a terminal."""
    from tlm_jax.analysis import scale

    for name in scale.SLICES:
        words = scale.row(scale.scale(config, name))
        console.print(f"{config.name} on {words[0]}", style="bold")
        for label, value in zip(scale.HEADER[1:], words[1:], strict=True):
            console.print(f"  {label:24} {value}")

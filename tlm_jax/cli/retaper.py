"""tlm retaper."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from tlm_jax import output
from tlm_jax.cli.parsing import parse, quiet_libraries
from tlm_jax.config import TaperConfig, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuringConfig:
    """What importance and losses are measured on."""

    path: str | None = None
    """Text file, folder of them, or one of `tlm prepare`; None is the run's own text, which for an
    imported model is the package's prose."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Give a trained or imported model other MLP widths: prune some layers and widen others.

    Layers that shrink lose the units that matter least; layers that grow gain units that leave the
    function as it is. Heal the result with tlm train --init_from, with the original as
    --training.teacher.
    """

    run: Annotated[pathlib.Path | None, tyro.conf.Positional] = None
    """Run folder, of a run or an imported model."""
    out: pathlib.Path | None = None
    """Run folder to make; evaluate it, write with it, train it further."""
    step: int | None = None
    """Step of the checkpoint; None is the newest."""
    taper: Annotated[TaperConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=TaperConfig
    )
    base_width: int | None = None
    """Mean of the new widths; None is the model's own, an equal budget."""
    importance: Literal["activation", "taylor"] = "activation"
    """Of a unit: the size of what it adds to the stream, or the change of the loss without it, by
    its gradient."""
    data: MeasuringConfig = dataclasses.field(default_factory=MeasuringConfig)
    rows: int = 64
    """About how many rows of up to 512 tokens to measure importance on (training split), and losses
    (validation split)."""
    seed: int = 0
    """Seed of the inputs of new units."""


def run(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm retaper`; returns the exit status."""
    command = parse(Command, argv, prog)
    if command.run is None or command.out is None:
        raise UserError(f"{prog} needs a run folder and --out: {prog} runs/tiny --out runs/new")
    if command.rows < 1 or command.seed < 0:
        raise UserError("--rows must be at least 1, and --seed at least 0")
    quiet_libraries()
    from tlm_jax.analysis import retaper

    done = retaper.retaper(
        command.run,
        command.out,
        step=command.step,
        taper=command.taper,
        base_width=command.base_width,
        measure=command.importance,
        text=command.data.path,
        rows=command.rows,
        seed=command.seed,
    )
    console = output.console()
    console.print(retaper.table(f"{command.run} -> {command.out}", done.changes))
    before, after = done.num_params
    console.print(
        f"Parameters {before:,} -> {after:,}; loss {done.before.loss:.4f} -> {done.after.loss:.4f} "
        f"on {done.after.tokens:,} tokens of held-out text (standard error "
        f"{done.after.standard_error:.4f}).\n"
        f"  heal: tlm train --config {command.out / 'config.json'} --init_from {command.out} "
        f"--training.teacher {command.run} --workdir RUN",
    )
    return 0

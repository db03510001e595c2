"""tlm sweep."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Annotated

import tyro

from tlm_jax import cluster, config_io, output
from tlm_jax.cli.parsing import parse
from tlm_jax.config import RUN_AGAIN, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Train every cell of a sweep: arms and seeds, paired, at one budget."""

    file: Annotated[pathlib.Path | None, tyro.conf.Positional] = None
    """Python file with get_sweep(), such as configs/sweeps/shapes.py, or the name of one that ships
    with the package, such as shapes or schedules:micro."""
    out: pathlib.Path | None = None
    """Folder of the sweep. None is runs/sweeps/NAME."""
    index: int = 0
    """Index of this machine, from 0."""
    count: int = 1
    """Number of machines; each trains every COUNT-th cell."""
    parallel: int = 1
    """Cells trained at once on this machine: small models leave most of a GPU idle."""
    vmap_seeds: bool = False
    """Train the seeds of each arm in one program, which saves launches and compilation on one
    accelerator; --parallel then counts arms."""
    engine: str = cluster.LOCAL
    """local, or a Ray cluster that takes a cell per task: ray, or ray://HOST:PORT."""
    gpus_per_cell: float = 0.0
    """GPUs that Ray sets aside for a cell; 0.25 lets four share one."""
    seeds: tuple[int, ...] = ()
    """Seeds to run instead of the file's."""


def run(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm sweep`; returns the exit status: 1 if a cell failed, 75 if it was stopped."""
    command = parse(Command, argv, prog)
    if command.file is None:
        raise UserError(f"{prog} needs a sweep: {prog} shapes")
    if not 0 <= command.index < command.count:
        raise UserError(f"--index {command.index} must lie between 0 and --count - 1")
    if command.parallel < 1:
        raise UserError("--parallel must be at least 1")
    cluster.check(command.engine)
    if not 0 <= command.gpus_per_cell < math.inf:
        raise UserError(f"--gpus_per_cell {command.gpus_per_cell:g} must not be negative")
    if command.gpus_per_cell and command.engine == cluster.LOCAL:
        raise UserError("--gpus_per_cell needs --engine ray; here, --parallel shares a GPU")
    if command.vmap_seeds and command.engine != cluster.LOCAL:
        raise UserError("--vmap_seeds trains on this machine; leave out --engine")
    from tlm_jax.analysis import sweep, sweep_cell

    wanted = config_io.load(command.file, "get_sweep", sweep.Sweep, config_io.SHIPPED / "sweeps")
    if command.seeds:
        wanted = wanted.with_seeds(command.seeds)
    folder = command.out or pathlib.Path("runs") / "sweeps" / wanted.name
    console = output.console()
    outcome = sweep.run(
        wanted,
        folder,
        console,
        index=command.index,
        count=command.count,
        parallel=command.parallel,
        vmap_seeds=command.vmap_seeds,
        engine=command.engine,
        gpus_per_cell=command.gpus_per_cell,
    )
    if outcome.stopped:
        return RUN_AGAIN
    console.print(f"Results: {folder / sweep.RESULTS}   tlm report {folder}")
    if outcome.broken:
        raise UserError(
            f"{len(outcome.broken)} cells failed, see {sweep_cell.LOG} in their folders: "
            f"{', '.join(outcome.broken)}; the same command tries them again"
        )
    return 0

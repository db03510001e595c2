"""tlm compile."""

import dataclasses
import pathlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from tlm_jax import config_io, output
from tlm_jax.cli.parsing import Run, parse, path_after, quiet_libraries
from tlm_jax.config import RunConfig, UserError
from tlm_jax.validation import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Compile a run's steps for a TPU slice, without having one: memory, collectives, time.

    Needs no TPU, only its compiler (pip install 'tlm-jax[tpu]'). The exit status is 1 when the
    train or the evaluation step does not fit into the chips' memory.
    """

    config: pathlib.Path
    """Python file with get_config(), such as configs/tlm_440m.py or configs/tlm_440m.py:titans, or
    the name of one that ships with the package, such as tlm_440m or tlm_440m:titans."""
    topology: str
    """TPU slice: chip and sides, such as v5e:16x16, v5p:4x4x4, v4:2x2x4 or v6e:16x16."""
    run: Run
    slices: int = 1
    """Slices of that shape; the data axis spans them."""
    memory_gib: float | None = None
    """Memory that a program may use on a chip; None is all that the chip has for programs."""
    find_batch: bool = False
    """Look for the largest batch that fits instead."""

    def __post_init__(self) -> None:
        require(self.slices > 0, f"slices is {self.slices}; it must be at least 1")


def run(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm compile`; returns the exit status."""
    defaults = config_io.load_config(path_after("--config", argv, prog))
    command = parse(Command, argv, prog, config=tyro.MISSING, topology=tyro.MISSING, run=defaults)
    from tlm_jax.distributed import topology

    wanted = topology.parse(command.topology, command.slices)
    topology.prepare_environment()
    quiet_libraries()
    from tlm_jax.training import aot

    devices = topology.devices(wanted)
    limit = topology.memory_limit(wanted.chip)
    if command.memory_gib is not None:
        limit = int(command.memory_gib * 2**30)
    config = aot.for_devices(command.run)
    console = output.console()
    where = f"{len(devices)} chips of {wanted.name}" + f" x {wanted.slices}" * (wanted.slices > 1)
    console.print(f"{config.name} on {where}, {limit / 2**30:.2f} GiB each")
    if command.find_batch:
        return _find_batch(aot, config, devices, limit, console)
    results = [aot.compile_step(name, config, devices, limit) for name in aot.STEPS]
    console.print(_table(results))
    for result in results:
        if not result.fits:
            raise UserError(
                f"the {result.name} step does not fit: {_used(result)} of {limit / 2**30:.2f} GiB; "
                "use a smaller data.batch_size or a larger mesh.fsdp, more "
                "training.grad_accumulation, or model.remat full (see --find_batch)"
            )
    return 0


def _find_batch(
    aot: ModuleType, config: RunConfig, devices: list[Any], limit: int, console: Console
) -> int:
    def tried(result: Any) -> None:
        console.print(
            f"  batch {result.batch_size:>6}  {_used(result)}  "
            f"{'fits' if result.fits else 'does not fit'}  ({result.seconds:.0f} s)"
        )

    found = aot.largest_batch(config, devices, limit, tried=tried)
    if found is None:
        raise UserError("not even one row per device fits; use a larger mesh.fsdp or mesh.tensor")
    console.print(f"largest batch: --data.batch_size {found}")
    return 0


def _used(result: Any) -> str:
    return result.refusal or f"{result.memory.needed / 2**30:.2f} GiB"


_EXPLAINED = """Needed: peak memory plus code; temporaries reuse each other's memory.
TFLOPs per step: by formula, causal, without recomputation.
In the program: matrix products of the compiled program, loops multiplied out.
Over its share: those over 1/chips of the undivided program's; above 1, work is repeated.
Compiler: its own count of all operations; a loop over layers counts once.
Pallas kernels (splash attention) are in the first only."""


def _table(results: Sequence[Any]) -> Table:
    """One column per step: memory by kind, FLOPs by who counts, collectives by kind, time."""
    table = Table("per chip", *(f"{r.name} step" for r in results))

    def row(label: str, cells: Sequence[str]) -> None:
        table.add_row(label, *cells)

    for label in ("arguments", "outputs", "temporary", "code", "needed"):
        row(
            f"memory: {label}",
            [f"{getattr(r.memory, label) / 2**30:.3f} GiB" if r.memory else "" for r in results],
        )
    row("limit", [f"{r.limit / 2**30:.2f} GiB" for r in results])
    row("fits", ["yes" if r.fits else f"no: {_used(r)}" for r in results])
    row("TFLOPs per step", [f"{r.flops / 1e12:.3f}" for r in results])
    row("in the program", [f"{r.products / 1e12:.3f}" if r.memory else "" for r in results])
    row("over its share", [f"{r.products / r.share:.2f}" if r.memory else "" for r in results])
    row("compiler, loops once", [f"{r.counted / 1e12:.3f}" if r.memory else "" for r in results])
    row("accessed, loops once", [f"{r.accessed / 2**30:.3f} GiB" for r in results])
    for kind in dict.fromkeys(c.kind for r in results for c in r.collectives):
        found = [next((c for c in r.collectives if c.kind == kind), None) for r in results]
        row(kind, [f"{c.count}, {c.bytes / 2**30:.3f} GiB" if c else "" for c in found])
    row("compile time", [f"{r.seconds:.1f} s" for r in results])
    table.caption = _EXPLAINED
    return table

"""Cells of a sweep that are trained in one program: which, and what they cannot have."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from tlm_jax.config import RunConfig, UserError

if TYPE_CHECKING:
    from tlm_jax.analysis.sweep import Cell


def check(arms: Mapping[str, RunConfig]) -> None:
    """Refuses what `training.seeds` does not do, before anything is trained.

    Args:
      arms: a config of each arm, by its name.

    Raises:
      UserError: which arm has it.
    """
    for name, config in arms.items():
        training = config.training
        several = max(config.mesh.sizes.values()) > 1
        for what, there in (
            ("training.suites", training.suites),
            ("training.teacher", training.teacher),
            ("training.tracker", training.tracker),
            ("a mesh of several devices", several),
        ):
            if there:
                raise UserError(
                    f"arm {name!r} has {what}, which seeds in one program cannot have; leave out "
                    "--vmap_seeds"
                )


def groups(
    cells: Sequence["Cell"], folder: pathlib.Path, console: Console
) -> list[tuple["Cell", ...]]:
    """The cells of each arm; those with a checkpoint are trained alone, and `console` says so.

    Args:
      cells: to be trained.
      folder: of the sweep.
      console: where that is shown.
    """
    found: dict[tuple[str, int | None], list[Cell]] = {}
    for cell in cells:
        where = folder / cell.folder
        alone = any(path.name.isdigit() for path in (where / "checkpoints").glob("*"))
        if alone:
            console.print(f"{where} has a checkpoint; it is trained alone, from there.")
        found.setdefault((cell.arm.name, cell.seed if alone else None), []).append(cell)
    return [tuple(group) for group in found.values()]

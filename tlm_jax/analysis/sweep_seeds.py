"""Cells of a sweep that are trained in one program: which, and what they cannot have."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

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


def groups(cells: Sequence["Cell"], folder: pathlib.Path) -> list[tuple["Cell", ...]]:
    """The cells of each arm that have checkpoints up to the same step, or none.

    Args:
      cells: to be trained.
      folder: of the sweep.
    """
    found: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        saved = (folder / cell.folder / "checkpoints").glob("*")
        newest = max((int(path.name) for path in saved if path.name.isdigit()), default=0)
        found.setdefault((cell.arm.name, newest), []).append(cell)
    return [tuple(group) for group in found.values()]

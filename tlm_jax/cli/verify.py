"""tlm verify."""

import dataclasses
import pathlib
from collections.abc import Sequence

import tyro

from tlm_jax.cli.parsing import parse, quiet_libraries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Check the files of a run folder against their checksums.

    Each checkpoint (arrays, metadata, position in the data), and the records beside them. Prints
    one line for each; the exit status is 1 if any is damaged.
    """

    run: tyro.conf.Positional[pathlib.Path]
    """Run folder, or one of `tlm import`."""
    step: int | None = None
    """Check the checkpoint of this step only; None is all."""


def run(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm verify`; returns the exit status."""
    command = parse(Command, argv, prog, run=tyro.MISSING)
    quiet_libraries()
    from tlm_jax.training import verification

    damaged = 0
    for found in verification.verify(command.run, command.step):
        print(f"{found.name}: {found.verdict}{f' ({found.detail})' if found.detail else ''}")
        damaged += found.verdict == "damaged"
    return int(damaged > 0)

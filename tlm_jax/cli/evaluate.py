"""tlm eval."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Sequence

import tyro
from rich.console import Console

from tlm_jax.cli.parsing import Run, option_value, parse, path_after, quiet_libraries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Validation loss, perplexity and bits per byte of a checkpoint."""

    checkpoint: pathlib.Path
    """Run folder."""
    run: Run
    step: int | None = None
    """Step of the checkpoint; None is the newest."""


def run(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm eval`; returns the exit status."""
    folder = path_after("--checkpoint", argv, prog)
    quiet_libraries()
    from tlm_jax.evaluation import report
    from tlm_jax.training import restore

    wanted = option_value("--step", argv) or ""
    step, metadata = restore.saved_metadata(folder, int(wanted) if wanted.isdigit() else None)
    defaults = restore.saved_config(metadata)
    command = parse(Command, argv, prog, checkpoint=tyro.MISSING, run=defaults)
    console = Console()
    result = restore.evaluate(folder, step, command.run)
    console.print(report.table(folder, step, result))
    record = {"checkpoint": str(folder), "step": step} | dataclasses.asdict(result)
    text = json.dumps(record)
    with contextlib.suppress(OSError):  # a read-only run can still be evaluated
        (folder / "eval.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0

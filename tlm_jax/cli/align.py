"""tlm align."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import tyro

from tlm_jax import files, output
from tlm_jax.cli.parsing import parse, quiet_libraries
from tlm_jax.config import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """How far each layer's MLP output points along the residual stream: table, plot, Pearson r."""

    checkpoint: pathlib.Path
    """Run folder; an imported model is one too."""
    step: int | None = None
    """Step of the checkpoint; None is the newest."""
    text: pathlib.Path | None = None
    """Text file to read; None is the validation split of the run's data."""
    tokens: int = 16384
    """About how many tokens to average over, spread evenly over the text."""
    out: pathlib.Path | None = None
    """Folder for alignment.png and alignment.json; None is the run folder."""


def run(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm align`; returns the exit status."""
    command = parse(Command, argv, prog, checkpoint=tyro.MISSING)
    if command.tokens < 1:
        raise UserError("--tokens must be at least 1")
    out = command.out or command.checkpoint
    files.refuse_foreign(out / "alignment.json", '"mlp_widths": ')
    files.refuse_foreign(out / "alignment.png")
    quiet_libraries()
    from tlm_jax.analysis import alignment, evaluation_plots
    from tlm_jax.training import restore

    step, metadata = restore.saved_metadata(command.checkpoint, command.step)
    config = restore.saved_config(metadata)
    result = alignment.measure(
        command.checkpoint, step, config, text=command.text, tokens=command.tokens
    )
    console = output.console()
    title = f"{config.name}, step {step}" if step else config.name
    console.print(alignment.table(title, result))
    text = alignment.record(
        result,
        checkpoint=str(command.checkpoint),
        step=step,
        text=str(command.text) if command.text else "validation",
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        files.write_json(out / "alignment.json", json.loads(text), indent=2)
        evaluation_plots.plot_alignment(result.rho, result.pearson, title, out / "alignment.png")
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out}: {error.strerror}") from error
    widths = alignment.proposed_widths(
        result.rho["h"], config.model.base_mlp_width, config.model.taper.multiple_of
    )
    console.print(
        "Widths in proportion to 1 - rho: --model.taper.schedule explicit "
        f"--model.taper.widths {' '.join(map(str, widths))}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"Drawn in {out / 'alignment.png'}", highlight=False, soft_wrap=True)
    return 0

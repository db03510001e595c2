"""tlm align."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tlm_jax import files, output
from tlm_jax.cli.parsing import parse, quiet_libraries
from tlm_jax.config import ModelConfig, UserError

if TYPE_CHECKING:
    from tlm_jax.analysis.alignment import Alignment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Measure how far the outputs of each layer and its MLP point along the residual stream."""

    checkpoint: pathlib.Path | None = None
    """Run folder, of a run or an imported model."""
    step: int | None = None
    """Step of the checkpoint; None is the newest."""
    hf: str | None = None
    """Instead of a run: a folder (or a hub name) of a causal model that transformers loads."""
    length: int = 1024
    """With --hf: tokens of a row."""
    text: pathlib.Path | None = None
    """Text file to read; None is the validation split of the run's data."""
    tokens: int = 16384
    """About how many tokens to average over, spread evenly over the text (--hf: its first)."""
    out: pathlib.Path | None = None
    """Folder for alignment.png and alignment.json; None is the run folder."""


def run(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm align`; returns the exit status."""
    command = parse(Command, argv, prog)
    if (command.checkpoint is None) == (command.hf is None):
        raise UserError(f"{prog} needs --checkpoint FOLDER or --hf FOLDER")
    if command.tokens < 1 or command.length < 2:
        raise UserError("--tokens must be at least 1 and --length at least 2")
    out = command.out or command.checkpoint
    if out is None:
        raise UserError("--hf needs --out, a folder for alignment.png and alignment.json")
    files.refuse_foreign(out / "alignment.json", '"mlp_widths": ')
    files.refuse_foreign(out / "alignment.png")
    quiet_libraries()
    if command.hf is not None:
        _of_transformers(command, command.hf, out)
    else:
        assert command.checkpoint is not None
        _of_run(command, command.checkpoint, out)
    return 0


def _of_transformers(command: Command, name: str, out: pathlib.Path) -> None:
    if command.text is None:
        raise UserError("--hf needs --text, a file to read")
    from tlm_jax.analysis import hf_alignment

    result = hf_alignment.measure(
        name, text=command.text, tokens=command.tokens, length=command.length
    )
    _show(result, name, out, checkpoint=name, step=0, text=str(command.text))


def _of_run(command: Command, checkpoint: pathlib.Path, out: pathlib.Path) -> None:
    from tlm_jax.analysis import alignment
    from tlm_jax.training import restore

    step, metadata = restore.saved_metadata(checkpoint, command.step)
    config = restore.saved_config(metadata)
    result = alignment.measure(checkpoint, step, config, text=command.text, tokens=command.tokens)
    title = f"{config.name}, step {step}" if step else config.name
    text = str(command.text) if command.text else "validation"
    _show(result, title, out, checkpoint=str(checkpoint), step=step, text=text)
    propose("1 - rho", [1.0 - value for value in result.rho["h"]], config.model)


def propose(what: str, values: Sequence[float], model: ModelConfig) -> None:
    """Prints the options of a training run with widths in proportion to values of the layers."""
    from tlm_jax.analysis import importance

    widths = importance.proposed_widths(values, model.base_mlp_width, model.taper.multiple_of)
    output.console().print(
        f"Widths in proportion to {what}: --model.taper.schedule explicit "
        f"--model.taper.widths {' '.join(map(str, widths))}",
    )


def _show(result: "Alignment", title: str, out: pathlib.Path, **more: Any) -> None:
    """A table on the terminal; numbers and a picture in a folder."""
    from tlm_jax.analysis import alignment, evaluation_plots

    console = output.console()
    console.print(alignment.table(title, result))
    try:
        out.mkdir(parents=True, exist_ok=True)
        files.write_json(out / "alignment.json", more | dataclasses.asdict(result), indent=2)
        evaluation_plots.plot_alignment(result.rho, result.pearson, title, out / "alignment.png")
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out}: {error.strerror}") from error
    console.print(f"Drawn in {out / 'alignment.png'}")

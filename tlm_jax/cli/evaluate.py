"""tlm eval."""

import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.table import Table

from tlm_jax import files, output
from tlm_jax.cli import evaluate_many
from tlm_jax.cli.parsing import (
    Run,
    option_value,
    parse,
    path_after,
    processes,
    quiet_libraries,
)
from tlm_jax.config import UserError
from tlm_jax.distributed import start
from tlm_jax.distributed.start import ProcessesConfig
from tlm_jax.evaluation.options import SuiteConfig

if TYPE_CHECKING:
    from tlm_jax.evaluation.perplexity import Score


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Evaluate a checkpoint: held-out loss, or suites of tasks.

    Without --tasks: loss, perplexity and bits per byte of the validation split. Suites: lambada,
    commonsense, wikitext, niah, paper (all columns of the paper); or any task of lm-eval.
    Several run folders, as --checkpoints RUN RUN ..., are evaluated one after the other, or with
    --engine ray (or ray://HOST:PORT) at once on a Ray cluster, with --gpus_per_checkpoint N each.
    """

    checkpoint: pathlib.Path
    """Run folder."""
    run: Run
    step: int | None = None
    """Step of the checkpoint; None is the newest."""
    suites: Annotated[SuiteConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=SuiteConfig
    )
    processes: ProcessesConfig = dataclasses.field(default_factory=ProcessesConfig)


def run(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm eval`; returns the exit status."""
    if "--checkpoints" in argv:
        return evaluate_many.run(argv, prog)
    folder = path_after("--checkpoint", argv, prog)
    quiet_libraries()
    start.keep_programs()
    start.join(processes(argv, prog))
    from tlm_jax.distributed import mesh
    from tlm_jax.training import restore

    if "--tasks" in argv:
        mesh.one_device_a_core()
    wanted = option_value("--step", argv) or ""
    step, metadata = restore.saved_metadata(folder, int(wanted) if wanted.isdigit() else None)
    defaults = restore.saved_config(metadata)
    command = parse(Command, argv, prog, checkpoint=tyro.MISSING, run=defaults)
    if command.suites.tasks:
        return _suites(folder, step, command)
    return _held_out(folder, step, command)


def _held_out(folder: pathlib.Path, step: int, command: Command) -> int:
    import jax

    from tlm_jax.training import restore

    result = restore.evaluate(folder, step, command.run)
    if jax.process_index():
        return 0
    output.console().print(_table(folder, step, result))
    record = {"checkpoint": str(folder), "step": step} | dataclasses.asdict(result)
    with contextlib.suppress(OSError):  # a read-only run can still be evaluated
        files.write_json(folder / "eval.json", record, indent=None)
    print(json.dumps(record))
    return 0


def _table(folder: pathlib.Path, step: int, score: "Score") -> Table:
    """One checkpoint's score, with the standard error of the loss carried over."""
    error = score.standard_error
    rows = (
        ("loss (nats per token)", score.loss, error),
        ("perplexity", score.perplexity, score.perplexity * error),
        ("bits per byte", score.bits_per_byte, error * score.bits_per_byte / score.loss),
    )
    title = f"{folder}, step {step}: {score.tokens:,} tokens of held-out text"
    result = output.table("metric", "value", "standard error", title=title)
    for name, value, spread in rows:
        result.add_row(name, f"{value:,.4f}", f"{spread:.4f}")
    return result


def _suites(folder: pathlib.Path, step: int, command: Command) -> int:
    import jax

    from tlm_jax.analysis import evaluation_plots
    from tlm_jax.evaluation import comparison, result_files
    from tlm_jax.training import restore

    how = command.suites
    if how.data_dir is not None and not how.data_dir.is_dir():
        raise UserError(f"--data_dir {how.data_dir} is not a folder")
    outcome, conditions = restore.evaluate_suites(folder, step, command.run, how)
    if jax.process_index():
        return 0
    for notice in outcome.notices:
        print(f"note: {notice}", file=sys.stderr)
    console = output.console()
    record = result_files.record(
        outcome,
        checkpoint=str(folder),
        step=step,
        run=command.run,
        how=how,
        conditions=conditions,
    )
    name = result_files.file_name(how, step, conditions)
    target = folder / result_files.FOLDER / f"{name}.json"
    try:
        target.parent.mkdir(exist_ok=True)
        files.write_json(target, record)
        if how.log_samples:
            lines = (
                json.dumps({"task": task, **sample}) + "\n"
                for task, samples in outcome.samples.items()
                for sample in samples
            )
            files.write_text(target.with_name(f"{name}.samples.jsonl"), "".join(lines))
        if needles := outcome.samples.get("niah"):
            picture = target.with_name(f"{name}.png")
            evaluation_plots.plot_needles(needles, picture)
            console.print(f"Drawn in {picture}")
    except OSError as error:  # a read-only run can still be evaluated
        console.print(f"{target} is not written: {error.strerror}", style="yellow")
    console.print(comparison.table([result_files.parsed(record)]))
    return 0

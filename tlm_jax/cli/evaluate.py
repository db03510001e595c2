"""tlm eval."""

import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from tlm_jax import output
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Evaluate a checkpoint: held-out loss, or suites of tasks.

    Without --tasks: loss, perplexity and bits per byte of the validation split. Suites: lambada,
    commonsense, wikitext, niah, paper (all columns of the paper); any task of lm-eval besides.
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

    from tlm_jax.evaluation import report
    from tlm_jax.training import restore

    result = restore.evaluate(folder, step, command.run)
    if jax.process_index():
        return 0
    output.console().print(report.table(folder, step, result))
    record = {"checkpoint": str(folder), "step": step} | dataclasses.asdict(result)
    text = json.dumps(record)
    with contextlib.suppress(OSError):  # a read-only run can still be evaluated
        (folder / "eval.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def _suites(folder: pathlib.Path, step: int, command: Command) -> int:
    import jax

    from tlm_jax.analysis import evaluation_plots
    from tlm_jax.evaluation import records
    from tlm_jax.training import restore

    how = command.suites
    if how.data_dir is not None and not how.data_dir.is_dir():
        raise UserError(f"--data_dir {how.data_dir} is not a folder")
    outcome = restore.evaluate_suites(folder, step, command.run, how)
    if jax.process_index():
        return 0
    for notice in outcome.notices:
        print(f"note: {notice}", file=sys.stderr)
    console = output.console()
    record = records.record(outcome, checkpoint=str(folder), step=step, run=command.run, how=how)
    target = folder / records.FOLDER / records.file_name(how.tasks, step)
    try:
        target.parent.mkdir(exist_ok=True)
        target.with_suffix(".json").write_text(
            json.dumps(record, indent=1) + "\n", encoding="utf-8"
        )
        if how.log_samples:
            lines = (
                json.dumps({"task": task, **sample}) + "\n"
                for task, samples in outcome.samples.items()
                for sample in samples
            )
            target.with_suffix(".samples.jsonl").write_text("".join(lines), encoding="utf-8")
        if needles := outcome.samples.get("niah"):
            evaluation_plots.plot_needles(needles, target.with_suffix(".png"))
            console.print(f"Drawn in {target.with_suffix('.png')}", highlight=False)
    except OSError as error:  # a read-only run can still be evaluated
        console.print(f"{target}.json is not written: {error.strerror}", style="yellow")
    console.print(records.table([records.parsed(record)]))
    return 0

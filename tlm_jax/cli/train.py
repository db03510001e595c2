"""tlm train."""

import dataclasses
import pathlib
import shlex
from collections.abc import Sequence

import tyro

from tlm_jax import config_io, files, output
from tlm_jax.cli.parsing import Run, parse, path_after, quiet_libraries
from tlm_jax.config import RUN_AGAIN, UserError
from tlm_jax.distributed import start
from tlm_jax.distributed.start import ProcessesConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Train a model, or resume the run in the run folder."""

    config: pathlib.Path
    """Python file with get_config(), such as configs/tiny.py or configs/tiny.py:titans, or the
    name of one that ships with the package, such as tiny or tiny:titans."""
    run: Run
    workdir: pathlib.Path | None = None
    """Run folder: checkpoints, metrics, samples, curves. None is runs/NAME."""
    init_from: pathlib.Path | None = None
    """Run folder (an imported model is one) whose parameters a new run starts with: continued
    pre-training and fine-tuning, with a fresh optimizer, on any data and schedule."""
    allow_config_change: bool = False
    """Continue a run although its config has changed."""
    profile: str | None = None
    """START:STEPS: trace so many steps after step START into RUN/profile (xprof, TensorBoard)."""
    processes: ProcessesConfig = dataclasses.field(default_factory=ProcessesConfig)


def run(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm train`; returns the exit status."""
    defaults = config_io.load_config(path_after("--config", argv, prog))
    command = parse(Command, argv, prog, config=tyro.MISSING, run=defaults)
    workdir = command.workdir or pathlib.Path("runs") / command.run.name
    if not (workdir / "checkpoints").exists():  # a new run
        files.refuse_foreign(workdir / "config.json", '"tlm_jax": "')
    quiet_libraries()
    start.keep_programs()
    start.join(command.processes)
    from tlm_jax.analysis import plan, plots
    from tlm_jax.training import evaluations, loop, metrics, profiling

    console = output.console()
    trainer = loop.Trainer(
        command.run,
        workdir,
        console,
        allow_config_change=command.allow_config_change,
        init_from=command.init_from,
        profile=None if command.profile is None else profiling.parse(command.profile),
    )
    if trainer.is_main:
        for line in plan.summary_lines(command.run):
            console.print(line)
    outcome = trainer.run()
    if not trainer.is_main:
        return RUN_AGAIN if outcome.stopped_by else 0
    curves = workdir / "curves.png"
    if not outcome.already_complete:
        try:
            plots.plot_curves(workdir / metrics.METRICS_FILE, curves)
        except (OSError, UserError, ValueError) as error:  # it cannot be written, or no metrics
            reason = getattr(error, "strerror", None) or error
            console.print(f"could not draw {curves}: {reason}", style="yellow")
    stepping, wall = outcome.goodput
    if wall:
        console.print(
            f"Goodput {stepping / wall:.0%}: {stepping:,.0f} s of steps in {wall:,.0f} s."
        )
    if outcome.stopped_by:
        what = f"at step {outcome.step}, and saved" if outcome.step else "before the first step"
        console.print(
            f"Stopped by {outcome.stopped_by} {what}; the same command resumes.",
        )
        return RUN_AGAIN
    last = metrics.last_record(workdir, "eval")
    known = last is not None and last["step"] == outcome.step  # metrics may not be writable
    loss = f", validation loss {last['loss']:.4f}" if last is not None and known else ""
    console.print(
        f"The run in {workdir} is complete at step {outcome.step}{loss}.",
        style="green",
    )
    samples = workdir / evaluations.SAMPLES_FILE
    words = ["tlm", "eval", "--checkpoint", str(workdir), *config_io.trust_options(command.run)]
    console.print(
        f"  curves {curves}{f'   samples {samples}' if samples.is_file() else ''}\n"
        f"  evaluate: {shlex.join(words)}\n"
        f"  continue: add --training.num_steps {2 * outcome.step} to the command",
    )
    return 0

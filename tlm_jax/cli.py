"""The command line: tlm train, tlm eval, tlm plan.

Heavy libraries are imported inside the verbs, so that `tlm plan` and every
help text answer without JAX.
"""

import contextlib
import dataclasses
import difflib
import functools
import io
import itertools
import json
import logging
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro
from rich.console import Console

from tlm_jax import config_io
from tlm_jax.config import RunConfig, UserError

_Run = Annotated[RunConfig, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Train a model, or continue the run that lies in the run folder."""

    config: pathlib.Path
    """Python file with get_config(), such as configs/tiny.py or configs/tiny.py:titans."""
    run: _Run
    workdir: pathlib.Path | None = None
    """Run folder: checkpoints, metrics, samples, curves. None is runs/NAME."""
    allow_config_change: bool = False
    """Continue a run although its config has changed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalCommand:
    """Validation loss, perplexity and bits per byte of a checkpoint."""

    checkpoint: pathlib.Path
    """Run folder."""
    run: _Run
    step: int | None = None
    """Step of the checkpoint; None is the newest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateCommand:
    """Continue a prompt with a checkpoint's model."""

    checkpoint: pathlib.Path
    """Run folder."""
    step: int | None = None
    """Step of the checkpoint; None is the newest."""
    prompt: str = "The "
    """Text to continue."""
    num_tokens: int = 200
    """Tokens to write."""
    num_samples: int = 1
    """Continuations, drawn side by side."""
    temperature: float = 0.8
    """0 is greedy."""
    top_k: int = 0
    """Draw among this many likeliest tokens; 0 is all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that hold this share of the probability."""
    seed: int = 0
    """Seed of the draws."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """Widths, segments, parameters, FLOPs and memory of a config, without a device."""

    config: pathlib.Path
    """Python file with get_config(), such as configs/tlm_440m.py or configs/tlm_440m.py:titans."""
    run: _Run
    png: pathlib.Path | None = None
    """Where to draw the widths; None is NAME_plan.png in the current folder."""


def train(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm train`; returns the exit status."""
    defaults = config_io.load_config(_path_after("--config", argv, prog))
    command = _parse(TrainCommand, argv, prog, config=tyro.MISSING, run=defaults)
    workdir = command.workdir or pathlib.Path("runs") / command.run.name
    _quiet_libraries()
    from tlm_jax.analysis import plan, plots
    from tlm_jax.training import loop, metrics

    console = Console()
    trainer = loop.Trainer(
        command.run, workdir, console, allow_config_change=command.allow_config_change
    )
    if trainer.is_main:
        for line in plan.summary_lines(command.run):
            console.print(line, highlight=False)
    outcome = trainer.run()
    if not trainer.is_main:
        return 0
    curves = workdir / "curves.png"
    if not outcome.already_complete:
        try:
            plots.plot_curves(workdir / metrics.METRICS_FILE, curves)
        except OSError as error:
            console.print(f"[yellow]{curves} is not drawn:[/] {error.strerror}", soft_wrap=True)
    if outcome.stopped_by:
        what = f"at step {outcome.step}, and saved" if outcome.step else "before the first step"
        console.print(
            f"Stopped by {outcome.stopped_by} {what}; the same command continues.",
            soft_wrap=True,
        )
        return 0
    last = metrics.last_record(workdir, "eval")
    loss = ", but its last evaluation was interrupted"
    if last and last["step"] == outcome.step:
        loss = f", validation loss {last['loss']:.4f}"
    console.print(
        f"[green]The run in {workdir} is complete[/] at step {outcome.step}{loss}.",
        highlight=False,
        soft_wrap=True,
    )
    samples = workdir / loop.SAMPLES_FILE
    console.print(
        f"  curves {curves}{f'   samples {samples}' if samples.is_file() else ''}\n"
        f"  evaluate: python eval.py --checkpoint {workdir}\n"
        f"  go on:    add --training.num_steps {2 * outcome.step} to the command",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def evaluate(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm eval`; returns the exit status."""
    folder = _path_after("--checkpoint", argv, prog)
    _quiet_libraries()
    from tlm_jax.evaluation import report
    from tlm_jax.training import restore

    wanted = _option_value("--step", argv) or ""
    step, metadata = restore.saved_metadata(folder, int(wanted) if wanted.isdigit() else None)
    defaults = restore.saved_config(metadata)
    command = _parse(EvalCommand, argv, prog, checkpoint=tyro.MISSING, run=defaults)
    console = Console()
    result = restore.evaluate(folder, step, command.run)
    console.print(report.table(folder, step, result))
    record = {"checkpoint": str(folder), "step": step} | dataclasses.asdict(result)
    text = json.dumps(record)
    with contextlib.suppress(OSError):  # a read-only run can still be evaluated
        (folder / "eval.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def generate(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm generate`; returns the exit status."""
    command = _parse(GenerateCommand, argv, prog, checkpoint=tyro.MISSING)
    _quiet_libraries()
    from tlm_jax.models.sampling import SamplingConfig
    from tlm_jax.training import restore

    if command.num_tokens < 1 or command.num_samples < 1:
        raise UserError("--num_tokens and --num_samples must be at least 1")
    try:
        how = SamplingConfig(
            temperature=command.temperature, top_k=command.top_k, top_p=command.top_p
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    step, metadata = restore.saved_metadata(command.checkpoint, command.step)
    shown, texts = 0, [""]
    for texts in restore.generate(
        command.checkpoint,
        step,
        restore.saved_config(metadata),
        command.prompt,
        how,
        num_tokens=command.num_tokens,
        num_samples=command.num_samples,
        seed=command.seed,
    ):
        if command.num_samples == 1 and not texts[0].endswith("\N{REPLACEMENT CHARACTER}"):
            print(texts[0][shown:], end="", flush=True)
            shown = len(texts[0])
    if command.num_samples == 1:
        print(texts[0][shown:])
    else:
        for number, text in enumerate(texts, 1):
            print(f"--- {number}\n{text}")
    return 0


def plan(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm plan`; returns the exit status."""
    defaults = config_io.load_config(_path_after("--config", argv, prog))
    command = _parse(PlanCommand, argv, prog, config=tyro.MISSING, run=defaults)
    from tlm_jax.analysis import plan as plan_lib
    from tlm_jax.analysis import plots

    console = Console()
    plan_lib.plan(command.run, console)
    png = command.png or pathlib.Path(f"{command.run.name}_plan.png")
    try:
        plots.plot_plan(command.run.model, png)
    except OSError as error:
        raise UserError(f"cannot write {png}: {error.strerror}") from error
    console.print(f"Drawn in {png}", highlight=False)
    return 0


VERBS: dict[str, tuple[Callable[[Sequence[str], str], int], type]] = {
    "train": (train, TrainCommand),
    "eval": (evaluate, EvalCommand),
    "generate": (generate, GenerateCommand),
    "plan": (plan, PlanCommand),
}


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Entry point of `tlm`, `train.py` and `eval.py`; returns the exit status.

    A user's mistake is one line on standard error and status 1 or 2.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    verb = argv[0] if argv else "--help"
    if verb in ("-h", "--help"):
        print("usage: tlm VERB ...\n")
        for name, (_, command) in VERBS.items():
            print(f"  tlm {name:9} {(command.__doc__ or '').splitlines()[0]}")
        print("\ntlm VERB --help says more.")
        return 0
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return _fail(f"unknown verb {verb!r}{hint} (one of {', '.join(VERBS)})", 2)
    sys.path.insert(0, os.getcwd())  # a mixer of one's own beside the config is found
    try:
        return VERBS[verb][0](argv[1:], prog or f"tlm {verb}")
    except UserError as error:
        return _fail(str(error), 1)
    except BrokenPipeError:  # what reads our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}", 1)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing after the last checkpoint is kept", 130)


def _fail(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


def _option_value(option: str, argv: Sequence[str]) -> str | None:
    for index, word in enumerate(argv):
        if word == option and index + 1 < len(argv):
            return argv[index + 1]
        if word.startswith(option + "="):
            return word.partition("=")[2]
    return None


def _path_after(option: str, argv: Sequence[str], prog: str) -> pathlib.Path:
    """The value of an option that decides what the other options' defaults are."""
    value = _option_value(option, argv)
    if value is not None:
        return pathlib.Path(value)
    if "-h" in argv or "--help" in argv:
        example = "--config configs/tiny.py" if option == "--config" else "--checkpoint runs/tiny"
        print(
            f"usage: {prog} {option} PATH [OPTIONS]\n\n"
            f"The options and their defaults depend on it: {prog} {example} --help"
        )
        raise SystemExit(0)
    raise UserError(f"{prog} needs {option} PATH")


def _parse(command: type, argv: Sequence[str], prog: str, **defaults: Any) -> Any:
    """Parses with tyro; its boxed complaints become one line."""
    complaint = io.StringIO()
    default = command(**defaults)
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                command, prog=prog, args=list(argv), default=default, use_underscores=True
            )
    except SystemExit as error:
        if error.code in (0, None):
            raise
        raise UserError(_one_line(complaint.getvalue())) from None
    except ValueError as error:  # what RunConfig itself refuses; its parts are tyro's to report
        raise UserError(str(error)) from error


def _one_line(box: str) -> str:
    """The message inside tyro's box (drawn in ASCII or not), and the first option it suggests."""

    def is_rule(line: str) -> bool:
        return set(line) <= {"─", "-"}

    lines = [line.strip("│╭╮╰╯|+ ") for line in box.splitlines()]
    body = itertools.dropwhile(is_rule, lines[1:])
    text = " ".join(itertools.takewhile(lambda line: not is_rule(line), body))
    text = re.sub(r"Error parsing (run\.?)?", "", text)
    text = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is no whole number", text)
    text = re.sub(r"could not convert string to float: (.*)", r"\1 is no number", text)
    if suggestion := re.search(r"Perhaps you meant:.*?(--[^\s,]+)", box, re.DOTALL):
        text += f"; did you mean {suggestion[1]}?"
    return text


@functools.cache
def _quiet_libraries() -> None:
    """Keeps the chatter of TFDS, Orbax, asyncio and XLA from a user's terminal.

    What fails in their threads is raised in ours as well, and becomes one line there.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    show = sys.unraisablehook

    def show_others(unraisable: Any) -> None:
        # Reads that were under way when another one failed have nobody left to report to.
        text = str(unraisable.exc_value)
        if "Event loop is closed" not in text and "TensorStore" not in text:
            show(unraisable)

    sys.unraisablehook = show_others

"""What the verbs share: options as dataclasses, errors in one line, quiet libraries."""

import contextlib
import dataclasses
import difflib
import functools
import io
import itertools
import logging
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from tlm_jax import storage
from tlm_jax.config import RunConfig, UserError
from tlm_jax.distributed.start import ProcessesConfig
from tlm_jax.garbage import no_collection

TRUST = "--trust_module"
_TRUST_HELP = f"""
{TRUST} NAME (repeatable) trusts a module, or its file, that defines the mixer of a run or
a model: loading them runs its code and no other code (docs/extending.md)."""

Run = Annotated[RunConfig, tyro.conf.arg(name="")]
"""A field of a command whose options stand at the top level (--model.num_layers)."""


def option_value(option: str, argv: Sequence[str]) -> str | None:
    for index, word in enumerate(argv):
        if word == option and index + 1 < len(argv):
            return argv[index + 1]
        if word.startswith(option + "="):
            return word.partition("=")[2]
    return None


def trusted_modules(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values of --trust_module, which every verb knows, and the other words."""
    names, others, words = [], [], iter(argv)
    for word in words:
        option, given, name = word.partition("=")
        if option.replace("-", "_") != TRUST.replace("-", "_"):
            others.append(word)
            continue
        name = name if given else next(words, "")
        if not name or name.startswith("-"):
            raise UserError(f"{TRUST} needs the name of a module, or its file")
        names.append(name)
    return names, others


def path_after(option: str, argv: Sequence[str], prog: str) -> pathlib.Path:
    """The value of an option that decides what the other options' defaults are."""
    value = option_value(option, argv)
    if value is not None:
        return storage.path(value)
    if "-h" in argv or "--help" in argv:
        example = "--config tiny" if option == "--config" else "--checkpoint runs/tiny"
        print(
            f"usage: {prog} {option} PATH [OPTIONS]\n\n"
            f"The options and their defaults depend on it: {prog} {example} --help"
        )
        raise SystemExit(0)
    raise UserError(f"{prog} needs {option} PATH")


@functools.cache
def _paths() -> tyro.constructors.ConstructorRegistry:
    """How tyro makes paths: gs:// and s3:// are in buckets."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: Any) -> tyro.constructors.PrimitiveConstructorSpec[pathlib.Path] | None:
        if info.type is not pathlib.Path:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda words: storage.path(words[0]),
            is_instance=lambda value: isinstance(value, pathlib.Path),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def parse(command: type, argv: Sequence[str], prog: str, **defaults: Any) -> Any:
    """Parses with tyro; its boxed complaints become one line."""
    complaint = io.StringIO()
    default = command(**defaults)
    try:
        # tyro parses source files, and in CPython before 3.11.8 a finalizer that runs meanwhile can
        # break that (python/cpython#106905).
        with contextlib.redirect_stderr(complaint), no_collection():
            return tyro.cli(
                command,
                prog=prog,
                args=list(argv),
                default=default,
                use_underscores=True,
                registry=_paths(),
            )
    except SystemExit as error:
        if error.code in (0, None):
            print(_TRUST_HELP)
            raise
        raise UserError(_one_line(complaint.getvalue())) from None
    except ValueError as error:  # what RunConfig itself refuses; its parts are tyro's to report
        raise UserError(str(error)) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Processes:
    processes: ProcessesConfig = dataclasses.field(default_factory=ProcessesConfig)


def processes(argv: Sequence[str], prog: str) -> ProcessesConfig:
    """The options --processes.*, before the others can be parsed."""
    words = list(argv)
    mine = [
        part
        for index, word in enumerate(words)
        if word.startswith("--processes.")
        for part in words[index : index + (1 if "=" in word else 2)]
    ]
    return parse(_Processes, mine, prog).processes


def _one_line(box: str) -> str:
    """The message inside tyro's box (drawn in ASCII or not), and the first option it suggests."""

    def is_rule(line: str) -> bool:
        return set(line) <= {"─", "-"}

    lines = [line.strip("│╭╮╰╯|+ ") for line in box.splitlines()]
    body = itertools.dropwhile(is_rule, lines[1:])
    text = " ".join(itertools.takewhile(lambda line: not is_rule(line), body))
    text = re.sub(r"Error parsing ((run|suites)\.?)?", "", text)
    text = re.sub(
        r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number", text
    )
    text = re.sub(r"could not convert string to float: (.*)", r"\1 is not a number", text)
    if choice := re.search(r"invalid choice '(.*?)' (for .*)\. Expected one of \((.*)\)", text):
        wanted, where, known = choice[1], choice[2], re.findall(r"'(.*?)'", choice[3])
        near = difflib.get_close_matches(wanted, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        text = f"invalid choice {wanted!r} {where}{hint} (one of {', '.join(known)})"
    if suggestion := re.search(r"Perhaps you meant:.*?(--[^\s,]+)", box, re.DOTALL):
        text += f"; did you mean {suggestion[1]}?"
    return text


@functools.cache
def quiet_libraries() -> None:
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

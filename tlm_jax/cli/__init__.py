"""The command line: one module per verb, with its options as `Command` and `run(argv, prog)`.

Heavy libraries are imported inside the verbs, so that `tlm plan` and every
help text answer without JAX.
"""

import contextlib
import difflib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from types import ModuleType

from tlm_jax import __version__, config_io, output
from tlm_jax.cli import (
    align,
    compile_ahead,
    evaluate,
    export,
    generate,
    import_model,
    importance,
    ladder,
    large_pages,
    parsing,
    plan,
    prepare,
    report,
    retaper,
    sweep,
    train,
    train_seeds,
    verify,
)
from tlm_jax.config import RUN_AGAIN, UserError
from tlm_jax.distributed import start
from tlm_jax.validation import causes, lacks_resources

VERBS: dict[str, ModuleType] = {
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "plan": plan,
    "compile": compile_ahead,
    "prepare": prepare,
    "sweep": sweep,
    "report": report,
    "ladder": ladder,
    "import": import_model,
    "export": export,
    "align": align,
    "importance": importance,
    "retaper": retaper,
    "verify": verify,
}
_INTERNAL: dict[str, ModuleType] = {"train-seeds": train_seeds}
"""Verbs that only `tlm` itself starts."""
_LOGGING = frozenset({"train", "train-seeds", "sweep", "prepare", "import", "export", "retaper"})
"""Verbs whose results are files: what they print is a log, and losing it is no reason to stop."""


def program(*first: str, prog: str | None = None) -> int:
    """`tlm`, and with a verb as `first` train.py and eval.py; returns the exit status."""
    words = [*first, *sys.argv[1:]]
    output.protect(vital=not _LOGGING.intersection(words[:1]))
    if large_pages.wanted(words):
        large_pages.restart()
    try:
        return main(words, prog)
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()


def main(argv: Sequence[str], prog: str | None = None) -> int:
    """Runs a verb with its options; returns the exit status.

    A user's mistake is one line on standard error and status 1 or 2.
    """
    verb = argv[0] if argv else "--help"
    if verb in ("-h", "--help"):
        print("usage: tlm VERB ...   (tlm --version)\n")
        for name, module in VERBS.items():
            print(f"  tlm {name:10} {module.Command.__doc__.splitlines()[0]}")
        print("\ntlm VERB --help lists the options of a verb.")
        return 0
    if verb == "--version":
        print(_versions())
        return 0
    verbs = VERBS | _INTERNAL
    if verb not in verbs:
        near = difflib.get_close_matches(verb, VERBS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return _fail(f"unknown verb {verb!r}{hint} (one of {', '.join(VERBS)})", 2)
    status = _run(verbs[verb], argv[1:], prog or f"tlm {verb}")
    start.leave(status)
    return status


def _run(verb: ModuleType, argv: Sequence[str], prog: str) -> int:
    try:
        _find_modules_here()
        trusted, words = parsing.trusted_modules(argv)
        config_io.trust(trusted)
        status = verb.run(words, prog)
        sys.stdout.flush()  # what cannot be written is an error here, not after the end
        return status
    except UserError as error:
        return _fail(str(error), RUN_AGAIN if lacks_resources(error) else 1)
    except BrokenPipeError:  # what reads our output, such as head, has seen enough
        return 141
    except OSError as error:
        if error.errno is None and not lacks_resources(error):
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        return _fail(f"{where}{error.strerror}", RUN_AGAIN if lacks_resources(error) else 1)
    except KeyboardInterrupt:
        return _fail("interrupted; work since the last checkpoint is lost", 130)
    except Exception as error:
        if not lacks_resources(error):
            raise
        text = " ".join(str(causes(error)[-1]).split())[:300] or "out of memory"
        return _fail(f"{text}; the same command can be run again", RUN_AGAIN)


def _find_modules_here() -> None:
    """Modules in the working directory can be imported, unless another has the name."""
    try:
        here = os.getcwd()
    except FileNotFoundError:
        raise UserError("the working directory no longer exists; cd to one that does") from None
    if here not in sys.path:
        sys.path.append(here)


def _versions() -> str:
    """What a bug report needs, without importing any of it."""
    others = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "flax")]
    return f"tlm-jax {__version__} (Python {platform.python_version()}, {', '.join(others)})"


def _fail(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status

"""What may happen to a run: signals, hung and dead processes, two runs in one folder."""

import contextlib
import faulthandler
import os
import pathlib
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils
from rich.console import Console

from tlm_jax import files
from tlm_jax.config import RUN_AGAIN, UserError
from tlm_jax.validation import causes

_LOCK = ".lock"
# Orbax's threads raise JAX's errors again, as errors of other types.
_LOST = re.compile("Gloo|NCCL|[Bb]arrier|Connection (reset|refused)|UNAVAILABLE|DEADLINE_EXCEEDED")
_ONE_STOP = 1.0
"""Seconds within which further signals belong to the first."""


class Stopped(Exception):
    """The work in progress was given up, because the job was asked to stop."""


class Stop:
    """Whether the job was asked to stop."""

    def __init__(self) -> None:
        self.signal: str | None = None
        """The signal that asked; with several processes, once all of them know."""

    def after(self, done: int) -> bool:
        """Whether to stop after a step; all processes must ask after each.

        With several processes the answer becomes yes in all of them after the same step, once one
        of them was sent SIGTERM, as preempted machines are. Steps only, and not batches of an
        evaluation: Orbax asks JAX the same at each save, with the step's number, and JAX would
        wait forever for the number that comes after that.
        """
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(done):
            self.signal = "SIGTERM"
        return self.signal is not None


@contextlib.contextmanager
def stop_signals(console: Console) -> Iterator[Stop]:
    """Records SIGINT and SIGTERM; another one, a second or more later, acts at once.

    One stop can arrive as several signals: from the shell and from a launcher, or once per thread
    of a parent that dies (`PR_SET_PDEATHSIG`). With several processes JAX itself takes note of
    SIGTERM and tells the others (see `Stop.after`); SIGINT becomes SIGTERM there.
    """
    stop = Stop()
    previous: dict[int, Any] = {}
    first: float | None = None

    def handle(number: int, _: Any) -> None:
        nonlocal first
        if first is not None:
            if time.monotonic() - first > _ONE_STOP:
                signal.signal(number, previous[number])
                os.kill(os.getpid(), number)
            return
        first = time.monotonic()
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        stop.signal = name = signal.Signals(number).name
        with contextlib.suppress(RuntimeError):  # it came in the middle of another print
            console.print(
                f"{name}: saving after this step; send it again to stop at once.", style="yellow"
            )

    numbers = [signal.SIGINT, signal.SIGTERM]
    for number in numbers[: 1 if jax.process_count() > 1 else 2]:
        previous[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for signal_number, handler in previous.items():
            signal.signal(signal_number, handler)


class Watchdog:
    """Ends a process that makes no progress, with a message and where it hangs.

    A process that waits forever for a hung one blocks the whole job, and nobody restarts it.

    Args:
      seconds: without a sign of life until the process is ended; 0 is never.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._doing, self._since = "starting", time.monotonic()
        self._closed = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def alive(self, doing: str) -> None:
        """A sign of life; `doing` is what comes next."""
        self._doing, self._since = doing, time.monotonic()

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(self._seconds / 4, 10)):
            waited = time.monotonic() - self._since
            if waited > self._seconds:
                faulthandler.dump_traceback(sys.stderr)
                end_at_once(
                    f"no progress for {waited:.0f} s while {self._doing} "
                    f"(training.hang_timeout={self._seconds:g})"
                )


def end_at_once(reason: str) -> NoReturn:
    """Ends this process without waiting for others that may be dead; status `RUN_AGAIN`."""
    where = f"process {jax.process_index()} of {jax.process_count()}: "
    sys.stdout.flush()
    print(
        f"error: {where if jax.process_count() > 1 else ''}{reason}; the same command resumes "
        "from the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(RUN_AGAIN)


@contextlib.contextmanager
def lost_processes() -> Iterator[None]:
    """Ends this process when what it shares with others fails, as when one of them has died.

    An ordinary way out would wait for the dead: Orbax and JAX meet the others on leaving.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, UserError) as error:
        lost = [
            e
            for e in causes(error)
            if isinstance(e, jax.errors.JaxRuntimeError) or _LOST.search(str(e))
        ]
        if jax.process_count() == 1 or not lost:
            raise
        text = " ".join(str(lost[-1]).split())[:200]
        end_at_once(f"another process is gone, or the network ({text})")


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps another run out of a run folder, which must be writable.

    File systems without locks are trusted.

    Raises:
      UserError: another process trains there.
    """
    if jax.process_index() > 0:
        yield
        return
    in_use = f"{workdir} is in use: {{who}} trains there; wait for it, or use another --workdir"
    with files.locked(workdir / _LOCK, in_use):
        yield


def make_writable(workdir: pathlib.Path) -> None:
    """Makes the run folder and proves that it can be written.

    Raises:
      UserError: it cannot.
    """
    probe = workdir / f".probe-{jax.process_index()}"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"x" * 4096)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        reason = "it is a file" if workdir.is_file() else error.strerror
        raise UserError(f"cannot write to run folder {workdir}: {reason}") from error

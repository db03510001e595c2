"""The process of one cell of a sweep: how it is started, stopped and waited for."""

import contextlib
import ctypes
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from tlm_jax import config_io, files
from tlm_jax.config import RUN_AGAIN, RunConfig, UserError

LOG = "log.txt"
_LOCK = ".lock"  # of a run folder, see `training.faults`
_PATIENCE = 120.0
"""Seconds that the process of an earlier call may take to save and end."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Takes note of a signal to stop, and hands it on to the process of a cell."""

    def __init__(self) -> None:
        self.told = False
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, *_: Any) -> None:
        self.told = True
        if self.process is not None:
            self.process.terminate()


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """While this lasts, SIGINT and SIGTERM are noted and handed on."""
    stop = Stop()
    handlers = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(config: RunConfig, folder: pathlib.Path, console: Console, stop: Stop) -> int | None:
    """Trains a cell in its folder, from its last checkpoint.

    Returns:
      The exit status of `tlm train`; None if it was interrupted, perhaps before it had begun
      or could save.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _wait_until_free(folder, console, stop)
    if stop.told:
        return None
    status = _run(config, folder, stop)
    interrupted = stop.told or status == RUN_AGAIN or {-status, status - 128} & set(_SIGNALS)
    return None if status and interrupted else status


def _run(config: RunConfig, folder: pathlib.Path, stop: Stop) -> int:
    written = folder / "cell.json"
    files.write_text(written, json.dumps(config_io.to_dict(config), indent=1) + "\n")
    command = [sys.executable, "-m", "tlm_jax", "train", "--config", str(written)]
    with (folder / LOG).open("a") as log:
        stop.process = subprocess.Popen(
            [*command, "--workdir", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes through us, once
            preexec_fn=functools.partial(_end_with_parent, os.getpid()),
        )
    if stop.told:  # the signal came while the process was being started
        stop.process.terminate()
    try:
        return stop.process.wait()
    finally:
        stop.process = None


def _wait_until_free(folder: pathlib.Path, console: Console, stop: Stop) -> None:
    """Waits while the process of an earlier call, which was killed, saves its cell and ends.

    If it takes too long, `tlm train` itself says who is using the folder.
    """
    give_up = time.monotonic() + _PATIENCE
    waiting = False
    while not stop.told and time.monotonic() < give_up:
        try:
            with files.locked(folder / _LOCK, "{who}"):
                return
        except UserError as who:
            if not waiting:
                text = f"Waiting for {who}, which is still in {folder}."
                console.print(text, markup=False, highlight=False)
            waiting = True
        time.sleep(0.2)


def _end_with_parent(parent: int) -> None:
    """On Linux: a run whose sweep was killed is told to stop, and saves."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
        if os.getppid() != parent:  # it was killed before we asked
            os._exit(RUN_AGAIN)


def complaint(folder: pathlib.Path, status: int) -> str:
    """The last line that speaks of an error, or the last line."""
    lines = [line for line in (folder / LOG).read_text(errors="replace").splitlines() if line]
    errors = [line for line in lines if "error" in line.lower()]
    return f"status {status}: {(errors or lines or ['it said nothing'])[-1].strip()[:300]}"

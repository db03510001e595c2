"""Numbers for an experiment tracker that has W&B's interface (`init`, `log`, `finish`).

A thread of its own feeds the tracker from a bounded queue, so that one that fails, hangs or is slow
neither ends nor delays a run: what does not fit the queue is dropped.
"""

import contextlib
import importlib
import importlib.util
import queue
import threading
import time
from typing import Any

from rich.console import Console

from tlm_jax import config_io
from tlm_jax.config import RunConfig, UserError

PROJECT = "tlm-jax"
_MOST_WAITING = 1000
"""Records in the queue: hours of a run that logs every few seconds."""
_FINISH_SECONDS = 10.0
"""How long the end of a run waits for the tracker."""
_Record = tuple[int, dict[str, float | int]]


def check(name: str | None) -> None:
    """Raises `UserError` if the package of a tracker is missing."""
    if name is not None and importlib.util.find_spec(name) is None:
        raise UserError(
            f"training.tracker={name} needs the package {name}; install it with: pip install {name}"
        )


class Tracker:
    """One run of a tracker, which begins in the background.

    Args:
      name: the module, wandb or trackio.
      config: of the run, which the tracker shows.
      console: where what goes wrong is said, once.
    """

    def __init__(self, name: str, config: RunConfig, console: Console) -> None:
        self._name, self._console = name, console
        self._queue: queue.Queue[_Record | None] = queue.Queue(_MOST_WAITING)
        self._dropped, self._warned = 0, False
        arguments = {
            "project": PROJECT,
            "name": config.name,
            "config": config_io.to_dict(config),
        }
        self._thread = threading.Thread(target=self._feed, args=(arguments,), daemon=True)
        self._thread.start()

    def log(self, kind: str, step: int, values: dict[str, float | int]) -> None:
        """Hands over the values of a step, named `kind/value`; returns at once."""
        try:
            self._queue.put_nowait((step, {f"{kind}/{k}": v for k, v in values.items()}))
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Lets the tracker finish, in a few seconds at most."""
        until = time.monotonic() + _FINISH_SECONDS
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=_FINISH_SECONDS)
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"has not finished after {_FINISH_SECONDS:g} s and is left behind")
        elif self._dropped:
            self._warn(f"was too slow: {self._dropped:,} records were dropped")

    def _feed(self, arguments: dict[str, Any]) -> None:
        try:
            module = importlib.import_module(self._name)
            module.init(**arguments)
        except BaseException as error:  # libraries exit too
            self._warn(f"cannot begin, and logs nothing: {error!r}")
            while self._queue.get() is not None:
                pass
            return
        while (record := self._queue.get()) is not None:
            step, values = record
            try:
                module.log(values, step=step)
            except BaseException as error:
                self._warn(f"cannot log step {step}: {error!r}")
        try:
            module.finish()
        except BaseException as error:
            self._warn(f"cannot finish: {error!r}")

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            text = f"tracker {self._name} {what}; metrics.jsonl has every record"
            self._console.print(text, style="yellow")

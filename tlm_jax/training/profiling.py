"""A trace of some steps, for xprof and TensorBoard."""

import dataclasses
import pathlib
import re
import shutil
import tempfile
from typing import Any

import jax

from tlm_jax import storage
from tlm_jax.config import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileSpan:
    """Which steps to trace: `steps` of them, beginning after step `start`."""

    start: int
    steps: int


def parse(text: str) -> ProfileSpan:
    """Reads START:STEPS.

    Raises:
      UserError: it is something else.
    """
    match = re.fullmatch(r"(\d+):([1-9]\d*)", text)
    if match is None:
        raise UserError(f"--profile {text} is not START:STEPS, such as 20:5 for steps 21 to 25")
    return ProfileSpan(start=int(match[1]), steps=int(match[2]))


class Profiler:
    """Starts and ends the trace during the loop; without a span it does nothing."""

    def __init__(self, span: ProfileSpan | None, folder: pathlib.Path) -> None:
        self._span, self._folder = span, folder
        self._tracing = False

    def before_step(self, done: int) -> None:
        """Starts the trace after `done` steps."""
        if self._span is not None and done == self._span.start:
            self._written = self._folder
            if storage.in_bucket(self._folder):
                self._written = pathlib.Path(tempfile.mkdtemp(prefix="tlm-profile-"))
            jax.profiler.start_trace(str(self._written))
            self._tracing = True

    def after_step(self, done: int, metrics: Any) -> str | None:
        """Ends the trace once its last step is done; returns where it is."""
        if self._span is None or not self._tracing or done < self._span.start + self._span.steps:
            return None
        jax.block_until_ready(metrics)
        return self.close()

    def close(self) -> str | None:
        """Ends an unfinished trace; returns where it is.

        One that cannot be written to a bucket stays on this machine: the run goes on.
        """
        if not self._tracing:
            return None
        jax.profiler.stop_trace()
        self._tracing = False
        if self._written != self._folder:
            try:
                storage.upload(self._written, self._folder)
            except OSError as error:
                return f"Profile in {self._written}: cannot write to {self._folder}: {error}."
            shutil.rmtree(self._written)
        return f"Profile in {self._folder}; look at it with xprof or TensorBoard."

"""The compiled train step of a run: one program, or one for each kind of batch."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tlm_jax.ops import rows
from tlm_jax.training.allocator import release_freed_memory
from tlm_jax.training.step import Batch, Metrics, TrainState


class TrainStep:
    """Takes steps of a run; each batch goes to the program that its documents need.

    Args:
      lower: lowers the train step for a kind of rows (`ops.rows`), or None for any.
      kernel: of the model's attention; only cudnn has a program for each kind, compiled when the
        first batch of that kind comes. Others are compiled here.
      seq_len: tokens in a row.
      say: shows a line of the log.
    """

    def __init__(
        self,
        lower: Callable[[int | None], jax.stages.Lowered],
        kernel: str | None,
        seq_len: int,
        say: Callable[[str], None],
    ) -> None:
        self._lower, self._seq_len, self._say = lower, seq_len, say
        self._by_kind = kernel == "cudnn"
        self._programs: dict[int | None, jax.stages.Compiled] = {}
        self._kind = jax.jit(rows.kind)
        self.more: tuple[Any, ...] = ()
        """What the step takes after state and batch: a teacher's parameters."""
        if not self._by_kind:
            self.compile(None)

    def kind(self, batch: dict[str, np.ndarray], placed: Batch) -> int | None:
        """The kind of rows that a batch has on all processes.

        Args:
          batch: the arrays on the host; all rows are there if this is the only process.
          placed: the same on devices. Several processes wait for the steps before.
        """
        if not self._by_kind:
            return None
        if jax.process_count() == 1:
            return rows.kind_on_host(batch["document_ids"])
        return int(self._kind(placed["document_ids"]))

    def __contains__(self, kind: int | None) -> bool:
        return kind in self._programs

    def compile(self, kind: int | None) -> None:
        """Compiles the program for a kind of rows."""
        begin = time.perf_counter()
        self._programs[kind] = self._lower(kind).compile()
        release_freed_memory()
        what = "" if kind is None else f" for {rows.describe(kind, self._seq_len)}"
        self._say(f"Compiled the train step{what} in {time.perf_counter() - begin:.1f} s.")

    def __call__(
        self, kind: int | None, state: TrainState, placed: Batch
    ) -> tuple[TrainState, Metrics]:
        """The state after a step, and its metrics."""
        after: tuple[TrainState, Metrics] = self._programs[kind](state, placed, *self.more)
        return after

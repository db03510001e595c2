"""Log-likelihoods of continuations: common beginnings once, in a handful of compiled shapes.

Shapes: B rows, L row length, P parts of the rows (one per device), N scored tokens of a part,
D model.
"""

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from tlm_jax import models
from tlm_jax.config import UserError
from tlm_jax.distributed.sharding import batch_sharding
from tlm_jax.evaluation.requests import Batch, Likelihood, Request, make_batches
from tlm_jax.models import Skeleton, online
from tlm_jax.models.loss import final_hidden
from tlm_jax.ops.cross_entropy import token_scores

_LOGIT_POSITIONS = 512
"""Positions, over all rows, whose float32 logits exist at a time."""


class Scorer:
    """A model that answers requests for log-likelihoods.

    On a mesh, batches are shared out over its data and fsdp axes. With several
    processes each must ask for the same requests; all get all answers.

    Args:
      skeleton: the model's structure.
      params: its parameters, on `mesh`.
      mesh: the mesh, which must be the current one (`jax.set_mesh`).
      max_length: most tokens that the model reads; what is too much is cut from the left.
      batch_tokens: tokens of a batch; halved while a program needs more than `memory_limit`.
      memory_limit: bytes that a program may use on a device, besides its inputs; None is half
        of what is free (with several processes, of what is free on the first).
    """

    def __init__(
        self,
        skeleton: Skeleton,
        params: Any,
        mesh: Mesh,
        *,
        max_length: int,
        batch_tokens: int | None = None,
        memory_limit: int | None = None,
    ) -> None:
        device = mesh.local_devices[0]
        # Of the fast kernels only these know branches.
        config = dataclasses.replace(
            skeleton.config, attention_kernel="xla" if device.platform == "cpu" else "chunked"
        )
        self.skeleton, self.params = models.skeleton(config), params
        self.max_length = max_length
        # On a CPU more tokens at a time are no faster.
        self.batch_tokens = batch_tokens or (2048 if device.platform == "cpu" else 1 << 16)
        self.memory_limit = memory_limit or _agreed(_free_memory(device) // 2)
        self._rows = batch_sharding(mesh)
        self._parts = mesh.shape["data"] * mesh.shape["fsdp"]
        self._packs = not config.mlp.online_chunks and all(
            mixer.masks_by_document for mixer in config.mixers
        )
        # Where one process sees all devices, they need not talk to each other at all.
        everywhere = NamedSharding(mesh, jax.P())
        self._score = jax.jit(
            functools.partial(_score, self.skeleton),
            out_shardings=self._rows if jax.process_count() == 1 else everywhere,
        )
        self.programs: dict[tuple[int, ...], Any] = {}
        """Compiled programs by B, L, P and N."""

    def score(
        self, requests: Sequence[Request], wanted: Iterable[int] | None = None
    ) -> Iterator[tuple[int, Likelihood]]:
        """Yields (index, answer), longest first.

        Args:
          requests: all that belong together. They decide how batches are laid out, so an answer
            does not depend on `wanted`, to the last bit.
          wanted: indices of the requests to answer; None answers all.

        Raises:
          UserError: not even one row fits into the memory.
        """
        cut = {index: request.cut(self.max_length) for index, request in enumerate(requests)}
        todo = set(cut if wanted is None else wanted)
        while todo:
            try:
                for index, answer in self._answers(cut, todo):
                    todo.remove(index)
                    yield index, answer
            except _TooLargeError as error:
                B, L = error.shape
                if self._parts >= B:
                    raise UserError(
                        f"a row of {L:,} tokens needs {error.needed / 2**30:.2f} GiB, and "
                        f"{self.memory_limit / 2**30:.2f} may be used; use a smaller --max_length"
                    ) from None
                self.batch_tokens = B * L // 2

    def _answers(
        self, requests: dict[int, Request], todo: set[int]
    ) -> Iterator[tuple[int, Likelihood]]:
        """Runs the batches that hold a request of `todo`, which may shrink meanwhile."""
        pending: list[tuple[Batch, Any]] = []

        def read() -> Iterator[tuple[int, Likelihood]]:
            batch, answers = pending.pop(0)
            for index, answer in batch.answers(*map(np.asarray, answers)):
                if index in todo:
                    yield index, answer

        for batch in make_batches(
            requests,
            pack=self._packs,
            batch_tokens=self.batch_tokens,
            parts=self._parts,
        ):
            if todo.isdisjoint(key for key, *_ in batch.spans):
                continue
            pending.append((batch, self._run(batch)))
            if len(pending) > 1:  # while this one is read, the next one runs
                yield from read()
        while pending:
            yield from read()

    def _run(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        inputs = {name: self._put(a) for name, a in batch.arrays.items()}
        at_PN = self._put(batch.at_PN)
        shape = inputs["inputs"].shape
        key = (*shape, *at_PN.shape)
        if key not in self.programs:
            program = self._score.lower(self.params, inputs, at_PN).compile()
            memory = program.memory_analysis()
            if memory is not None and memory.temp_size_in_bytes > self.memory_limit:
                raise _TooLargeError(shape, memory.temp_size_in_bytes)
            self.programs[key] = program
        return self.programs[key](self.params, inputs, at_PN)

    def _put(self, array: np.ndarray) -> jax.Array:
        """A global array of rows (or parts), which every process holds all of."""
        return jax.make_array_from_callback(array.shape, self._rows, lambda at: array[at])


class _TooLargeError(Exception):
    """A program needs more memory than there is."""

    def __init__(self, shape: tuple[int, ...], needed: int) -> None:
        super().__init__()
        self.shape, self.needed = shape, needed


def _agreed(number: int) -> int:
    """The first process's number, so that all lay out the same batches."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    mebibytes = np.int32(number >> 20)  # jax has no 64-bit integers by default
    return int(multihost_utils.broadcast_one_to_all(mebibytes)) << 20


def _free_memory(device: jax.Device) -> int:
    """Bytes that are free on a device, or on this machine where devices do not report it."""
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    with contextlib.suppress(OSError, ValueError):  # sysconf counts cached files as used
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        if "MemAvailable" in fields:
            return int(fields["MemAvailable"].split()[0]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _score(
    skeleton: Skeleton, params: Any, batch: dict[str, jax.Array], at_PN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """nll_PN float32 of the targets at these positions of the parts, and greedy_PN, 1 or 0."""
    parts, N = at_PN.shape

    def pick(a_BL: jax.Array) -> jax.Array:
        return jnp.take_along_axis(a_BL.reshape(parts, -1), at_PN, axis=1)

    if skeleton.config.mlp.online_chunks:
        nll_BL, greedy_BL, _ = online.online_losses(
            skeleton, params, batch, chunk=_LOGIT_POSITIONS // 8, losses=token_scores
        )
        return pick(nll_BL), pick(greedy_BL)
    hidden_BLD, head_DV = final_hidden(skeleton, params, batch)
    hidden_PSD = hidden_BLD.reshape(parts, -1, hidden_BLD.shape[-1])
    hidden_PND = jnp.take_along_axis(hidden_PSD, at_PN[:, :, None], axis=1)
    chunk = math.gcd(N, _LOGIT_POSITIONS)
    return token_scores(hidden_PND, head_DV, pick(batch["targets"]), chunk=chunk)

"""Reading in shares: which readers a process runs, and batches made of their rows.

A batch of B rows is made by a fixed number R of readers (`DataConfig.readers`): reader r makes its
rows r * B/R to (r + 1) * B/R, of documents of its own. So a row depends on its reader alone,
whoever runs it and beside which others.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

READERS = "readers"
"""In the state of an iterator: what follows is a state for each reader, by its number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """What one of several processes reads."""

    readers: tuple[int, ...]
    """Those that make rows it needs, ascending."""
    saves: tuple[int, ...]
    """Those of them whose positions it writes into a checkpoint; each has one such process."""
    spare: int = 0
    """Rows of a batch that these readers make and the process does not need."""


def shares(
    rows: Sequence[Collection[int]], *, num_readers: int, batch_size: int
) -> tuple[Share, ...]:
    """The share of each process.

    Args:
      rows: the rows of a batch that each process needs; several may need the same.
      num_readers: R.
      batch_size: B, a multiple of R.
    """
    size = batch_size // num_readers
    needed = [sorted({row // size for row in of_one}) for of_one in rows]
    writer: dict[int, int] = {}
    for process, readers in enumerate(needed):
        for reader in readers:
            writer.setdefault(reader, process)
    return tuple(
        Share(
            readers=tuple(readers),
            saves=tuple(reader for reader in readers if writer[reader] == process),
            spare=len(readers) * size - len(rows[process]),
        )
        for process, readers in enumerate(needed)
    )


class SharedBatches(Iterator[dict[str, np.ndarray]]):
    """Batches (B, L) of which only the rows of some readers are filled; the others are zeros.

    Args:
      iterator: a Grain iterator of the rows of these readers, one after the other.
      share: the readers.
      num_readers: R.
    """

    def __init__(self, iterator: Any, share: Share, num_readers: int) -> None:
        self._iterator, self.share, self._num_readers = iterator, share, num_readers

    def __next__(self) -> dict[str, np.ndarray]:
        rows, readers = next(self._iterator), self.share.readers
        if len(readers) == self._num_readers:
            return rows
        return {name: self._placed(array) for name, array in rows.items()}

    def _placed(self, rows: np.ndarray) -> np.ndarray:
        parts = rows.reshape(len(self.share.readers), -1, rows.shape[-1])
        batch = np.zeros((self._num_readers, *parts.shape[1:]), rows.dtype)
        batch[list(self.share.readers)] = parts
        return batch.reshape(-1, rows.shape[-1])

    def get_state(self) -> dict[str, Any]:
        """The position of each reader that is run here, by its number in digits.

        It is the same whichever process runs the reader.
        """
        state = self._iterator.get_state()
        return {str(reader): _of_reader(state, str(reader)) for reader in self.share.readers}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Resumes from the positions of the readers that are run here; others may be there too."""
        self._iterator.set_state(_joined([state[str(reader)] for reader in self.share.readers]))

    def close(self) -> None:
        """Stops reader processes."""
        self._iterator.close()


def _of_reader(state: Any, reader: str) -> Any:
    """A state as if only one of its readers were run: Grain keeps one in each reader process."""
    if isinstance(state, dict):
        if READERS in state:
            return {READERS: {reader: state[READERS][reader]}}
        return {key: _of_reader(value, reader) for key, value in state.items()}
    if isinstance(state, list):
        return [_of_reader(value, reader) for value in state]
    return state


def _joined(states: Sequence[Any]) -> Any:
    """The inverse of `_of_reader`."""
    first = states[0]
    if isinstance(first, dict):
        if READERS in first:
            return {READERS: {key: s[READERS][key] for s in states for key in s[READERS]}}
        return {key: _joined([state[key] for state in states]) for key in first}
    if isinstance(first, list):
        return [_joined(values) for values in zip(*states, strict=True)]
    return first

"""Documents to rows of one length; importing this imports Grain.

Legend: N tokens of a document, L row length.
"""

import bisect
import dataclasses
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from grain import experimental as grain_experimental

from tlm_jax.data import store
from tlm_jax.data.shares import READERS

_PAIRS = "pairs"
BINS = 64
"""Rows that best-fit packing fills at a time: more waste less, and restore more slowly."""
_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio: its multiples modulo 2^64 are spread evenly, however many."""


class TokenDocuments:
    """Random access to the documents of a split, for `grain.MapDataset.source`.

    Items are {"pairs": (N + 1, 2) int32}: column 0 is end-of-text and the tokens,
    column 1 the tokens and end-of-text, which is what a model reads and what it
    must predict. Packing them as one feature keeps them together. A damaged record
    is None if those are to be skipped.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        split: store.Split,
        eot_id: int,
        skip_corrupt: bool,
        copies: pathlib.Path | None = None,
    ) -> None:
        self._arguments = (folder, split, eot_id, skip_corrupt, copies)
        self._eot = eot_id
        self._documents = store.DocumentReader(
            folder,
            store.open_manifest(folder),
            split,
            skip_corrupt=skip_corrupt,
            copies=copies,
        )

    def __reduce__(self) -> Any:
        return TokenDocuments, self._arguments  # reader processes open the files themselves

    def __repr__(self) -> str:
        return f"TokenDocuments{self._arguments!r}"

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray] | None:
        tokens = self._documents[int(index)]
        if tokens is None:
            return None
        pairs = np.empty((len(tokens) + 1, 2), np.int32)
        pairs[0, 0] = pairs[-1, 1] = self._eot
        pairs[1:, 0] = pairs[:-1, 1] = tokens
        return {_PAIRS: pairs}


class PackedRows(grain.IterDataset):
    """Rows of L, each with parts of documents or whole ones.

    Yields int32 arrays of shape (L,): `inputs`, `targets`, `document_ids` (1, 2, ...
    for the documents of the row, 0 for padding) and `positions` (from 0 in each
    document; one that continues in another row starts from 0 there).

    `concat` lays documents end to end and cuts them where a row ends; only the very
    last row has padding. `best_fit` fills BINS rows at a time, puts each document
    into the fullest row that has room, and pads what is left; documents longer than
    a row are cut at multiples of L first. The rows of a group come in an order drawn
    with `seed`, because full ones would come first.
    """

    def __init__(
        self, parent: grain.IterDataset, length: int, *, best_fit: bool = False, seed: int = 0
    ) -> None:
        self._best_fit = best_fit
        rows: grain.IterDataset
        if best_fit:
            rows = grain_experimental.BestFitPackIterDataset(
                grain_experimental.FlatMapIterDataset(parent, _CutLongDocuments(length=length)),
                length_struct={_PAIRS: length},
                num_packing_bins=BINS,
                seed=seed,
            )
        else:
            rows = grain_experimental.ConcatThenSplitIterDataset(
                parent, length_struct={_PAIRS: length}
            )
        super().__init__(rows)

    def __iter__(self) -> grain.DatasetIterator:
        return _PackedRowsIterator(self._parent.__iter__(), self._best_fit)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CutLongDocuments(grain_experimental.FlatMapTransform):
    length: int

    def flat_map(self, element: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        pairs = element[_PAIRS]
        starts = range(0, len(pairs), self.length)
        return [{_PAIRS: pairs[start : start + self.length]} for start in starts]


class _PackedRowsIterator(grain.DatasetIterator):
    """Names the arrays, and takes states that went through JSON."""

    def __init__(self, parent: grain.DatasetIterator, best_fit: bool) -> None:
        super().__init__(parent)
        self._best_fit = best_fit

    def __next__(self) -> dict[str, np.ndarray]:
        row = next(self._parent)
        return {
            "inputs": row[_PAIRS][:, 0],
            "targets": row[_PAIRS][:, 1],
            "document_ids": row[f"{_PAIRS}_segment_ids"],  # Grain's name
            "positions": row[f"{_PAIRS}_positions"],
        }

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        if not self._best_fit:
            # Grain compares these slices with a tuple. Checkpoints are JSON, which has only lists:
            # whenever a row had ended with a document, the next document would be lost.
            slices = {name: tuple(ends) for name, ends in state["remainder_slices"].items()}
            state = {**state, "remainder_slices": slices}
        self._parent.set_state(state)


class MixedRows(grain.IterDataset):
    """Rows of several parents by weight, as evenly as possible, from a place in the mixture.

    Readers that begin at different places make batches whose rows are mixed by weight too; all
    of them beginning at 0, a batch would have rows of one parent (Grain's `mix` has no such place).
    """

    def __init__(
        self, parents: Sequence[grain.IterDataset], weights: Sequence[float], place: int
    ) -> None:
        super().__init__(parents)
        ends = list(itertools.accumulate(weights))
        self._ends = [int(end / ends[-1] * 2**64) for end in ends[:-1]]
        self._place = place

    def __iter__(self) -> grain.DatasetIterator:
        return _MixedRowsIterator([p.__iter__() for p in self._parents], self._ends, self._place)


class _MixedRowsIterator(grain.DatasetIterator):
    def __init__(
        self, parents: Sequence[grain.DatasetIterator], ends: Sequence[int], place: int
    ) -> None:
        super().__init__(parents)
        self._ends, self._place = ends, place

    def __next__(self) -> dict[str, np.ndarray]:
        parent = bisect.bisect(self._ends, self._place * _GOLDEN % 2**64)
        row = next(self._parents[parent])
        self._place += 1
        return row

    def get_state(self) -> dict[str, Any]:
        return {"place": self._place, "parents": [p.get_state() for p in self._parents]}

    def set_state(self, state: dict[str, Any]) -> None:
        self._place = state["place"]
        for parent, of_parent in zip(self._parents, state["parents"], strict=True):
            parent.set_state(of_parent)


class ReadersRows(grain.IterDataset):
    """Some rows of each reader, one reader after the other.

    Yields arrays of shape (len(readers) * rows, L). States are kept apart by reader.

    Args:
      readers: rows by the number of the reader.
      rows: how many of each.
    """

    def __init__(self, readers: dict[int, grain.IterDataset], rows: int) -> None:
        super().__init__(list(readers.values()))
        self._numbers, self._rows = list(map(str, readers)), rows

    def __iter__(self) -> grain.DatasetIterator:
        return _ReadersRowsIterator(
            [reader.__iter__() for reader in self._parents], self._numbers, self._rows
        )


class _ReadersRowsIterator(grain.DatasetIterator):
    def __init__(
        self, readers: Sequence[grain.DatasetIterator], numbers: Sequence[str], rows: int
    ) -> None:
        super().__init__(readers)
        self._numbers, self._rows = numbers, rows

    def __next__(self) -> dict[str, np.ndarray]:
        rows = [next(reader) for reader in self._parents for _ in range(self._rows)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def get_state(self) -> dict[str, Any]:
        states = (reader.get_state() for reader in self._parents)
        return {READERS: dict(zip(self._numbers, states, strict=True))}

    def set_state(self, state: dict[str, Any]) -> None:
        for number, reader in zip(self._numbers, self._parents, strict=True):
            reader.set_state(state[READERS][number])

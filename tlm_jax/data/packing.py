"""Documents to rows of one length; importing this imports Grain.

Legend: N tokens of a document, L row length.
"""

import dataclasses
import pathlib
from typing import Any

import grain
import numpy as np
from grain import experimental as grain_experimental

from tlm_jax.data import store

_PAIRS = "pairs"
BINS = 64
"""Rows that best-fit packing fills at a time: more waste less, and restore more slowly."""


class TokenDocuments:
    """Random access to the documents of a split, for `grain.MapDataset.source`.

    Items are {"pairs": (N + 1, 2) int32}: column 0 is end-of-text and the tokens,
    column 1 the tokens and end-of-text, which is what a model reads and what it
    must predict. Packing them as one feature keeps them together. A damaged record
    is None if those are to be skipped.
    """

    def __init__(
        self, folder: pathlib.Path, split: store.Split, eot_id: int, skip_corrupt: bool
    ) -> None:
        self._arguments = (folder, split, eot_id, skip_corrupt)
        self._eot = eot_id
        self._documents = store.DocumentReader(
            folder, store.open_manifest(folder), split, skip_corrupt=skip_corrupt
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
    document; one that goes on in another row starts from 0 there).

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

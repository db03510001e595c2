"""Documents to rows of one length; importing this imports Grain.

Legend: N tokens of a document, L row length.
"""

import pathlib
from typing import Any

import grain
import numpy as np
from grain import experimental as grain_experimental

from tlm_jax.data.sources import Split

_PAIRS = "pairs"


class TokenDocuments:
    """Random access to the documents of a prepared split, for `grain.MapDataset.source`.

    Items are {"pairs": (N + 1, 2) int32}: column 0 is end-of-text and the tokens,
    column 1 the tokens and end-of-text, which is what a model reads and what it
    must predict. Packing them as one feature keeps them together.
    """

    def __init__(self, folder: pathlib.Path, split: Split, eot_id: int) -> None:
        from tlm_jax.data import builder

        self._arguments = (folder, split, eot_id)
        self._eot = eot_id
        self._records = builder.open_split(folder, split)
        # TFDS imports parts of itself on first use. Two of Grain's reader threads that do so at
        # once wait for each other for ever, so it is done here, in one thread.
        _ = self._records[0]

    def __reduce__(self) -> Any:
        return TokenDocuments, self._arguments  # reader processes open the files themselves

    def __repr__(self) -> str:
        return f"TokenDocuments{self._arguments!r}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        tokens = self._records[int(index)]["tokens"]
        pairs = np.empty((len(tokens) + 1, 2), np.int32)
        pairs[0, 0] = pairs[-1, 1] = self._eot
        pairs[1:, 0] = pairs[:-1, 1] = tokens
        return {_PAIRS: pairs}


class PackedRows(grain.IterDataset):
    """Concatenates documents and splits them into rows of L.

    Yields int32 arrays of shape (L,): `inputs`, `targets`, `segment_ids` (1, 2, ...
    for the documents of the row, 0 for padding, which only the very last row has)
    and `positions` (from 0 in each segment; a document that goes on in the next
    row starts from 0 there).
    """

    def __init__(self, parent: grain.IterDataset, length: int) -> None:
        super().__init__(
            grain_experimental.ConcatThenSplitIterDataset(parent, length_struct={_PAIRS: length})
        )

    def __iter__(self) -> grain.DatasetIterator:
        return _PackedRowsIterator(self._parent.__iter__())


class _PackedRowsIterator(grain.DatasetIterator):
    """Names the arrays, and takes states that went through JSON."""

    def __init__(self, parent: grain.DatasetIterator) -> None:
        super().__init__(parent)

    def __next__(self) -> dict[str, np.ndarray]:
        row = next(self._parent)
        return {
            "inputs": row[_PAIRS][:, 0],
            "targets": row[_PAIRS][:, 1],
            "segment_ids": row[f"{_PAIRS}_segment_ids"],
            "positions": row[f"{_PAIRS}_positions"],
        }

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        # Grain compares these slices with a tuple. Checkpoints are JSON, which has only lists:
        # whenever a row had ended with a document, the next document would be lost.
        slices = {name: tuple(ends) for name, ends in state["remainder_slices"].items()}
        self._parent.set_state({**state, "remainder_slices": slices})

"""Batches for tests: documents of given lengths, and padding."""

import itertools
from collections.abc import Sequence

import numpy as np


def batch(
    documents: Sequence[Sequence[int]], length: int, *, vocab: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random tokens, int32: a row for each list of document lengths, padded at the end."""
    shape = (len(documents), length)
    inputs, targets = np.random.default_rng(seed).integers(0, vocab, (2, *shape), dtype=np.int32)
    document_ids, positions = np.zeros((2, *shape), np.int32)
    for row, lengths in enumerate(documents):
        bounds = itertools.pairwise(itertools.accumulate(lengths, initial=0))
        for document, (start, end) in enumerate(bounds, 1):
            document_ids[row, start:end] = document
            positions[row, start:end] = np.arange(end - start)
    return {
        "inputs": inputs,
        "targets": targets,
        "document_ids": document_ids,
        "positions": positions,
    }

"""What the documents in a batch's rows ask of attention by cuDNN, which has a kernel for each case.

A program that chooses between them makes the host wait for the device in every layer, and keeps
what either kernel needs. So a train step is compiled for one kind of rows (`of_kind`), and each
batch goes to the program of its kind.

Shapes: B batch, L length.
"""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

MOST_DOCUMENTS = 32
"""Of a row in cuDNN's packed layout. The kernel's time grows with the places for documents that are
left empty, and log-sums take B M H L floats: 67 MB per layer for 8 rows of 4,096 tokens."""
_SHORTEST = 16
"""Mean tokens of a document in a row, below which cuDNN is left."""
_KIND = jax.make_user_context(default_value=None)


def limits(length: int) -> list[int]:
    """The most documents of a row for each kind but the last, which has no limit."""
    few, many = min(MOST_DOCUMENTS, length), length // _SHORTEST
    return [1, few, *([many] if many > few else [])]


def begins(document_ids_BL: jax.Array) -> jax.Array:
    """(B, L) bool: a token whose predecessor is of another document, or that has none."""
    changes = document_ids_BL[:, 1:] != document_ids_BL[:, :-1]
    return jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)


def kind(document_ids_BL: jax.Array) -> jax.Array:
    """int32 scalar: the kind that the row with the most documents needs.

    A kind serves rows of the smaller ones too. Runs of padding count as documents.
    """
    most = jnp.max(jnp.sum(begins(document_ids_BL), axis=1))
    return jnp.sum(most > jnp.asarray(limits(document_ids_BL.shape[1])))


def kind_on_host(document_ids_BL: np.ndarray) -> int:
    """`kind` of an array that is on no device."""
    changes = document_ids_BL[:, 1:] != document_ids_BL[:, :-1]
    most = 1 + int(changes.sum(axis=1).max())
    return sum(most > limit for limit in limits(document_ids_BL.shape[1]))


def describe(number: int, length: int) -> str:
    """What rows of a kind hold, such as "up to 32 documents in a row"."""
    if number == 0:
        return "one document in a row"
    bounds = limits(length)
    if number == len(bounds):
        return f"more than {bounds[-1]} documents in a row"
    return f"up to {bounds[number]} documents in a row"


@contextlib.contextmanager
def of_kind(number: int | None) -> Iterator[None]:
    """Programs that are traced inside take rows of this kind; with None they choose."""
    with _KIND(number):
        yield


def kind_of_program() -> int | None:
    """The number that `of_kind` was given."""
    number: int | None = _KIND.value
    return number

"""The state of a neural memory in mid-sequence.

Shapes: B batch, H heads, K head dim, I and O inputs and outputs of a memory layer.
"""

import dataclasses

import jax
import jax.numpy as jnp

Weights = tuple[jax.Array, ...]
"""One array per layer: (H, I, O) at the start, (B, H, I, O) for each sequence."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryState:
    """A memory in mid-sequence, float32."""

    chunk_start: Weights
    """(B, H, I, O): the weights at which gradients are taken."""
    now: Weights
    """(B, H, I, O): the weights after the last token."""
    step: Weights
    """(B, H, I, O): S, the last step; empty without momentum."""
    keys: Weights
    """(B, H, K, K): the sum of k k^T over the document; empty unless queries are projected."""
    length: jax.Array
    """int32 scalar: tokens so far, padding included."""
    document_ids_B: jax.Array
    """int32: document of the last token that was not padding; 0 before the first."""

    @classmethod
    def start(
        cls, initial: Weights, batch: int, *, momentum: bool, project: bool = False
    ) -> "MemoryState":
        """The state before the first token; of `initial` (H, I, O) only the shapes matter."""
        zeros = tuple(jnp.zeros((batch, *w.shape), jnp.float32) for w in initial)
        return cls(
            chunk_start=zeros,
            now=zeros,
            step=zeros if momentum else (),
            keys=no_keys(initial[0], batch) if project else (),
            length=jnp.int32(0),
            document_ids_B=jnp.zeros((batch,), jnp.int32),
        )


def no_keys(first: jax.Array, batch: int) -> Weights:
    """`MemoryState.keys` before the first token; `first` is (.., H, K, O)."""
    *_, heads, inputs, _ = first.shape
    return (jnp.zeros((batch, heads, inputs, inputs), first.dtype),)


def where(condition: jax.Array, a: Weights, b: Weights) -> Weights:
    """`jnp.where` of each layer."""
    return tuple(jnp.where(condition, x, y) for x, y in zip(a, b, strict=True))


def unless_new(initial: Weights, state: MemoryState, weights: Weights) -> Weights:
    """The weights of a state, or the initial ones of a sequence that has not begun.

    So an empty state need not know the initial weights of its layer.
    """
    begun = (state.document_ids_B > 0)[:, None, None, None]
    return where(begun, weights, initial)

"""Which tokens see which, and the name under which attention's result may be kept.

Shapes: B batch, L queries, S keys.
"""

import jax
import jax.numpy as jnp

from tlm_jax.branches import BRANCH

ATTENTION = "attention"
"""Name of what attention's kernel gives, for rematerialisation policies."""


def sees(query_ids_BL: jax.Array, key_ids_BS: jax.Array) -> jax.Array:
    """(B, L, S) bool: the key is of the query's document and branch, or of the trunk."""
    query_ids, key_ids = query_ids_BL[:, :, None], key_ids_BS[:, None, :]
    return (key_ids == query_ids) | (key_ids == query_ids % BRANCH)


def within(query_index_L: jax.Array, key_index_S: jax.Array, window: int | None) -> jax.Array:
    """(L, S) bool: the key is the query or before it, in a window among the last so many."""
    back_LS = query_index_L[:, None] - key_index_S
    return (back_LS >= 0) if window is None else (back_LS >= 0) & (back_LS < window)


def causal_mask(document_ids_BL: jax.Array, window: int | None = None) -> jax.Array:
    """(B, L, L) bool: a token sees itself and what is before it in its document and window."""
    index_L = jnp.arange(document_ids_BL.shape[1])
    return within(index_L, index_L, window) & sees(document_ids_BL, document_ids_BL)

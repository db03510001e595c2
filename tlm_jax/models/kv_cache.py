"""Keys and values of the tokens seen so far, for decoding.

Shapes: B batch, L new tokens, S slots, N key/value heads, K head dim.
"""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp

from tlm_jax.validation import require


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of the tokens seen so far."""

    k_BNSK: jax.Array
    v_BNSK: jax.Array
    document_ids_BS: jax.Array
    """int32; 0 marks rows not written yet and padding."""
    length: jax.Array
    """int32 scalar: rows written."""
    is_empty: bool = dataclasses.field(default=False, metadata={"static": True})
    """Whether nothing is written for certain, so that new tokens see each other only."""

    @classmethod
    def empty(
        cls, batch: int, length: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype
    ) -> Self:
        shape = (batch, num_kv_heads, length, head_dim)
        return cls(
            k_BNSK=jnp.zeros(shape, dtype),
            v_BNSK=jnp.zeros(shape, dtype),
            document_ids_BS=jnp.zeros((batch, length), jnp.int32),
            length=jnp.zeros((), jnp.int32),
        )

    def append(self, k_BLNK: jax.Array, v_BLNK: jax.Array, document_ids_BL: jax.Array) -> Self:
        """Writes L more tokens; the caller keeps `length + L` within the cache.

        Tokens beyond it, which a compiled program cannot refuse, make its values NaN.

        Raises:
          ValueError: L alone is more than the cache holds.
        """
        size, new = self.k_BNSK.shape[2], k_BLNK.shape[1]
        require(new <= size, f"{new} tokens do not fit a cache of {size}; make a longer cache")
        v_BLNK = jnp.where(self.length + new <= size, v_BLNK, jnp.nan)

        def write(old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
            new = new.astype(old.dtype)
            if self.is_empty:  # what was there is not read, and need not exist
                room = old.shape[axis] - new.shape[axis]
                return jnp.pad(new, [(0, room * (dim == axis)) for dim in range(new.ndim)])
            return jax.lax.dynamic_update_slice_in_dim(old, new, self.length, axis)

        return dataclasses.replace(
            self,
            k_BNSK=write(self.k_BNSK, k_BLNK.transpose(0, 2, 1, 3), 2),
            v_BNSK=write(self.v_BNSK, v_BLNK.transpose(0, 2, 1, 3), 2),
            document_ids_BS=write(self.document_ids_BS, document_ids_BL, 1),
            length=self.length + new,
            is_empty=False,
        )

    def last(self, count: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """k, v (B, S, N, K), document ids and slots of the last `count` tokens written, or more."""
        size = self.k_BNSK.shape[2]
        count = min(count, size)
        start = jnp.clip(self.length - count, 0, size - count)
        read = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=count)
        k, v = (read(x, axis=2).transpose(0, 2, 1, 3) for x in (self.k_BNSK, self.v_BNSK))
        return k, v, read(self.document_ids_BS, axis=1), start + jnp.arange(count)


def known_empty(caches: Any) -> Any:
    """Caches of a model that are empty, marked as such for the next tokens (see `is_empty`)."""

    def one(node: Any) -> Any:
        return dataclasses.replace(node, is_empty=True) if isinstance(node, KVCache) else node

    return jax.tree.map(one, caches, is_leaf=lambda node: isinstance(node, KVCache))

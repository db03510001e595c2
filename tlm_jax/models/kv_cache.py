"""Keys and values of the tokens seen so far, for decoding.

Shapes: B batch, L new tokens, S slots, N key/value heads, K head dim.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from tlm_jax.validation import require


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of the tokens seen so far."""

    k_BSNK: jax.Array
    v_BSNK: jax.Array
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
        kv = jnp.zeros((batch, length, num_kv_heads, head_dim), dtype)
        document_ids = jnp.zeros((batch, length), jnp.int32)
        return cls(k_BSNK=kv, v_BSNK=kv, document_ids_BS=document_ids, length=jnp.int32(0))

    def append(self, k_BLNK: jax.Array, v_BLNK: jax.Array, document_ids_BL: jax.Array) -> Self:
        """Writes L more tokens; the caller keeps `length + L` within the cache.

        Tokens beyond it, which a compiled program cannot refuse, make its values NaN.

        Raises:
          ValueError: L alone is more than the cache holds.
        """
        size, new = self.k_BSNK.shape[1], k_BLNK.shape[1]
        require(new <= size, f"{new} tokens do not fit a cache of {size}; make a longer cache")
        v_BLNK = jnp.where(self.length + new <= size, v_BLNK, jnp.nan)
        write = jax.lax.dynamic_update_slice_in_dim
        return dataclasses.replace(
            self,
            k_BSNK=write(self.k_BSNK, k_BLNK.astype(self.k_BSNK.dtype), self.length, axis=1),
            v_BSNK=write(self.v_BSNK, v_BLNK.astype(self.v_BSNK.dtype), self.length, axis=1),
            document_ids_BS=write(self.document_ids_BS, document_ids_BL, self.length, axis=1),
            length=self.length + new,
            is_empty=False,
        )


def known_empty(caches: Any) -> Any:
    """Caches of a model that are empty, marked as such for the next tokens (see `is_empty`)."""

    def one(node: Any) -> Any:
        return dataclasses.replace(node, is_empty=True) if isinstance(node, KVCache) else node

    return jax.tree.map(one, caches, is_leaf=lambda node: isinstance(node, KVCache))

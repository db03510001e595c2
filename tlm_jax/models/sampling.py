"""Sampling text, one token at a time, with a decoding cache.

Shapes: B batch, P prompt length, T tokens to sample, V vocab.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tlm_jax.models.language_model import Skeleton


def make_sampler(
    skeleton: Skeleton, *, num_tokens: int, temperature: float, vocab_size: int
) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """The function (params, prompt_BP int32, key) -> tokens_BT int32, not yet compiled.

    Args:
      skeleton: the model's structure.
      num_tokens: T, tokens to sample after the prompt.
      temperature: divides the logits; 0 is greedy.
      vocab_size: ids the tokenizer knows; higher ones are never sampled.
    """

    def sample(params: Any, prompt_BP: jax.Array, key: jax.Array) -> jax.Array:
        model = skeleton.merge(params)
        B, P = prompt_BP.shape

        def step(carry: Any, index: jax.Array) -> tuple[Any, jax.Array]:
            token_B, cache = carry
            hidden, cache = model(
                token_B[:, None], positions_BL=jnp.full((B, 1), index), cache=cache
            )
            logits_BV = model.logits(hidden)[:, 0, :vocab_size]
            if temperature == 0:
                drawn_B = jnp.argmax(logits_BV, axis=-1)
            else:
                step_key = jax.random.fold_in(key, index)
                drawn_B = jax.random.categorical(step_key, logits_BV / temperature)
            prompted_B = jax.lax.dynamic_index_in_dim(
                prompt_BP, jnp.minimum(index + 1, P - 1), axis=1, keepdims=False
            )
            next_B = jnp.where(index + 1 < P, prompted_B, drawn_B.astype(jnp.int32))
            return (next_B, cache), next_B

        total = P - 1 + num_tokens
        start = (prompt_BP[:, 0], model.init_cache(B, total))
        _, tokens = jax.lax.scan(step, start, jnp.arange(total))
        return tokens[P - 1 :].T

    return sample

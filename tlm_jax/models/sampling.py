"""Sampling text, one token at a time, with a decoding cache.

Shapes: B batch, P prompt length, T tokens to sample, V vocab.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from tlm_jax.models import online
from tlm_jax.models.skeleton import Skeleton
from tlm_jax.validation import Checked, NaturalNumber, NotNegative, Range


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig(Checked):
    """How the next token is drawn."""

    temperature: NotNegative = 0.8
    """Divides the logits; 0 is greedy."""
    top_k: NaturalNumber = 0
    """Draw among this many likeliest tokens; 0 is all."""
    top_p: Annotated[float, Range(above=0, most=1)] = 1.0
    """Draw among the likeliest tokens that hold this share of the probability."""


def draw(logits_BV: jax.Array, key: jax.Array, config: SamplingConfig) -> jax.Array:
    """Token ids (B,) int32 drawn from logits."""
    if config.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / config.temperature
    if config.top_k and config.top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, config.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if config.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        least_B1 = jnp.min(
            jnp.where(before_BV < config.top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True
        )
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)


def make_decoder(skeleton: Skeleton) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """How a model reads on from what it has read, with the updates that evaluation makes.

    Returns:
      start: (params, rows, length) -> the state before the first of `length` tokens per row.
      advance: (params, tokens_BL, state) -> logits_BV float32 after the last of the tokens, and
        the new state; `prefill=True` says that the tokens are the first.
    """
    if skeleton.config.mlp.online_chunks:

        def advance_online(
            params: Any, tokens_BL: jax.Array, state: Any, *, prefill: bool = False
        ) -> tuple[jax.Array, Any]:
            del prefill
            logits_BLV, state = online.advance(skeleton, params, tokens_BL, state)
            return logits_BLV[:, -1], state

        return functools.partial(online.init_state, skeleton), advance_online

    def start(params: Any, rows: int, length: int) -> Any:
        return jnp.int32(0), skeleton.merge(params).init_cache(rows, length)

    def advance(
        params: Any, tokens_BL: jax.Array, state: Any, *, prefill: bool = False
    ) -> tuple[jax.Array, Any]:
        (done, cache), L = state, tokens_BL.shape[1]
        model = skeleton.merge(params)
        positions_BL = jnp.broadcast_to(done + jnp.arange(L), tokens_BL.shape)
        hidden, cache = model(tokens_BL, positions_BL=positions_BL, cache=cache, prefill=prefill)
        return model.logits(hidden[:, -1:])[:, 0], (done + L, cache)

    return start, advance


def make_sampler(
    skeleton: Skeleton, config: SamplingConfig, *, num_tokens: int, vocab_size: int
) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """The function (params, prompt_BP int32, key) -> tokens_BT int32, not yet compiled.

    One program of one-token steps, prompt included: quick to compile.

    Args:
      skeleton: the model's structure.
      config: how tokens are drawn.
      num_tokens: T, tokens to sample after the prompt.
      vocab_size: ids the tokenizer knows; higher ones are never sampled.
    """

    start, advance = make_decoder(skeleton)

    def sample(params: Any, prompt_BP: jax.Array, key: jax.Array) -> jax.Array:
        B, P = prompt_BP.shape

        def step(carry: Any, index: jax.Array) -> tuple[Any, jax.Array]:
            token_B, state = carry
            logits_BV, state = advance(params, token_B[:, None], state)
            drawn_B = draw(logits_BV[:, :vocab_size], jax.random.fold_in(key, index), config)
            prompted_B = jax.lax.dynamic_index_in_dim(
                prompt_BP, jnp.minimum(index + 1, P - 1), axis=1, keepdims=False
            )
            next_B = jnp.where(index + 1 < P, prompted_B, drawn_B)
            return (next_B, state), next_B

        total = P - 1 + num_tokens
        first = (prompt_BP[:, 0], start(params, B, total))
        _, tokens = jax.lax.scan(step, first, jnp.arange(total))
        return tokens[P - 1 :].T

    return sample


def stream(
    skeleton: Skeleton,
    params: Any,
    prompt_BP: np.ndarray,
    config: SamplingConfig,
    *,
    num_tokens: int,
    vocab_size: int,
    seed: int = 0,
) -> Iterator[np.ndarray]:
    """Yields the next tokens (B,) int32 as they are drawn; the prompt is read in one pass.

    Args:
      skeleton: the model's structure.
      params: its parameters.
      prompt_BP: token ids, at least one per row.
      config: how tokens are drawn.
      num_tokens: tokens to draw per row.
      vocab_size: ids the tokenizer knows; higher ones are never drawn.
      seed: of the draws.
    """
    B, P = prompt_BP.shape
    key = jax.random.key(seed)

    start, advance = make_decoder(skeleton)

    def next_token(
        params: Any, tokens_BL: jax.Array, last: jax.Array, state: Any, *, prefill: bool = False
    ) -> Any:
        logits_BV, state = advance(params, tokens_BL, state, prefill=prefill)
        return draw(logits_BV[:, :vocab_size], jax.random.fold_in(key, last), config), state

    step = jax.jit(next_token, donate_argnums=3, static_argnames="prefill")
    state = jax.jit(lambda p: start(p, B, P + num_tokens))(params)
    tokens_B, state = step(params, jnp.asarray(prompt_BP), jnp.int32(P - 1), state, prefill=True)
    for index in range(num_tokens):
        yield np.asarray(tokens_B)
        if index + 1 < num_tokens:
            tokens_B, state = step(params, tokens_B[:, None], jnp.int32(P + index), state)

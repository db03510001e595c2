"""What the gates of a neural memory do over a chunk: which token's write reaches which read.

Shapes: B batch, L length, N chunks, C tokens of a chunk, H heads, K head dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

LOG_FLOOR = -40.0
"""Gates below exp(LOG_FLOOR) are that; keeps differences of cumulative logs exact enough."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Gates:
    """What each token does to the memory of each head; None turns a term off."""

    log_keep_BLH: jax.Array | None
    """log(1 - alpha) <= 0: the share of the weights that stays."""
    log_momentum_BLH: jax.Array | None
    """log(eta) <= 0: the share of the last step that is repeated."""
    rate_BLH: jax.Array
    """theta >= 0: the learning rate."""


def documents(
    document_ids_BL: jax.Array, chunk: int, last_B: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Numbers the documents of each chunk; padding belongs to the document before it.

    Args:
      document_ids_BL: int32, 0 is padding; L is a multiple of `chunk`.
      chunk: tokens of a chunk.
      last_B: int32, document of the last token before these, 0 if there is none.

    Returns:
      run_BL: int32, 0 in the first document of a chunk, one more at each further one.
      restart_BN: bool, the chunk's first token begins a new document.
      last_B: as given, after these tokens.
    """
    B, L = document_ids_BL.shape
    ids = jnp.concatenate([last_B[:, None], document_ids_BL], axis=1)
    index = jnp.where(ids > 0, jnp.arange(L + 1), 0)
    ids = jnp.take_along_axis(ids, jax.lax.cummax(index, axis=1), axis=1)
    begins_BNC = ((ids[:, 1:] != ids[:, :-1]) & (ids[:, :-1] > 0)).reshape(B, -1, chunk)
    restart_BN = begins_BNC[:, :, 0]
    run_BNC = jnp.cumsum(begins_BNC.at[:, :, 0].set(False).astype(jnp.int32), axis=-1)
    return run_BNC.reshape(B, L), restart_BN, ids[:, -1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of one chunk (in a scan's input a leading dim counts chunks)."""

    q_BHCK: jax.Array
    k_BHCK: jax.Array
    v_BHCK: jax.Array
    log_keep_BHC: jax.Array | None
    log_momentum_BHC: jax.Array | None
    rate_BHC: jax.Array
    real_BC: jax.Array | None = None
    """False at padding."""
    run_BC: jax.Array | None = None
    """Number of the token's document within the chunk; 0 is that of the chunk's first token."""
    restart_B: jax.Array | None = None
    """The chunk's first token begins a document."""
    mixed: jax.Array | None = None
    """bool scalar: some row of the batch begins a document in this chunk."""
    complete: jax.Array | None = None
    """The chunk ends with these tokens, so that the next takes gradients after them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coefficients:
    """The gates of a chunk multiplied out; columns (..., C, 1) scale rows of tokens."""

    mix_BHCC: jax.Array
    """What token t's weights hold of minus the gradient of token i, [t, i]; `end_coefficients`
    gives the last t only, here and below."""
    keep_BHC1: jax.Array | None
    """What they hold of the chunk's first weights (or of the initial ones)."""
    carry_BHC1: jax.Array | None
    """What they hold of the chunk's first step S."""
    step_mix_BHC1: jax.Array | None
    """What the last step holds of minus the gradient of token i."""
    step_carry_BH11: jax.Array | None
    """What the last step holds of the first."""


def same_document(tokens: Tokens) -> jax.Array:
    """Whether token i is of the document of token t and not after it, [.., t, i]."""
    C = tokens.rate_BHC.shape[-1]
    seen = jnp.arange(C)[:, None] >= jnp.arange(C)
    if tokens.run_BC is not None:
        seen = seen & (tokens.run_BC[:, None, :, None] == tokens.run_BC[:, None, None, :])
    return seen


def coefficients(tokens: Tokens) -> Coefficients:
    """Products of gates from cumulative sums of logs: the matrices D, E and D E diag(rate)."""
    rate_BHC = tokens.rate_BHC
    C = rate_BHC.shape[-1]
    seen = same_document(tokens)

    def products(log_BHC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """prod of gates (i, t] at [t, i], and of all gates of the document up to t."""
        log_BHC = jnp.maximum(log_BHC, LOG_FLOOR)
        if tokens.real_BC is not None:  # padding keeps everything as it is
            log_BHC = jnp.where(tokens.real_BC[:, None], log_BHC, 0.0)
        if tokens.run_BC is None:
            total = jnp.cumsum(log_BHC, axis=-1)
        else:  # sums within documents, so that not even rounding tells of the one before
            total = jnp.sum(jnp.where(seen, log_BHC[..., None, :], 0.0), axis=-1)
        between = jnp.exp(jnp.where(seen, total[..., :, None] - total[..., None, :], -jnp.inf))
        return between, jnp.exp(total)

    keep = carry = step_mix = step_carry = None
    if tokens.real_BC is not None:
        rate_BHC = jnp.where(tokens.real_BC[:, None], rate_BHC, 0.0)
    if tokens.log_keep_BHC is None:
        decay = jnp.broadcast_to(seen, (*rate_BHC.shape, C)).astype(rate_BHC.dtype)
    else:
        decay, keep = products(tokens.log_keep_BHC)
    if tokens.log_momentum_BHC is None:
        mix = decay * rate_BHC[..., None, :]
    else:
        if tokens.real_BC is not None:  # padding takes no step
            decay = jnp.where(tokens.real_BC[:, None, None, :], decay, 0.0)
        repeat, repeat_first = products(tokens.log_momentum_BHC)
        if tokens.run_BC is not None:
            repeat_first = jnp.where(tokens.run_BC[:, None] == 0, repeat_first, 0.0)
        highest = jax.lax.Precision.HIGHEST
        mix = jnp.matmul(decay, repeat, precision=highest) * rate_BHC[..., None, :]
        carry = jnp.matmul(decay, repeat_first[..., None], precision=highest)
        step_mix = (repeat[..., -1, :] * rate_BHC)[..., None]
        step_carry = repeat_first[..., -1, None, None]
    return Coefficients(
        mix_BHCC=mix,
        keep_BHC1=None if keep is None else keep[..., None],
        carry_BHC1=carry,
        step_mix_BHC1=step_mix,
        step_carry_BH11=step_carry,
    )


def end_coefficients(tokens: Tokens) -> Coefficients:
    """The same for the chunk's last token alone, of which a long chunk needs no (C, C) matrix.

    With a_i = sum_j decay_j momentum_(i..j] over i <= j, what the last weights hold of the step
    that token i takes: a_i = decay_i + momentum_{i+1} a_{i+1}.
    """
    rate_BHC = tokens.rate_BHC
    counts = jnp.ones((rate_BHC.shape[0], 1, rate_BHC.shape[-1]), bool)
    only = jnp.ones((rate_BHC.shape[0], 1), bool)  # the chunk's first document is its last
    if tokens.run_BC is not None and tokens.real_BC is not None:
        counts = ((tokens.run_BC == tokens.run_BC[:, -1:]) & tokens.real_BC)[:, None]
        only = (tokens.run_BC[:, -1] == 0)[:, None]

    def shifted(x_BHC: jax.Array) -> jax.Array:
        return jnp.pad(x_BHC[..., 1:], ((0, 0), (0, 0), (0, 1)))

    def products(log_BHC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Each gate, those after it multiplied, and all of them; of the last document."""
        log_BHC = jnp.where(counts, jnp.maximum(log_BHC, LOG_FLOOR), 0.0)
        to_end = jax.lax.cumsum(log_BHC, axis=2, reverse=True)
        return jnp.exp(log_BHC), jnp.exp(shifted(to_end)), jnp.exp(to_end[..., 0])

    keep = carry = step_mix = step_carry = None
    rate_BHC = jnp.where(counts, rate_BHC, 0.0)
    held = counts.astype(rate_BHC.dtype) * jnp.ones_like(rate_BHC)
    if tokens.log_keep_BHC is not None:
        _, decay, keep = products(tokens.log_keep_BHC)
        held = jnp.where(counts, decay, 0.0)
    if tokens.log_momentum_BHC is not None:
        momentum, repeat, repeat_first = products(tokens.log_momentum_BHC)

        def one_more(later: tuple, token: tuple) -> tuple:
            return later[0] * token[0], token[1] + token[0] * later[1]

        pair = shifted(momentum), held
        held = jax.lax.associative_scan(one_more, pair, reverse=True, axis=2)[1]
        carry = jnp.where(only, momentum[..., 0] * held[..., 0], 0.0)[..., None, None]
        step_mix = (repeat * rate_BHC)[..., None]
        step_carry = jnp.where(only, repeat_first, 0.0)[..., None, None]
    return Coefficients(
        mix_BHCC=(held * rate_BHC)[..., None, :],
        keep_BHC1=None if keep is None else keep[..., None, None],
        carry_BHC1=carry,
        step_mix_BHC1=step_mix,
        step_carry_BH11=step_carry,
    )

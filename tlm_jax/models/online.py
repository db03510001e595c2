"""Updates of MLP levels inside a sequence: fast weights of each row, changed chunk by chunk.

The continuum memory system of arXiv 2512.24695 (eq. 70-71) with the task loss and plain
gradient descent: level i of every layer, with chunks of C_i tokens, starts a document at
its trained weights and follows

    fast_i <- fast_i - online_learning_rate * sum over the chunk's tokens of d nll / d fast_i

when a chunk ends. A row runs in pieces of the smallest chunk, all of whose tokens see the
same weights; the gradient of a piece is taken at the weights that the piece ran with.

- Causal: token t uses updates of chunks before its own only, floor(t / C_i), and the last
  target of a chunk is the first token that sees the update.
- Truncated: earlier pieces enter a piece's gradient as constants, through the mixers'
  caches, which keep what the pieces computed with the weights of their time.
- By row: weights, gradients and caches are those of one row. Chunks are counted from the
  row's start.
- By document: a piece in which a document begins runs from the trained weights, its
  gradient is that of its last document only, and what the document before has learned is
  dropped. That document's last tokens, if they lie in the same piece, still use it.
- As a part of training, the fast weights are the trained ones plus a constant: gradients
  reach the trained weights as if no update depended on them (first order). They do pass
  through the caches, so that a rate of 0 is ordinary training.

Shapes: B batch (rows), L length, C tokens of a piece, P pieces of a row, V vocab.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from tlm_jax.mlp import MLPConfig
from tlm_jax.models.skeleton import Skeleton
from tlm_jax.ops.cross_entropy import token_losses

TokenLosses = Callable[..., tuple[jax.Array, jax.Array]]
Levels = dict[str, dict[str, Any]]
"""Parameters of the updated levels, by stack of layers and level."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FastWeights:
    """What each row has learned, as float32 differences from the trained weights (B, ...)."""

    used: Levels
    """What tokens see now."""
    ahead: Levels
    """With the pieces of chunks that have not ended, too."""

    def restart(self, keep_B: jax.Array) -> "FastWeights":
        """Back to the trained weights in rows where `keep_B` is False."""
        return jax.tree.map(lambda a: jnp.where(_like(keep_B, a), a, 0.0), self)

    def descend(self, config: MLPConfig, gradients: Levels, pieces: jax.Array) -> "FastWeights":
        """After `pieces` pieces of the row, the last of which has these gradients."""
        ahead = jax.tree.map(
            lambda a, g: a - config.online_learning_rate * g, self.ahead, gradients
        )
        tokens = pieces * config.online_piece

        def end_of_chunk(level: str, used: Any, ahead: Any) -> Any:
            ends = tokens % config.online_chunks[int(level)] == 0
            return jax.tree.map(lambda u, a: jnp.where(ends, a, u), used, ahead)

        used = {
            segment: {
                level: end_of_chunk(level, levels[level], ahead[segment][level]) for level in levels
            }
            for segment, levels in self.used.items()
        }
        return FastWeights(used=used, ahead=ahead)


def _like(mask_B: jax.Array, a: jax.Array) -> jax.Array:
    return mask_B.reshape(-1, *(1,) * (a.ndim - 1))


def _levels(config: MLPConfig, params: Any) -> Levels:
    updated = [str(level) for level, chunk in enumerate(config.online_chunks) if chunk]
    return {
        name: {level: layers["mlp"][level] for level in updated}
        for name, layers in _stacked_layers(params["segments"])
    }


def _stacked_layers(segments: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Name and parameters of each stack of layers; a segment with a pattern has several."""
    for name, part in segments.items():
        if "mlp" in part:
            yield above + name, part
        else:
            yield from _stacked_layers(part, f"{above}{name}/")


def _with_levels(params: Any, levels: Levels) -> Any:
    def replaced(part: Any, name: str) -> Any:
        if name in levels:
            return part | {"mlp": part["mlp"] | levels[name]}
        return {key: replaced(value, f"{name}/{key}") for key, value in part.items()}

    segments = {name: replaced(part, name) for name, part in params["segments"].items()}
    return params | {"segments": segments}


def _plus(levels: Levels, difference: Levels) -> Levels:
    return jax.tree.map(jnp.add, levels, difference)


def _per_row(tree: Any, rows: int) -> Any:
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (rows, *a.shape)), tree)


class _Pieces:
    """Runs one piece of all rows, each with its own weights."""

    def __init__(
        self, skeleton: Skeleton, params: Any, *, chunk: int, losses: TokenLosses = token_losses
    ):
        self.config = skeleton.config.mlp
        if not self.config.online_chunks:
            raise ValueError("mlp.online_chunks is empty: this model has no updates in a sequence")
        self.skeleton, self.params, self.losses = skeleton, params, losses
        self.chunk = math.gcd(chunk, self.config.online_piece)  # 0 stays the whole piece

    def start(self, rows: int, length: int) -> tuple[FastWeights, Any]:
        """Trained weights and empty caches."""
        zeros = jax.tree.map(
            lambda a: jnp.zeros((rows, *a.shape)), _levels(self.config, self.params)
        )
        cache = self.skeleton.merge(self.params).init_cache(1, length)
        return FastWeights(used=zeros, ahead=zeros), _per_row(cache, rows)

    def _row(self, levels: Levels, cache: Any, piece: dict[str, jax.Array]) -> tuple[Any, ...]:
        model = self.skeleton.merge(_with_levels(self.params, levels))
        piece = {name: a[None] for name, a in piece.items()}
        hidden, cache = model(
            piece["inputs"],
            positions_BL=piece["positions"],
            document_ids_BL=piece["document_ids"],
            cache=cache,
        )
        nll, log_z = self.losses(hidden, model.head_DV, piece["targets"], chunk=self.chunk)
        return nll[0], log_z[0], cache

    def levels(self, difference: Levels) -> Levels:
        return _plus(_levels(self.config, self.params), difference)

    def run(self, used: Levels, cache: Any, piece: dict[str, jax.Array]) -> tuple[Any, ...]:
        """(nll_BC, log_z_BC, cache) of a piece of (B, C) arrays."""
        return jax.vmap(lambda d, *args: self._row(self.levels(d), *args))(used, cache, piece)

    def learn(
        self, used: Levels, cache: Any, piece: dict[str, jax.Array], learned_BC: jax.Array
    ) -> tuple[Levels, tuple[Any, ...]]:
        """Each row's gradient of its summed losses where `learned_BC`, and what `run` returns."""

        def row(difference: Levels, cache: Any, piece: Any, learned_C: jax.Array) -> Any:
            def loss(levels: Levels) -> tuple[jax.Array, Any]:
                out = self._row(levels, cache, piece)
                return jnp.sum(jnp.where(learned_C, out[0], 0.0)), out

            return jax.grad(loss, has_aux=True)(self.levels(difference))

        gradients, out = jax.vmap(row)(used, cache, piece, learned_BC)
        return jax.lax.stop_gradient(gradients), out


def online_losses(
    skeleton: Skeleton,
    params: Any,
    batch: dict[str, jax.Array],
    *,
    chunk: int,
    losses: TokenLosses = token_losses,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`loss.batch_losses` with updates inside the rows.

    Costs a backward pass of the updated levels, and float32 copies of their weights for
    every row.

    Args:
      skeleton: the model's structure; its config has `mlp.online_chunks`.
      params: its parameters.
      batch: int32 (B, L) arrays `inputs`, `targets`, `positions` and `document_ids`; a
        document is a run of equal document ids, 0 is padding. L need not be a multiple
        of the chunks.
      chunk: see `cross_entropy.token_losses`; cut to a divisor of the piece.
      losses: gives the negative log-likelihoods, which the updates descend on, and one more
        value per token, which is returned in place of log_z_BL.

    Returns:
      nll_BL and log_z_BL, float32, zero at padding, and scored_BL, bool.

    Raises:
      ValueError: the model has no `mlp.online_chunks`.
    """
    pieces = _Pieces(skeleton, params, chunk=chunk, losses=losses)
    C = pieces.config.online_piece
    B, L = batch["inputs"].shape
    P = -(-L // C)

    def split(a_BL: jax.Array) -> jax.Array:
        return jnp.pad(a_BL, ((0, 0), (0, P * C - L))).reshape(B, P, C).swapaxes(0, 1)

    def body(carry: Any, index_and_piece: Any) -> tuple[Any, Any]:
        fast, cache, document_B = carry
        index, piece = index_and_piece
        ids_BC = piece["document_ids"]
        last_B = ids_BC[:, -1]
        continues_B = last_B == document_B  # then the whole piece is of one document
        leaving_BC = (ids_BC == document_B[:, None]) & ~continues_B[:, None]
        learned_BC = (ids_BC == last_B[:, None]) & (ids_BC > 0)

        now = fast.restart(continues_B)
        gradients, (nll_BC, log_z_BC, new_cache) = pieces.learn(now.used, cache, piece, learned_BC)
        # Only the last tokens of documents that end within a piece need a second pass.
        left = jax.lax.cond(
            jnp.any(leaving_BC & (ids_BC > 0)),
            lambda: pieces.run(fast.used, cache, piece)[:2],
            lambda: (nll_BC, log_z_BC),
        )
        out = jax.tree.map(functools.partial(jnp.where, leaving_BC), left, (nll_BC, log_z_BC))
        return (now.descend(pieces.config, gradients, index + 1), new_cache, last_B), out

    if skeleton.config.remat != "none":
        body = jax.checkpoint(body, prevent_cse=False)
    names = ("inputs", "targets", "positions", "document_ids")
    start = (*pieces.start(B, P * C), jnp.zeros(B, jnp.int32))
    split_batch = {name: split(batch[name]) for name in names}
    _, (nll, log_z) = jax.lax.scan(body, start, (jnp.arange(P), split_batch))
    nll_BL, log_z_BL = (a.swapaxes(0, 1).reshape(B, P * C)[:, :L] for a in (nll, log_z))
    scored_BL = batch["document_ids"] > 0
    return jnp.where(scored_BL, nll_BL, 0.0), jnp.where(scored_BL, log_z_BL, 0.0), scored_BL


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineState:
    """Decoding with updates: one document per row, all rows equally long."""

    fast: FastWeights
    cache: Any
    """The mixers' state after the last token; every leaf has a leading row dim."""
    piece_cache: Any
    """The same where the current piece began, for the piece is run again when it ends."""
    tokens_BC: jax.Array
    """The current piece."""
    length: jax.Array
    """int32 scalar: tokens so far."""


def init_state(skeleton: Skeleton, params: Any, batch: int, length: int) -> OnlineState:
    """The state before the first of at most `length` tokens of `batch` rows.

    Raises:
      ValueError: the model has no `mlp.online_chunks`.
    """
    pieces = _Pieces(skeleton, params, chunk=0)
    fast, cache = pieces.start(batch, length)
    return OnlineState(
        fast=fast,
        cache=cache,
        piece_cache=cache,
        tokens_BC=jnp.zeros((batch, pieces.config.online_piece), jnp.int32),
        length=jnp.int32(0),
    )


def advance(
    skeleton: Skeleton, params: Any, tokens_BL: jax.Array, state: OnlineState
) -> tuple[jax.Array, OnlineState]:
    """Reads tokens one by one, with the updates that `online_losses` makes.

    A piece is learned from when the token after it arrives: only then is its last target
    known.

    Args:
      skeleton: the model's structure; its config has `mlp.online_chunks`.
      params: its parameters.
      tokens_BL: the next tokens, int32; the caller keeps within the state's length.
      state: from `init_state` or the last call.

    Returns:
      logits_BLV, float32, and the new state.
    """
    pieces = _Pieces(skeleton, params, chunk=0)
    C = pieces.config.online_piece

    def finish_piece(state: OnlineState, token_B: jax.Array) -> OnlineState:
        piece = {
            "inputs": state.tokens_BC,
            "targets": jnp.concatenate([state.tokens_BC[:, 1:], token_B[:, None]], axis=1),
            "positions": jnp.broadcast_to(state.length - C + jnp.arange(C), state.tokens_BC.shape),
            "document_ids": jnp.ones_like(state.tokens_BC),
        }
        everywhere = jnp.ones(state.tokens_BC.shape, bool)
        gradients, _ = pieces.learn(state.fast.used, state.piece_cache, piece, everywhere)
        fast = state.fast.descend(pieces.config, gradients, state.length // C)
        return dataclasses.replace(state, fast=fast, piece_cache=state.cache)

    def one_token(state: OnlineState, token_B: jax.Array) -> tuple[OnlineState, jax.Array]:
        ends = (state.length > 0) & (state.length % C == 0)
        state = jax.lax.cond(ends, finish_piece, lambda state, _: state, state, token_B)

        def row(difference: Levels, cache: Any, token: jax.Array) -> tuple[jax.Array, Any]:
            model = skeleton.merge(_with_levels(params, pieces.levels(difference)))
            hidden, cache = model(
                token[None, None], positions_BL=state.length[None, None], cache=cache
            )
            return model.logits(hidden)[0, 0], cache

        logits_BV, cache = jax.vmap(row)(state.fast.used, state.cache, token_B)
        tokens_BC = jax.lax.dynamic_update_slice_in_dim(
            state.tokens_BC, token_B[:, None], state.length % C, axis=1
        )
        state = dataclasses.replace(
            state, cache=cache, tokens_BC=tokens_BC, length=state.length + 1
        )
        return state, logits_BV

    state, logits = jax.lax.scan(one_token, state, tokens_BL.T)
    return logits.swapaxes(0, 1), state

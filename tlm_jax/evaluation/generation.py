"""Greedy continuations of many prompts at once.

Shapes: B rows, P prompt length, T tokens to write.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from tlm_jax.data import Tokenizer
from tlm_jax.models import Skeleton
from tlm_jax.models.sampling import make_decoder
from tlm_jax.validation import round_up

_PIECE = 16
"""Tokens written between looks at whether all rows have ended."""


class Generator:
    """Writes greedy continuations with a model.

    Prompts of models to which it matters where in a row a token stands (see
    `MixerConfig.masks_by_document`) are batched by equal length; others are filled up on the left.

    Args:
      skeleton: the model's structure.
      params: its parameters, on `mesh`, which must be the current one.
      tokenizer: the model's.
      mesh: the mesh; all rows lie on all devices.
      max_length: most tokens of prompt and continuation together; longer prompts lose their
        beginning.
      batch_tokens: tokens of a batch, about.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        params: Any,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        max_length: int,
        batch_tokens: int = 8192,
    ) -> None:
        self.skeleton, self.params, self.tokenizer = skeleton, params, tokenizer
        self.max_length, self.batch_tokens = max_length, batch_tokens
        config = skeleton.config
        self._fills = not config.mlp.online_chunks and all(
            mixer.masks_by_document for mixer in config.mixers
        )
        everywhere = NamedSharding(mesh, jax.P())
        self._begin = jax.jit(
            functools.partial(_begin, skeleton, tokenizer.vocab_size),
            static_argnames="room",
            out_shardings=everywhere,
        )
        self._continue = jax.jit(
            functools.partial(_continue, skeleton, tokenizer.vocab_size),
            donate_argnums=(2,),
            out_shardings=everywhere,
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: Sequence[int],
        stops: Sequence[Sequence[str]],
        keep_stop: bool = False,
    ) -> Iterator[tuple[int, str]]:
        """Yields (index, text) of each prompt's continuation, longest prompts first.

        A text ends before the first of its stop texts (`keep_stop`: after it), at a token that
        ends texts (`Tokenizer.end_ids`), or after its `max_tokens`.
        """
        cut = [
            tuple(p)[-max(1, self.max_length - n) :]
            for p, n in zip(prompts, max_tokens, strict=True)
        ]

        def length(index: int) -> int:
            size = len(cut[index])
            return round_up(size, 64) if self._fills else size

        order = sorted(range(len(cut)), key=lambda i: (-length(i), i))
        while order:
            P = length(order[0])
            most = max(1, self.batch_tokens // (P + max_tokens[order[0]]))
            batch = [i for i in order[:most] if length(i) == P]
            order = order[len(batch) :]
            rows = [cut[i] for i in batch]
            rows += [rows[0]] * (min(most, len(cut)) - len(rows))  # few shapes
            texts = self._batch(
                rows, P, [max_tokens[i] for i in batch], [list(stops[i]) for i in batch]
            )
            for index, text in zip(batch, texts, strict=True):
                yield index, text if keep_stop else _before(text, stops[index])

    def _batch(
        self,
        rows: Sequence[Sequence[int]],
        P: int,
        max_tokens: Sequence[int],
        stops: Sequence[Sequence[str]],
    ) -> list[str]:
        written: list[list[int]] = [[] for _ in max_tokens]
        texts: list[str | None] = [None] * len(written)
        for piece in self.pieces(rows, P, max(max_tokens)):
            for i, row in enumerate(piece[: len(written)].tolist()):
                if texts[i] is None:
                    written[i] += row
                    texts[i] = self._ended(written[i], max_tokens[i], stops[i])
            if None not in texts:
                break
        return [text for text in texts if text is not None]

    def pieces(self, rows: Sequence[Sequence[int]], P: int, total: int) -> Iterator[np.ndarray]:
        """Yields the next tokens (B, T) int32 of all rows, a few at a time, at least `total`.

        Args:
          rows: prompts of at most P tokens.
          P: what they are filled up to, on the left.
          total: tokens to write.
        """
        tokens = np.zeros((len(rows), P), np.int32)
        for i, row in enumerate(rows):
            tokens[i, P - len(row) :] = row
        lengths = np.asarray([len(row) for row in rows], np.int32)
        number = -(-total // _PIECE)
        room = P + number * _PIECE
        token_B, state = self._begin(self.params, tokens, lengths, room=room)
        for _ in range(number):
            token_B, state, out_BT = self._continue(self.params, token_B, state)
            yield np.asarray(out_BT)

    def _ended(self, written: Sequence[int], most: int, stops: Sequence[str]) -> str | None:
        """The text, if it has come to its end; what follows a stop text may be with it."""
        tokens = list(written[:most])
        ended = len(written) >= most
        end = next((at for at, token in enumerate(tokens) if token in self.tokenizer.end_ids), None)
        if end is not None:
            tokens, ended = tokens[:end], True
        text = self.tokenizer.decode(tokens)
        return text if ended or any(stop in text for stop in stops if stop) else None


def _before(text: str, stops: Sequence[str]) -> str:
    """A text up to the first stop text in it."""
    return text[: min((at for at in map(text.find, filter(None, stops)) if at >= 0), default=None)]


def _begin(
    skeleton: Skeleton,
    vocab_size: int,
    params: Any,
    tokens_BP: jax.Array,
    lengths_B: jax.Array,
    *,
    room: int,
) -> tuple[jax.Array, Any]:
    """(token_B, state) after the prompts, whose tokens stand at the right end of their rows."""
    B, P = tokens_BP.shape
    if skeleton.config.mlp.online_chunks:
        start, advance = make_decoder(skeleton)
        logits_BV, state = advance(params, tokens_BP, start(params, B, room))
        return jnp.argmax(logits_BV[:, :vocab_size], -1).astype(jnp.int32), state
    model = skeleton.merge(params)
    positions_BP = jnp.arange(P) - (P - lengths_B[:, None])
    hidden_BPD, cache = model(
        tokens_BP,
        positions_BL=jnp.maximum(positions_BP, 0),
        document_ids_BL=(positions_BP >= 0).astype(jnp.int32),
        cache=model.init_cache(B, room),
        prefill=True,
    )
    logits_BV = model.logits(hidden_BPD[:, -1:])[:, 0, :vocab_size]
    return jnp.argmax(logits_BV, -1).astype(jnp.int32), (lengths_B, cache)


def _continue(
    skeleton: Skeleton, vocab_size: int, params: Any, token_B: jax.Array, state: Any
) -> tuple[jax.Array, Any, jax.Array]:
    """Writes `_PIECE` tokens: (the next token_B, state, those written (B, T))."""
    online = bool(skeleton.config.mlp.online_chunks)
    _, advance = make_decoder(skeleton)
    model = skeleton.merge(params)

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        token_B, state = carry
        if online:
            logits_BV, state = advance(params, token_B[:, None], state)
        else:
            lengths_B, cache = state
            hidden_B1D, cache = model(
                token_B[:, None], positions_BL=lengths_B[:, None], cache=cache
            )
            logits_BV, state = model.logits(hidden_B1D)[:, 0], (lengths_B + 1, cache)
        next_B = jnp.argmax(logits_BV[:, :vocab_size], -1).astype(jnp.int32)
        return (next_B, state), token_B

    (token_B, state), out_TB = jax.lax.scan(step, (token_B, state), None, length=_PIECE)
    return token_B, state, out_TB.T

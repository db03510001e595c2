"""Neural memory: an MLP per head that learns while it reads (Titans, arXiv 2501.00663, section 3).

Shapes: B batch, L length, N chunks, C tokens of a chunk, H heads, K head dim, I and O
inputs and outputs of a memory layer (the first reads K, the last writes K, between
them lies the hidden width). Weights multiply from the right: a layer is a_I @ W_IO.

The memory of a sequence is M(x) = x W (depth 1) or M(x) = x + s(..s(x W_1)..) W_n
with s = GELU (depth n > 1). Token t takes a step on |M(k_t) - v_t|^2 and reads:

    S_t = momentum_t S_{t-1} - rate_t grad,   W_t = keep_t W_{t-1} + S_t,   y_t = M_t(q_t)

with grad taken at the weights that the token's chunk began with (section 3.1 of the
paper, whose parallel form covers decay alone; keep = 1 - alpha, momentum = eta, rate =
theta). Within a chunk W_t is linear in the gradients, and a token's gradient of a layer is an
outer product a_i g_i^T, so that

    x_t W_t = keep_(1..t) x_t W_0 + carry_t x_t S_0 - sum_{i<=t} mix[t, i] (x_t . a_i) g_i

needs no weights per token: products of (C, C) matrices with (C, I) and (C, O).
This is exact, not an approximation of the recurrence.

Two options serve TNT (arXiv 2511.07343). Reads at the chunk's first weights (eq. 7, the global
memory) need no products between tokens, so that a chunk may be long. Projected queries (eq. 7,
local memories) are led to the keys seen so far, whose subspace is all that the memory knows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from tlm_jax.models.memory_gates import (
    Gates,
    Tokens,
    coefficients,
    documents,
    end_coefficients,
    same_document,
)
from tlm_jax.models.memory_state import MemoryState, Weights, no_keys, unless_new, where
from tlm_jax.ops import gelu_and_slope

Reads = Literal["now", "chunk_start"]
_State = tuple[Weights, Weights, Weights, Weights]
"""chunk_start (empty where it equals now: at the start of a chunk), now, step, keys."""


def _zeros(weights: Weights) -> Weights:
    return tuple(map(jnp.zeros_like, weights))


def _again(body: Callable[..., Any]) -> Callable[..., Any]:
    """The same in a scan, computed again in the backward pass."""
    return jax.checkpoint(body, prevent_cse=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chunk:
    """The arithmetic of one chunk, called as the body of a scan."""

    initial: Weights
    """(H, I, O), or one for each row."""
    clip: float | None
    precision: jax.lax.Precision
    reads: Reads = "now"

    def __call__(self, state: _State, tokens: Tokens) -> tuple[_State, jax.Array]:
        """Reads and learns; returns the new state and the reads (B, H, C, K)."""
        if tokens.run_BC is None or tokens.mixed is None:
            return _again(lambda state, tokens: self.run(state, tokens, None))(state, tokens)
        late_BC = tokens.run_BC > 0
        # Only where a document begins is there anything to do with the initial weights. What the
        # backward pass computes again is said inside the branches: around them, both would be
        # kept, filled up with zeros.
        return jax.lax.cond(
            tokens.mixed,
            _again(lambda state, tokens: self.run(self.restarted(state, tokens), tokens, late_BC)),
            _again(lambda state, tokens: self.run(state, tokens, None)),
            state,
            tokens,
        )

    def restarted(self, state: _State, tokens: Tokens) -> _State:
        """The initial weights in rows whose first token begins a document."""
        start, now, step, keys = state
        assert tokens.restart_B is not None
        restart = tokens.restart_B[:, None, None, None]
        return (
            where(restart, self.initial, start) if start else (),
            where(restart, self.initial, now),
            where(restart, _zeros(step), step),
            where(restart, _zeros(keys), keys),
        )

    def matmul(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision=self.precision)

    def base(
        self, a: jax.Array, w: jax.Array, layer: int, late_BC: jax.Array | None, flip: bool = False
    ) -> jax.Array:
        """a @ w (flip: its transpose), with the initial w for tokens of late documents."""
        w0 = self.initial[layer]
        out = self.matmul(a, w.swapaxes(-1, -2) if flip else w)
        if late_BC is None:
            return out
        other = self.matmul(a, w0.swapaxes(-1, -2) if flip else w0)
        return jnp.where(late_BC[:, None, :, None], other, out)

    def scaled(
        self,
        scale_BHC1: jax.Array | None,
        a: jax.Array,
        w: jax.Array,
        layer: int,
        late_BC: jax.Array | None,
    ) -> jax.Array:
        """scale * (a @ w); the narrower side is scaled."""
        if scale_BHC1 is None:
            return self.base(a, w, layer, late_BC)
        if w.shape[-2] <= w.shape[-1]:
            return self.base(scale_BHC1 * a, w, layer, late_BC)
        return scale_BHC1 * self.base(a, w, layer, late_BC)

    def descent(
        self, start: Weights, k: jax.Array, v: jax.Array, late_BC: jax.Array | None
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Factors a (.., C, I) and g (.., C, O) of minus each layer's gradient, a_i g_i^T."""
        a, slopes, last = [k], [], len(start) - 1
        for layer in range(last):
            value, slope = gelu_and_slope(self.base(a[-1], start[layer], layer, late_BC))
            a.append(value)
            slopes.append(slope)
        error = v - self.base(a[-1], start[last], last, late_BC)
        g = [2.0 * (error - k if last else error)]
        for layer in range(last, 0, -1):
            g.insert(
                0, self.base(g[0], start[layer], layer, late_BC, flip=True) * slopes[layer - 1]
            )
        return a, g

    def read(self, w: Weights, q: jax.Array, late_BC: jax.Array | None) -> jax.Array:
        """M(q) at the weights w."""
        x, last = q, len(w) - 1
        for layer in range(last):
            x = gelu_and_slope(self.base(x, w[layer], layer, late_BC))[0]
        x = self.base(x, w[last], last, late_BC)
        return x + q if last else x

    def projected(
        self, keys: jax.Array, tokens: Tokens, late_BC: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Queries led to the keys of their document, n -> n / sqrt(1 + n^2), and the new sum."""
        q, k = tokens.q_BHCK, tokens.k_BHCK
        if tokens.real_BC is not None:
            k = jnp.where(tokens.real_BC[:, None, :, None], k, 0.0)
        before = self.matmul(q, keys)
        if late_BC is not None:
            before = jnp.where(late_BC[:, None, :, None], 0.0, before)
        q = before + self.matmul(self.matmul(q, k.swapaxes(-1, -2)) * same_document(tokens), k)
        q = q * jax.lax.rsqrt(1.0 + jnp.sum(q * q, -1, keepdims=True))
        if late_BC is not None and tokens.run_BC is not None:
            k = jnp.where((tokens.run_BC == tokens.run_BC[:, -1:])[:, None, :, None], k, 0.0)
            keys = jnp.where(late_BC[:, -1, None, None, None], 0.0, keys)
        return q, keys + self.matmul(k.swapaxes(-1, -2), k)

    def run(
        self, state: _State, tokens: Tokens, late_BC: jax.Array | None
    ) -> tuple[_State, jax.Array]:
        start, now, step, keys = state
        a, g = self.descent(start or now, tokens.k_BHCK, tokens.v_BHCK, late_BC)
        q_BHCK = tokens.q_BHCK
        if keys:
            q_BHCK, new_keys = self.projected(keys[0], tokens, late_BC)
            keys = (new_keys,)
        c = coefficients(tokens) if self.reads == "now" else end_coefficients(tokens)
        mix, step_mix = c.mix_BHCC, c.step_mix_BHC1
        if self.clip is not None:
            norms = [jnp.sum(x * x, -1) * jnp.sum(y * y, -1) for x, y in zip(a, g, strict=True)]
            shrink_BHC = jax.lax.rsqrt(1.0 + sum(norms) / self.clip**2)
            mix = mix * shrink_BHC[..., None, :]
            step_mix = None if step_mix is None else step_mix * shrink_BHC[..., None]

        x, last = q_BHCK, len(now) - 1
        for layer in range(last + 1 if self.reads == "now" else 0):
            y = self.scaled(c.keep_BHC1, x, now[layer], layer, late_BC)
            if c.carry_BHC1 is not None:
                y = y + self.scaled(c.carry_BHC1, x, step[layer], layer, None)
            y = y + self.matmul(self.matmul(x, a[layer].swapaxes(-1, -2)) * mix, g[layer])
            x = y if layer == last else gelu_and_slope(y)[0]
        out_BHCK = x + q_BHCK if last else x
        if self.reads == "chunk_start":
            out_BHCK = self.read(start or now, q_BHCK, late_BC)

        begun = None if late_BC is None else late_BC[:, -1, None, None, None]
        if begun is not None:
            now = where(begun, self.initial, now)
        learned = [self.outer(mix[..., -1, :, None], *ag) for ag in zip(a, g, strict=True)]
        new_now = []
        for layer in range(last + 1):
            w = now[layer] if c.keep_BHC1 is None else c.keep_BHC1[..., -1:, :] * now[layer]
            if c.carry_BHC1 is not None:
                w = w + c.carry_BHC1[..., -1:, :] * step[layer]
            new_now.append(w + learned[layer])
        if step_mix is not None and c.step_carry_BH11 is not None:
            learned = [self.outer(step_mix, *ag) for ag in zip(a, g, strict=True)]
            step = tuple(c.step_carry_BH11 * s + x for s, x in zip(step, learned, strict=True))
        if start and tokens.complete is not None:
            start = start if begun is None else where(begun, self.initial, start)
            start = where(tokens.complete, tuple(new_now), start)
        return (start, tuple(new_now), step, keys), out_BHCK

    def outer(self, scale_BHC1: jax.Array, a: jax.Array, g: jax.Array) -> jax.Array:
        """sum_i scale_i a_i g_i^T; the narrower factor is scaled."""
        if a.shape[-1] <= g.shape[-1]:
            return self.matmul((scale_BHC1 * a).swapaxes(-1, -2), g)
        return self.matmul(a.swapaxes(-1, -2), scale_BHC1 * g)


def neural_memory(
    initial: Weights,
    q_BLHK: jax.Array,
    k_BLHK: jax.Array,
    v_BLHK: jax.Array,
    gates: Gates,
    *,
    chunk: int,
    document_ids_BL: jax.Array | None = None,
    state: MemoryState | None = None,
    aligned: bool = False,
    reads: Reads = "now",
    project: bool = False,
    clip: float | None = None,
    checkpoint_every: int = 1,
    precision: str = "highest",
) -> tuple[jax.Array, MemoryState | None]:
    """Writes and reads every token; token t reads after its own write.

    Args:
      initial: M_0, float32 (H, I, O) for each layer; learned by the outer training.
      q_BLHK: where to read.
      k_BLHK: what is written under which ...
      v_BLHK: ... value. Any float dtype; all arithmetic is float32 (float64 for float64).
      gates: of each token and head.
      chunk: tokens whose gradients are taken at the same weights. Chunks are counted from
        the first token of a row; the last one may be shorter.
      document_ids_BL: int32 document of each token, 0 for padding; None is one document per
        row. A document is a run of equal ids (padding inside it is skipped); it starts
        from `initial` and sees nothing of others. Padding writes nothing, and its reads
        mean nothing.
      state: continue from here (for decoding); None starts from `initial` and returns None.
      aligned: promises that the state stands at the start of a chunk and that `chunk`
        divides L, which saves work.
      reads: at the weights after the token's own write, or at those that its chunk began with.
      project: reads at p / sqrt(1 + |p|^2), p = sum of k k^T q over the keys of the document up to
        the token's own.
      clip: soft bound c on the norm n of a token's gradient over all layers, which is
        multiplied by 1/sqrt(1 + (n/c)^2); None is no bound.
      checkpoint_every: chunks between the weights kept for the backward pass, which recomputes
        everything else. About sqrt(L / chunk) takes the least memory and costs one more
        forward pass than 1.
      precision: of float32 products: "highest", or "high" or "default" to let an
        accelerator use fewer passes.

    Returns:
      y_BLHK in the dtype of q, and the state after these tokens.
    """
    B, L, H, K = q_BLHK.shape
    dtype = jnp.promote_types(q_BLHK.dtype, jnp.float32)
    # For each row, so that gradients are summed over rows (and their devices) once, at the end.
    initial = tuple(jnp.broadcast_to(w.astype(dtype), (B, *w.shape)) for w in initial)
    body = _Chunk(initial=initial, clip=clip, precision=jax.lax.Precision(precision), reads=reads)
    momentum = gates.log_momentum_BLH is not None

    offset: int | jax.Array = 0
    if state is None:
        slots, num_chunks = chunk, -(-L // chunk)
        keys = no_keys(initial[0], B) if project else ()
        carry: _State = ((), initial, _zeros(initial) if momentum else (), keys)
        complete_N, last_B = None, jnp.zeros((B,), jnp.int32)
    elif aligned:
        slots, num_chunks = chunk, L // chunk
        carry = ((), unless_new(initial, state, state.now), state.step, state.keys)
        complete_N, last_B = None, state.document_ids_B
    else:
        # The tokens take their places in the present chunk and those after it.
        slots, num_chunks = (1, 1) if L == 1 else (chunk, -(-(L + chunk - 1) // chunk))
        present = state.length % chunk
        offset = 0 if L == 1 else present
        start = unless_new(initial, state, state.chunk_start)
        carry = (start, unless_new(initial, state, state.now), state.step, state.keys)
        reached = present + L - slots * jnp.arange(num_chunks)
        complete_N, last_B = reached >= chunk, state.document_ids_B
    if state is not None and document_ids_BL is None:
        document_ids_BL = jnp.ones((B, L), jnp.int32)

    def placed(x_BL: jax.Array) -> jax.Array:
        """(B, L, ...) -> (N, B, C, ...), zero where there is no token."""
        if num_chunks * slots != L:
            empty = jnp.zeros((B, num_chunks * slots, *x_BL.shape[2:]), x_BL.dtype)
            x_BL = jax.lax.dynamic_update_slice_in_dim(empty, x_BL, offset, axis=1)
        return x_BL.reshape(B, num_chunks, slots, *x_BL.shape[2:]).swapaxes(0, 1)

    def per_head(x_BLH: jax.Array) -> jax.Array:
        return placed(x_BLH.astype(dtype)).swapaxes(2, 3)

    log_keep, log_momentum = gates.log_keep_BLH, gates.log_momentum_BLH

    tokens = Tokens(
        q_BHCK=per_head(q_BLHK),
        k_BHCK=per_head(k_BLHK),
        v_BHCK=per_head(v_BLHK),
        log_keep_BHC=None if log_keep is None else per_head(log_keep),
        log_momentum_BHC=None if log_momentum is None else per_head(log_momentum),
        rate_BHC=per_head(gates.rate_BLH),
    )
    if document_ids_BL is not None:
        ids_NBC = placed(document_ids_BL)
        run_BL, restart_BN, last_B = documents(ids_NBC.swapaxes(0, 1).reshape(B, -1), slots, last_B)
        run_NBC = run_BL.reshape(B, num_chunks, slots).swapaxes(0, 1)
        tokens = dataclasses.replace(
            tokens,
            real_BC=ids_NBC > 0,
            run_BC=run_NBC,
            restart_B=restart_BN.T,
            # Of all chunks at once: rows lie on several devices, which must agree.
            mixed=jnp.any(restart_BN.T, axis=1) | jnp.any(run_NBC > 0, axis=(1, 2)),
            complete=complete_N,
        )
    (start, now, step, keys), out = _checkpointed_scan(body, carry, tokens, checkpoint_every)
    out = out.transpose(1, 0, 3, 2, 4).reshape(B, num_chunks * slots, H, K)
    if num_chunks * slots != L:
        out = jax.lax.dynamic_slice_in_dim(out, offset, L, axis=1)
    if state is not None:
        state = MemoryState(
            chunk_start=start or now,
            now=now,
            step=step,
            keys=keys,
            length=state.length + L,
            document_ids_B=last_B,
        )
    return out.astype(q_BLHK.dtype), state


def recall(
    initial: Weights,
    state: MemoryState,
    q_BLHK: jax.Array,
    document_ids_BL: jax.Array,
    precision: str = "highest",
) -> jax.Array:
    """Reads every token at the state's present weights, and learns nothing.

    Args:
      initial: M_0 (H, I, O); what tokens of documents read that begin after the state.
      state: where to read.
      q_BLHK: the queries.
      document_ids_BL: int32 documents of the tokens.
      precision: see `neural_memory`.

    Returns:
      y_BLHK in the dtype of q.
    """
    dtype = jnp.promote_types(q_BLHK.dtype, jnp.float32)
    initial = tuple(w.astype(dtype) for w in initial)
    now = unless_new(initial, state, state.now)
    body = _Chunk(initial=initial, clip=None, precision=jax.lax.Precision(precision))
    seen_BL = (document_ids_BL == state.document_ids_B[:, None]) | (document_ids_BL == 0)
    new_BL = ~seen_BL & (state.document_ids_B > 0)[:, None]

    def read(late_BL: jax.Array | None) -> jax.Array:
        y_BHLK = body.read(now, q_BLHK.astype(dtype).swapaxes(1, 2), late_BL)
        return y_BHLK.swapaxes(1, 2).astype(q_BLHK.dtype)

    return jax.lax.cond(jnp.any(new_BL), lambda: read(new_BL), lambda: read(None))


def _checkpointed_scan(
    body: Callable[[_State, Tokens], tuple[_State, jax.Array]],
    carry: _State,
    tokens: Tokens,
    every: int,
) -> tuple[_State, jax.Array]:
    """A scan whose backward pass keeps the carry of each `every`-th chunk only."""
    num_chunks = tokens.q_BHCK.shape[0]
    if num_chunks == 1:
        carry, out = body(carry, jax.tree.map(lambda x: x[0], tokens))
        return carry, out[None]
    every = max(d for d in range(1, every + 1) if num_chunks % d == 0)
    if every in (1, num_chunks):
        return jax.lax.scan(lambda c, t: body(c, t), carry, tokens)
    groups = jax.tree.map(lambda x: x.reshape(-1, every, *x.shape[1:]), tokens)
    inner = _again(lambda c, t: jax.lax.scan(lambda c, t: body(c, t), c, t))
    carry, out = jax.lax.scan(inner, carry, groups)
    return carry, out.reshape(num_chunks, *out.shape[2:])

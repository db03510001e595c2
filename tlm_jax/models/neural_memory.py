"""Neural memory: an MLP per head that learns while it reads (Titans, arXiv 2501.00663, section 3).

Shapes: B batch, L length, N chunks, C tokens of a chunk, H heads, K head dim, I and O
inputs and outputs of a memory layer (the first reads K, the last writes K, between
them lies the hidden width). Weights multiply from the right: a layer is a_I @ W_IO.

The memory of a sequence is M(x) = x W (depth 1) or M(x) = x + s(..s(x W_1)..) W_n
with s = GELU (depth n > 1). Token t takes a step on |M(k_t) - v_t|^2 and reads:

    S_t = momentum_t S_{t-1} - rate_t grad,   W_t = keep_t W_{t-1} + S_t,   y_t = M_t(q_t)

with grad taken at the weights that the token's chunk began with (equations 9, 13
and 14; keep = 1 - alpha, momentum = eta, rate = theta). Within a chunk W_t is
linear in the gradients, and a token's gradient of a layer is an outer product
a_i g_i^T, so that

    x_t W_t = keep_(1..t) x_t W_0 + carry_t x_t S_0 - sum_{i<=t} mix[t, i] (x_t . a_i) g_i

needs no weights per token: products of (C, C) matrices with (C, I) and (C, O).
This is exact, not an approximation of the recurrence.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

Weights = tuple[jax.Array, ...]
"""One array a layer: (H, I, O) at the start, (B, H, I, O) for each sequence."""

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
    offset: jax.Array
    """int32 scalar: tokens so far in the present chunk, padding included."""
    segment_ids_B: jax.Array
    """int32: document of the last token that was not padding; 0 before the first."""

    @classmethod
    def start(cls, initial: Weights, batch: int, *, momentum: bool) -> "MemoryState":
        """The state before the first token."""
        weights = tuple(jnp.broadcast_to(w, (batch, *w.shape)) for w in initial)
        return cls(
            chunk_start=weights,
            now=weights,
            step=tuple(jnp.zeros_like(w) for w in weights) if momentum else (),
            offset=jnp.int32(0),
            segment_ids_B=jnp.zeros((batch,), jnp.int32),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Coefficients:
    """The gates of a chunk, multiplied out; all float32, a leading N before the scan."""

    mix_BHCC: jax.Array
    """What token t's weights hold of minus the gradient of token i, [t, i]."""
    keep_BHC: jax.Array | None
    """What they hold of the base: the chunk's first weights, or the initial ones."""
    carry_BHC: jax.Array | None
    """What they hold of the chunk's first step S."""
    step_mix_BHC: jax.Array | None
    """What the last step holds of minus the gradient of token i."""
    step_carry_BH: jax.Array | None
    """What the last step holds of the first."""
    restart_B: jax.Array | None
    """The chunk's first token begins a document: start from the initial weights."""
    late_BC: jax.Array | None
    """The token's document began inside the chunk: its base is the initial weights."""
    complete: jax.Array | None
    """The chunk is full, so that the next begins at its last weights (with a state only)."""


@jax.custom_jvp
def gelu_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Exact GELU x Phi(x) and its derivative Phi(x) + x phi(x), elementwise."""
    cdf = 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))
    return x * cdf, cdf + x * _normal_density(x)


@gelu_and_slope.defjvp
def _gelu_and_slope_jvp(primals: tuple, tangents: tuple) -> tuple:
    (x,), (dx,) = primals, tangents
    value, slope = gelu_and_slope(x)
    curvature = _normal_density(x) * (2.0 - x * x)
    return (value, slope), (slope * dx, curvature * dx)


def _normal_density(x: jax.Array) -> jax.Array:
    return jnp.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))


def documents(
    segment_ids_BL: jax.Array, chunk: int, last_B: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Numbers the documents of each chunk; padding belongs to the document before it.

    Args:
      segment_ids_BL: int32, 0 is padding; L is a multiple of `chunk`.
      chunk: tokens of a chunk.
      last_B: int32, document of the last token before these, 0 if there is none.

    Returns:
      run_BL: int32, 0 in the first document of a chunk, one more at each further one.
      restart_BN: bool, the chunk's first token begins a new document.
      last_B: as given, after these tokens.
    """
    B, L = segment_ids_BL.shape
    ids = jnp.concatenate([last_B[:, None], segment_ids_BL], axis=1)
    index = jnp.where(ids > 0, jnp.arange(L + 1), 0)
    ids = jnp.take_along_axis(ids, jax.lax.cummax(index, axis=1), axis=1)
    begins_BNC = ((ids[:, 1:] != ids[:, :-1]) & (ids[:, :-1] > 0)).reshape(B, -1, chunk)
    restart_BN = begins_BNC[:, :, 0]
    run_BNC = jnp.cumsum(begins_BNC.at[:, :, 0].set(False).astype(jnp.int32), axis=-1)
    return run_BNC.reshape(B, L), restart_BN, ids[:, -1]


def _coefficients(
    gates: Gates,
    dtype: jnp.dtype,
    chunk: int,
    real_BL: jax.Array | None,
    run_BL: jax.Array | None,
    restart_BN: jax.Array | None,
    complete_N: jax.Array | None,
) -> _Coefficients:
    """Multiplies the gates of all chunks out, from cumulative sums of logs."""
    real_BNC = None if real_BL is None else real_BL.reshape(real_BL.shape[0], -1, chunk)

    def chunked(gate_BLH: jax.Array, floor: float | None = None) -> jax.Array:
        gate_BLH = gate_BLH.astype(dtype)
        if floor is not None:
            gate_BLH = jnp.maximum(gate_BLH, floor)
        B, _, H = gate_BLH.shape
        gate = gate_BLH.reshape(B, -1, chunk, H).transpose(1, 0, 3, 2)
        if real_BNC is not None:  # padding keeps all and learns nothing
            gate = jnp.where(real_BNC.transpose(1, 0, 2)[:, :, None], gate, 0.0)
        return gate

    order_CC = jnp.arange(chunk)[:, None] >= jnp.arange(chunk)
    seen = order_CC
    counted = None
    first = None
    if run_BL is not None and real_BNC is not None:
        run_NBC = run_BL.reshape(real_BNC.shape).transpose(1, 0, 2)
        seen = order_CC & (run_NBC[..., :, None] == run_NBC[..., None, :])[:, :, None]
        counted = real_BNC.transpose(1, 0, 2)[:, :, None]
        first = (run_NBC == 0)[:, :, None]

    def products(log_NBHC: jax.Array) -> jax.Array:
        """prod_{i < m <= t} gate_m at [t, i], 0 where i > t or in another document."""
        total = jnp.cumsum(log_NBHC, axis=-1)
        return jnp.exp(jnp.where(seen, total[..., :, None] - total[..., None, :], -jnp.inf))

    rate = chunked(gates.rate_BLH)
    keep = carry = step_mix = step_carry = None
    if gates.log_keep_BLH is not None:
        log_keep = chunked(gates.log_keep_BLH, LOG_FLOOR)
        decay = products(log_keep)  # [t, j]: what is left at t of the step of token j
        keep = jnp.exp(jnp.sum(jnp.where(seen, log_keep[..., None, :], 0.0), axis=-1))
    else:
        decay = seen.astype(dtype)
    if gates.log_momentum_BLH is not None:
        log_momentum = chunked(gates.log_momentum_BLH, LOG_FLOOR)
        repeat = products(log_momentum)  # [j, i]: what the step of token j holds of gradient i
        repeat_first = jnp.exp(jnp.cumsum(log_momentum, axis=-1))
        if first is not None:
            repeat_first = jnp.where(first, repeat_first, 0.0)
        if counted is not None:  # padding takes no step
            decay = jnp.where(counted[..., None, :], decay, 0.0)
        highest = jax.lax.Precision.HIGHEST
        mix = jnp.matmul(decay, repeat, precision=highest) * rate[..., None, :]
        carry = jnp.matmul(decay, repeat_first[..., None], precision=highest)[..., 0]
        step_mix = repeat[..., -1, :] * rate
        step_carry = repeat_first[..., -1]
    else:
        mix = decay * rate[..., None, :]
    return _Coefficients(
        mix_BHCC=mix,
        keep_BHC=keep,
        carry_BHC=carry,
        step_mix_BHC=step_mix,
        step_carry_BH=step_carry,
        restart_B=None if restart_BN is None else restart_BN.T,
        late_BC=None if run_BL is None else run_NBC > 0,
        complete=complete_N,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chunk:
    """The arithmetic of one chunk."""

    initial: Weights
    clip: float | None
    precision: jax.lax.Precision

    def matmul(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision=self.precision)

    def base(self, x_BHCI: jax.Array, weights: jax.Array, layer: int, late_BC: jax.Array | None):
        """x @ weights; at the initial weights where the token's document is not that of weights."""
        y_BHCO = self.matmul(x_BHCI, weights)
        if late_BC is None:
            return y_BHCO
        fresh_BHCO = self.matmul(x_BHCI, self.initial[layer])
        return jnp.where(late_BC[:, None, :, None], fresh_BHCO, y_BHCO)

    def gradients(
        self, start: Weights, k: jax.Array, v: jax.Array, late_BC: jax.Array | None
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Factors a_BHCI and g_BHCO of each layer's gradient of |M(k) - v|^2 at `start`."""
        a, slopes, last = [k], [], len(start) - 1
        for layer in range(last):
            value, slope = gelu_and_slope(self.base(a[-1], start[layer], layer, late_BC))
            a.append(value)
            slopes.append(slope)
        error = self.base(a[-1], start[last], last, late_BC) - v
        g = [2.0 * (error + k if last else error)]
        for layer in range(last, 0, -1):
            transposed = start[layer].swapaxes(-1, -2)
            back = self.matmul(g[0], transposed)
            if late_BC is not None:
                fresh = self.matmul(g[0], self.initial[layer].swapaxes(-1, -2))
                back = jnp.where(late_BC[:, None, :, None], fresh, back)
            g.insert(0, back * slopes[layer - 1])
        return a, g

    def __call__(
        self,
        state: tuple[Weights, Weights, Weights],
        qkv: tuple[jax.Array, jax.Array, jax.Array],
        c: _Coefficients,
    ) -> tuple[tuple[Weights, Weights, Weights], jax.Array]:
        """(chunk_start, now, step), q k v (B, H, C, K) -> new state, reads (B, H, C, K)."""
        if c.late_BC is None:
            return self.run(state, qkv, c)
        single = dataclasses.replace(c, late_BC=None)
        return jax.lax.cond(
            jnp.any(c.late_BC),
            lambda: self.run(state, qkv, c),
            lambda: self.run(state, qkv, single),
        )

    def run(self, state, qkv, c: _Coefficients):
        start, now, step = state
        q, k, v = qkv
        initial = tuple(jnp.broadcast_to(w0, w.shape) for w0, w in zip(self.initial, now))
        if c.restart_B is not None:
            restart = c.restart_B[:, None, None, None]
            start = _where(restart, initial, start)
            now = _where(restart, initial, now)
            step = tuple(jnp.where(restart, 0.0, s) for s in step)
        a, g = self.gradients(start or now, k, v, c.late_BC)
        mix, step_mix = c.mix_BHCC, c.step_mix_BHC
        if self.clip is not None:
            squares = sum(
                jnp.sum(x * x, axis=-1) * jnp.sum(y * y, axis=-1) for x, y in zip(a, g, strict=True)
            )
            shrink = jax.lax.rsqrt(1.0 + squares / self.clip**2)
            mix = mix * shrink[..., None, :]
            step_mix = None if step_mix is None else step_mix * shrink
        # The reads.
        keep = None if c.keep_BHC is None else c.keep_BHC[..., None]
        carry = None if c.carry_BHC is None else c.carry_BHC[..., None]
        x, last = q, len(now) - 1
        for layer in range(last + 1):
            y = self.base(x, now[layer], layer, c.late_BC)
            y = y if keep is None else keep * y
            if carry is not None:
                y = y + carry * self.matmul(x, step[layer])
            scores = self.matmul(x, a[layer].swapaxes(-1, -2)) * mix
            y = y - self.matmul(scores, g[layer])
            x = y if layer == last else gelu_and_slope(y)[0]
        out = x + q if last else x
        # The weights and the step after the last token.
        if c.late_BC is not None:
            in_last = c.late_BC[:, -1, None, None, None]
            now = _where(in_last, initial, now)
        new_now, new_step = [], []
        for layer in range(last + 1):
            a_t = a[layer].swapaxes(-1, -2)
            w = now[layer] if keep is None else keep[..., -1:, :] * now[layer]
            if carry is not None:
                w = w + carry[..., -1:, :] * step[layer]
            new_now.append(w - self.matmul(a_t, mix[..., -1, :, None] * g[layer]))
            if step_mix is not None:
                s = c.step_carry_BH[..., None, None] * step[layer]
                new_step.append(s - self.matmul(a_t, step_mix[..., None] * g[layer]))
        if start:
            if c.late_BC is not None:
                start = _where(in_last, initial, start)
            start = _where(c.complete, tuple(new_now), start)
        return (start, tuple(new_now), tuple(new_step)), out


def _where(condition, a: Weights, b: Weights) -> Weights:
    return tuple(jnp.where(condition, x, y) for x, y in zip(a, b, strict=True))


def neural_memory(
    initial,
    q_BLHK,
    k_BLHK,
    v_BLHK,
    gates,
    *,
    chunk,
    segment_ids_BL=None,
    clip=None,
    group=1,
    remat=True,
    precision="highest",
):
    B, L, H, K = q_BLHK.shape
    dtype = jnp.promote_types(q_BLHK.dtype, jnp.float32)

    def split(x):
        return x.astype(dtype).reshape(B, L // chunk, chunk, H, K).transpose(1, 0, 3, 2, 4)

    qkv = tuple(map(split, (q_BLHK, k_BLHK, v_BLHK)))
    coefs = _coefficients(gates, dtype, chunk, None, None, None, None)
    body = _Chunk(initial=initial, clip=clip, precision=jax.lax.Precision.HIGHEST)
    weights = tuple(jnp.broadcast_to(w, (B, *w.shape)) for w in initial)
    state = (
        (),
        weights,
        tuple(jnp.zeros_like(w) for w in weights) if gates.log_momentum_BLH is not None else (),
    )

    def f(state, xs):
        return body(state, *xs)

    if remat:
        f = jax.checkpoint(f, prevent_cse=False, policy=None if remat is True else remat)
    if group:

        def g(state, xs):
            return jax.lax.scan(f, state, xs)

        xs = jax.tree.map(lambda x: x.reshape(-1, group, *x.shape[1:]), (qkv, coefs))
        _, out = jax.lax.scan(jax.checkpoint(g, prevent_cse=False), state, xs)
        out = out.reshape(-1, *out.shape[2:])
    else:
        _, out = jax.lax.scan(f, state, (qkv, coefs))
    return out.transpose(1, 0, 3, 2, 4).reshape(B, L, H, K)

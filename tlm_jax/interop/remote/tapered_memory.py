"""Neural memory: an MLP per head that learns while it reads (Titans, arXiv 2501.00663, section 3).

Shapes: B batch, L length, C tokens of a piece, D model, H heads, K head dim, G gates, W width of
the convolution, I and O inputs and outputs of a memory layer. All of the memory is float32.

Token t takes a step on |M(k_t) - v_t|^2 and reads:

    S_t = momentum_t S_{t-1} - rate_t grad,   W_t = keep_t W_{t-1} + S_t,   y_t = M_t(q_t)

with grad taken at the weights that the token's chunk began with. M(x) = x W in one layer, and
x + gelu(..gelu(x W_1)..) W_n in several. Within a chunk W_t is linear in the gradients, and minus
a token's gradient is an outer product a_i g_i^T, so that

    x_t W_t = keep_(1..t) x_t W_0 + carry_t x_t S_0 + sum_{i<=t} mix[t, i] (x_t . a_i) g_i

needs no weights per token. Written by tlm-jax (Apache-2.0); needs PyTorch alone.
"""

import dataclasses
import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .tapered_layers import State, Tokens

LOG_FLOOR = -40.0
"""Gates below exp(LOG_FLOOR) are that."""


def heads(x_BLHK: Tensor) -> Tensor:
    """(B, L, H, K) -> (B, H, L, K), float32."""
    return x_BLHK.float().transpose(1, 2)


def where(rows_B: Tensor, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    """The tensors `a` in the given rows, `b` in the others."""
    rows = rows_B[:, None, None, None]
    return [torch.where(rows, x, y) for x, y in zip(a, b, strict=True)]


def gelu_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """Exact GELU x Phi(x) and its derivative Phi(x) + x phi(x)."""
    cdf = 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5)))
    density = torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    return x * cdf, cdf + x * density


def read(weights: list[Tensor], q_BHCK: Tensor) -> Tensor:
    """M(q) at weights (B, H, I, O)."""
    x = q_BHCK
    for w in weights[:-1]:
        x = gelu_and_slope(x @ w)[0]
    x = x @ weights[-1]
    return x + q_BHCK if len(weights) > 1 else x


def descent(weights: list[Tensor], k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Factors a (.., C, I) and g (.., C, O) of minus each layer's gradient of |M(k) - v|^2."""
    a, slopes = [k], []
    for w in weights[:-1]:
        value, slope = gelu_and_slope(a[-1] @ w)
        a.append(value)
        slopes.append(slope)
    error = v - a[-1] @ weights[-1]
    g = [2.0 * (error - k if slopes else error)]
    for w, slope in zip(reversed(weights[1:]), reversed(slopes), strict=True):
        g.insert(0, g[0] @ w.transpose(-1, -2) * slope)
    return a, g


@dataclasses.dataclass(frozen=True)
class Gates:
    """What each token does to the memory of each head, (B, L, H), float32; None turns a term off.

    At padding nothing changes: rate 0, everything kept, no step.
    """

    log_keep: Tensor | None
    log_momentum: Tensor | None
    rate: Tensor
    real: Tensor
    """(B, L), False at padding."""

    def __getitem__(self, columns: slice) -> "Gates":
        keep, momentum = (
            None if x is None else x[:, columns] for x in (self.log_keep, self.log_momentum)
        )
        return Gates(keep, momentum, self.rate[:, columns], self.real[:, columns])


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """The gates of a piece multiplied out; columns (.., C, 1) scale rows of tokens."""

    mix: Tensor
    """[t, i]: what W_t holds of minus the gradient of token i; (B, H, C, C)."""
    keep: Tensor
    """What W_t holds of the piece's first weights."""
    carry: Tensor | None
    """What W_t holds of the piece's first step S."""
    step_mix: Tensor | None
    """What the last step holds of minus the gradient of token i."""
    step_carry: Tensor | None
    """What the last step holds of the first; (B, H, 1, 1)."""


def coefficients(gates: Gates, *, last: bool) -> Coefficients:
    """Products of gates; `last` gives the piece's last token t alone.

    The weights hold decay[t, j] of the step S_j, and that holds repeat[j, i] of a gradient.
    """
    real = gates.real[:, None]
    rate = torch.where(real, gates.rate.transpose(1, 2), 0.0)
    C = rate.shape[-1]
    before = torch.ones(C, C, dtype=torch.bool, device=rate.device).tril(-1)
    rows = slice(-1, None) if last else slice(None)

    def products(log_BLH: Tensor) -> tuple[Tensor, Tensor]:
        """prod of gates (i, t] at [t, i], and of all gates up to t."""
        log = torch.where(real, log_BLH.transpose(1, 2).clamp(min=LOG_FLOOR), 0.0)
        between = torch.where(before, log[..., None], 0.0).cumsum(-2)
        return between.exp().tril(), log.cumsum(-1).exp()

    if gates.log_keep is None:
        decay, keep = rate.new_ones(C, C).tril().expand(*rate.shape, C), torch.ones_like(rate)
    else:
        decay, keep = products(gates.log_keep)
    decay, keep = decay[..., rows, :], keep[..., rows, None]
    if gates.log_momentum is None:
        return Coefficients(decay * rate[..., None, :], keep, None, None, None)
    decay = torch.where(real[:, None], decay, 0.0)
    repeat, repeat_first = products(gates.log_momentum)
    return Coefficients(
        mix=decay @ repeat * rate[..., None, :],
        keep=keep,
        carry=decay @ repeat_first[..., None],
        step_mix=(repeat[..., -1, :] * rate)[..., None],
        step_carry=repeat_first[..., -1, None, None],
    )


class Learner(nn.Module):
    """What the heads' memories begin with, the gates of their learning, and the learning.

    Gates from the token x: alpha = 1 - keep = sigmoid(a), momentum = sigmoid(e) and
    rate = max_rate (1 - momentum) sigmoid(r).

    TNT (arXiv 2511.07343) has two kinds. The global memory reads at the weights that the chunk
    began with (`reads_start`, eq. 7). Local memories start over in every `shard`, and with
    `projects` their queries are led to the keys that the shard has seen.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        sizes: list[int],
        chunk: int,
        max_rate: float,
        forgetting: bool,
        momentum: bool,
        clip: float | None,
        shard: int | None = None,
        reads_start: bool = False,
        projects: bool = False,
    ) -> None:
        super().__init__()
        H, G = num_heads, 1 + forgetting + momentum
        self.chunk, self.shard, self.clip, self.max_rate = chunk, shard, clip, max_rate
        self.forgetting, self.momentum = forgetting, momentum
        self.reads_start, self.projects = reads_start, projects
        self.gates = nn.Linear(d_model, G * H, bias=False)
        self.bias = nn.Parameter(torch.zeros(G, H))
        self.initial = nn.ParameterList(
            torch.randn(H, inputs, outputs) / math.sqrt(inputs)
            for inputs, outputs in itertools.pairwise(sizes)
        )

    def start(self, batch: int) -> State:
        """The state before the first token."""
        initial = [w.float().expand(batch, -1, -1, -1) for w in self.initial]
        state: State = {"start": initial, "now": initial}
        if self.momentum:
            state["step"] = [torch.zeros_like(w) for w in initial]
        if self.projects:
            H, K, _ = self.initial[0].shape
            state["keys"] = [initial[0].new_zeros(batch, H, K, K)]
        return state

    def gate(self, x_BLD: Tensor, tokens: Tokens) -> Gates:
        """The gates of every token and head."""
        logits = self.gates(x_BLD).float().unflatten(-1, self.bias.shape) + self.bias.float()
        rate = self.max_rate * logits[:, :, 0].sigmoid()
        log_keep = functional.logsigmoid(-logits[:, :, 1]) if self.forgetting else None
        log_momentum = None
        if self.momentum:
            log_momentum = functional.logsigmoid(logits[:, :, -1])
            rate = rate * (-logits[:, :, -1]).sigmoid()
        return Gates(log_keep, log_momentum, rate, tokens.real_BL)

    def learn(
        self, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, gates: Gates, tokens: Tokens,
        state: State,
    ) -> Tensor:  # fmt: skip
        """Writes and reads every token -> (B, L, H, K); changes the state."""
        q, k, v = heads(q_BLHK), heads(k_BLHK), heads(v_BLHK)
        if not state:
            state |= self.start(len(q))
        begins_BL = tokens.begins(self.chunk)
        restarts_BL = None if self.shard is None else tokens.begins(self.shard)
        out = []
        for piece in tokens.pieces(self.chunk):  # where all tokens' chunks began before or there
            if restarts_BL is not None:
                fresh, rows_B = self.start(len(q)), restarts_BL[:, piece.start]
                state |= {name: where(rows_B, fresh[name], state[name]) for name in state}
            state["start"] = where(begins_BL[:, piece.start], state["now"], state["start"])
            part_q, part_k, part_v = (x[:, :, piece] for x in (q, k, v))
            out.append(self.piece(part_q, part_k, part_v, gates[piece], state))
        return torch.cat(out, 2).transpose(1, 2).to(q_BLHK.dtype)

    def piece(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Tensor:
        """Writes and reads the tokens (B, H, C, K) of one piece of a chunk."""
        start, now = state["start"], state["now"]
        a, g = descent(start, k, v)
        if self.projects:
            q = self.project_queries(q, torch.where(gates.real[:, None, :, None], k, 0.0), state)
        c = coefficients(gates, last=self.reads_start)
        mix, step_mix = c.mix, c.step_mix
        if self.clip is not None:  # n -> n / sqrt(1 + (n / clip)^2), n the norm of a gradient
            squares = [x.square().sum(-1) * y.square().sum(-1) for x, y in zip(a, g, strict=True)]
            shrink_BHC = torch.rsqrt(1.0 + torch.stack(squares).sum(0) / self.clip**2)
            mix = mix * shrink_BHC[..., None, :]
            step_mix = None if step_mix is None else step_mix * shrink_BHC[..., None]

        if self.reads_start:
            out = read(start, q)
        else:
            x = q
            for layer, w in enumerate(now):
                y = c.keep * (x @ w) + (x @ a[layer].transpose(-1, -2) * mix) @ g[layer]
                if c.carry is not None:
                    y = y + c.carry * (x @ state["step"][layer])
                x = y if layer == len(now) - 1 else gelu_and_slope(y)[0]
            out = x + q if len(now) > 1 else x

        factors = list(zip(a, g, strict=True))
        learned = [(mix[..., -1, :, None] * x).transpose(-1, -2) @ y for x, y in factors]
        new = [c.keep[..., -1:, :] * w + dw for w, dw in zip(now, learned, strict=True)]
        if c.carry is not None and step_mix is not None:
            new = [w + c.carry[..., -1:, :] * s for w, s in zip(new, state["step"], strict=True)]
            learned = [(step_mix * x).transpose(-1, -2) @ y for x, y in factors]
            state["step"] = [
                c.step_carry * s + ds for s, ds in zip(state["step"], learned, strict=True)
            ]
        state["now"] = new
        return out

    @staticmethod
    def project_queries(q: Tensor, k: Tensor, state: State) -> Tensor:
        """p / sqrt(1 + |p|^2), p = sum of k k^T q over the shard's keys up to the token's own."""
        (keys,) = state["keys"]
        p = q @ keys + (q @ k.transpose(-1, -2)).tril() @ k
        state["keys"] = [keys + k.transpose(-1, -2) @ k]
        return p * torch.rsqrt(1.0 + p.square().sum(-1, keepdim=True))


class Memory(Learner):
    """Projections and convolutions around the neural memory of each head.

    q, k, v = silu(conv(x W)), q and k divided by their l2 norm (section 4.4 of the paper).
    """

    def __init__(self, d_model: int, head_dim: int, *, conv_width: int, **learner: Any) -> None:
        super().__init__(d_model, **learner)
        H, K = learner["num_heads"], head_dim
        self.shape = (H, K)
        self.qkv = nn.Linear(d_model, 3 * H * K, bias=False)
        self.conv = None
        if conv_width > 1:
            filters = torch.randn(conv_width, 3, H, K) / math.sqrt(conv_width)
            self.conv = nn.Parameter(filters)

    def project(
        self, x_BLD: Tensor, tokens: Tokens, state: State, tail: str, first: int = 3
    ) -> list[Tensor]:
        """The first of q, k and v (B, L, H, K); the state keeps under `tail` what conv needs."""
        H, K = self.shape
        y = functional.linear(x_BLD, self.qkv.weight[: first * H * K])
        y = y.unflatten(-1, (first, H, K))
        if self.conv is not None:
            y = torch.where(tokens.real_BL[:, :, None, None, None], y, 0.0)
            y = self.convolve(y, self.conv[:, :first].to(y.dtype), state, tail)
        q, *kv = functional.silu(y).unbind(2)
        return [unit(q), *(unit(x) if i == 0 else x for i, x in enumerate(kv))]

    @staticmethod
    def convolve(y_BL3HK: Tensor, filters_W3HK: Tensor, state: State, tail: str) -> Tensor:
        """Depthwise and causal: sum_w filter_w x_{t-w}."""
        W, L = len(filters_W3HK), y_BL3HK.shape[1]
        before = state.get(tail)
        if before is None:
            before = torch.zeros_like(y_BL3HK[:, :1]).expand(-1, W - 1, -1, -1, -1)
        x = torch.cat([before, y_BL3HK], 1)
        state[tail] = x[:, L:]
        parts = [filters_W3HK[w] * x[:, W - 1 - w :][:, :L] for w in range(W)]
        return torch.stack(parts).sum(0)


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last dim, in float32."""
    x_f32 = x.float()
    return (x_f32 * torch.rsqrt(x_f32.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)

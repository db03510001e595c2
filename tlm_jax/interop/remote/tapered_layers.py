"""What the layers of all architectures share: norm, rotary positions, attention, MLP.

Shapes: B batch, L new tokens, S keys, D model, F MLP, H query heads, N key/value heads, K head dim.
Written by tlm-jax (Apache-2.0); needs PyTorch alone.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

State = dict[str, Any]
"""What a mixer keeps of the tokens so far, for decoding: tensors, in dicts and lists of them. Each
has a leading dim of rows."""


def each(change: Callable[[Tensor], Any], state: Any) -> Any:
    """The same dicts and lists with all of their tensors changed."""
    if isinstance(state, dict):
        return {name: each(change, part) for name, part in state.items()}
    if isinstance(state, list):
        return [each(change, part) for part in state]
    return change(state)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Where tokens stand in their texts. A row is one text, padded on the left."""

    positions_BL: Tensor
    """From 0 on; what they are at padding does not matter."""
    real_BL: Tensor
    """False at padding."""

    def __getitem__(self, columns: slice) -> "Tokens":
        return Tokens(self.positions_BL[:, columns], self.real_BL[:, columns])

    def begins(self, size: int) -> Tensor:
        """(B, L) bool: the token is the first of a chunk of `size` tokens of its text."""
        return (self.positions_BL % size == 0) & self.real_BL

    def pieces(self, size: int) -> list[slice]:
        """Columns cut where a chunk of `size` tokens begins in any row."""
        cuts = torch.nonzero(self.begins(size).any(0)).flatten().tolist()
        length = self.positions_BL.shape[1]
        bounds = sorted({0, *cuts, length})
        return [slice(*pair) for pair in itertools.pairwise(bounds)]

    def after(self, state: State) -> "Tokens":
        """The tokens of a state, which has their positions, and these."""
        return Tokens(
            torch.cat([state["positions"], self.positions_BL], 1),
            torch.cat([state["real"], self.real_BL], 1),
        )


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last dim, in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x_f32 = x.float()
        inverse = torch.rsqrt(x_f32.square().mean(-1, keepdim=True) + self.eps)
        return (x_f32 * inverse * self.scale.float()).to(x.dtype)


def rotary(x_BLHK: Tensor, positions_BL: Tensor, theta: float) -> Tensor:
    """Rotates pairs (k, k + K/2) of each head by position * theta^(-2k/K) (arXiv 2104.09864)."""
    half = x_BLHK.shape[-1] // 2
    exponents = torch.arange(half, device=x_BLHK.device, dtype=torch.float32) / half
    angles = positions_BL[:, :, None, None].float() * theta**-exponents
    sin, cos = angles.sin(), angles.cos()
    a, b = x_BLHK.float().split(half, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x_BLHK.dtype)


def attend(q_BLHK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, mask_BLS: Tensor) -> Tensor:
    """softmax(q k / sqrt(K)) v over the keys that the mask allows -> (B, L, H, K)."""
    group = q_BLHK.shape[2] // k_BSNK.shape[2]
    k_BSHK, v_BSHK = (x.repeat_interleave(group, 2) for x in (k_BSNK, v_BSNK))
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BSHK, v_BSHK))
    y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask_BLS[:, None])
    return y.transpose(1, 2)


def sees(queries: Tokens, keys: Tokens) -> Tensor:
    """(B, L, S) bool: the key is the query's own or one before it; the queries are the last keys.

    Padding sees itself, so that no softmax is empty.
    """
    back_BLS = queries.positions_BL[:, :, None] - keys.positions_BL[:, None, :]
    L, S = back_BLS.shape[1:]
    itself = torch.ones(L, S, dtype=torch.bool, device=back_BLS.device)
    itself = itself.tril(S - L).triu(S - L)
    return (back_BLS >= 0) & keys.real_BL[:, None] & queries.real_BL[:, :, None] | itself


def remember(state: State, k: Tensor, v: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tokens]:
    """Keys, values and places of the tokens in a state and of new ones, which it then has too."""
    if state:
        k, v = torch.cat([state["keys"], k], 1), torch.cat([state["values"], v], 1)
        tokens = tokens.after(state)
    state |= {
        "keys": k,
        "values": v,
        "positions": tokens.positions_BL,
        "real": tokens.real_BL,
    }
    return k, v, tokens


def forget(state: State, most: int) -> None:
    """Cuts what `remember` made down to the last `most` columns."""
    for name in ("keys", "values", "positions", "real"):
        state[name] = state[name][:, -most:]


class Attention(nn.Module):
    """Causal attention with rotary positions; gated, it is variant G1 of arXiv 2505.06708.

    The gate is sigmoid(x W) on the heads' outputs, one per value ("elementwise") or one per head
    ("headwise").
    """

    def __init__(
        self,
        d_model: int,
        eps: float,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qk_norm: bool,
        rope_theta: float,
        gate: str | None,
    ) -> None:
        super().__init__()
        D, H, N, K = d_model, num_heads, num_kv_heads, head_dim
        self.head_dim, self.theta = K, rope_theta
        self.query = nn.Linear(D, H * K, bias=False)
        self.key = nn.Linear(D, N * K, bias=False)
        self.value = nn.Linear(D, N * K, bias=False)
        self.out = nn.Linear(H * K, D, bias=False)
        self.query_norm = RMSNorm(K, eps) if qk_norm else None
        self.key_norm = RMSNorm(K, eps) if qk_norm else None
        self.gate = None
        if gate is not None:
            self.gate = nn.Linear(D, H * (K if gate == "elementwise" else 1), bias=False)

    def forward(self, x_BLD: Tensor, tokens: Tokens, state: State) -> Tensor:
        """Mixes the tokens; the state then holds them too."""
        B, L, _ = x_BLD.shape
        q, k, v = (
            project(x_BLD).view(B, L, -1, self.head_dim)
            for project in (self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q = rotary(q, tokens.positions_BL, self.theta)
        k = rotary(k, tokens.positions_BL, self.theta)
        k, v, keys = remember(state, k, v, tokens)
        y_BLHK = attend(q, k, v, sees(tokens, keys))
        if self.gate is not None:
            gate = self.gate(x_BLD).float().sigmoid().view(B, L, y_BLHK.shape[2], -1)
            y_BLHK = (y_BLHK * gate).to(y_BLHK.dtype)
        return self.out(y_BLHK.reshape(B, L, -1))


class MLP(nn.Module):
    """x + SwiGLU(norm(x)), SwiGLU(h) = (silu(h W_gate) * (h W_up)) W_down (arXiv 2002.05202).

    Several in a row are the levels of Hope's continuum memory system (arXiv 2512.24695, eq. 70).
    """

    def __init__(self, d_model: int, width: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model, eps)
        self.gate = nn.Linear(d_model, width, bias=False)
        self.up = nn.Linear(d_model, width, bias=False)
        self.down = nn.Linear(width, d_model, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        h_BLD = self.norm(x_BLD)
        return x_BLD + self.down(functional.silu(self.gate(h_BLD)) * self.up(h_BLD))

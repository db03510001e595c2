"""Titans: a neural memory, alone or with windowed attention (arXiv 2501.00663, section 4).

Shapes: B batch, L length, P persistent tokens, D model, H heads, K head dim, C columns kept.
Written by tlm-jax (Apache-2.0); needs PyTorch alone.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .tapered_layers import RMSNorm, State, Tokens, attend, forget, remember, rotary, sees
from .tapered_memory import Learner, Memory, heads, read, where


class WindowAttention(nn.Module):
    """Attention over the last tokens of the text and P persistent ones, learned inputs.

    Persistent tokens have no position: their keys are not rotated.
    """

    def __init__(
        self,
        inputs: int,
        eps: float,
        *,
        num_heads: int,
        head_dim: int,
        num_persistent: int,
        rope_theta: float,
    ) -> None:
        super().__init__()
        self.shape, self.theta = (num_heads, head_dim), rope_theta
        self.qkv = nn.Linear(inputs, 3 * num_heads * head_dim, bias=False)
        self.persistent = None
        if num_persistent:
            self.persistent = nn.Parameter(torch.randn(num_persistent, inputs) / inputs**0.5)
        self.query_norm = RMSNorm(head_dim, eps)
        self.key_norm = RMSNorm(head_dim, eps)

    def project(self, x_BLD: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (B, L, H, K)."""
        q, k, v = self.qkv(x_BLD).unflatten(-1, (3, *self.shape)).unbind(2)
        q = rotary(self.query_norm(q), tokens.positions_BL, self.theta)
        return q, rotary(self.key_norm(k), tokens.positions_BL, self.theta), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask_BLS: Tensor) -> Tensor:
        """Attention over the persistent tokens and the given keys -> (B, L, H, K)."""
        if self.persistent is not None:
            _, pk, pv = self.qkv(self.persistent).unflatten(-1, (3, *self.shape)).unbind(1)
            k = torch.cat([self.key_norm(pk).expand(len(k), -1, -1, -1), k], 1)
            v = torch.cat([pv.expand(len(v), -1, -1, -1), v], 1)
            mask_BLS = nn.functional.pad(mask_BLS, (len(self.persistent), 0), value=True)
        return attend(q, k, v, mask_BLS)

    def forward(self, x_BLD: Tensor, tokens: Tokens, window: int, state: State) -> Tensor:
        """Each token sees the last `window` tokens, itself included."""
        q, k, v = self.project(x_BLD, tokens)
        k, v, keys = remember(state, k, v, tokens)
        forget(state, window)
        back_BLS = tokens.positions_BL[:, :, None] - keys.positions_BL[:, None]
        return self.attend(q, k, v, sees(tokens, keys) & (back_BLS < window))


class Output(nn.Module):
    """Gate sigmoid(x W) over all heads, then the output projection."""

    def __init__(self, d_model: int, features: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, features, bias=False)
        self.out = nn.Linear(features, d_model, bias=False)

    def forward(self, y_BLHK: Tensor, x_BLD: Tensor) -> Tensor:
        return self.out(y_BLHK.flatten(2) * self.gate(x_BLD).sigmoid())


class Titans(nn.Module):
    """A memory alone (lmm), gating windowed attention (mag), or before it (mal).

    The memory is a sum of several in TNT (arXiv 2511.07343): a global one and `local` ones.
    """

    def __init__(
        self,
        d_model: int,
        eps: float,
        *,
        variant: str,
        window: int,
        local: list[dict[str, Any]],
        memory: dict[str, Any],
        attention: dict[str, Any],
    ) -> None:
        super().__init__()
        H, K = memory["num_heads"], memory["head_dim"]
        self.variant, self.window = variant, window
        self.memory = Memory(d_model, reads_start=bool(local), **memory)
        self.local = nn.ModuleList(Learner(d_model, **one) for one in local)
        self.memory_norm = RMSNorm(K, eps)
        self.attention = self.attention_norm = None
        if variant != "lmm":
            inputs = H * K if variant == "mal" else d_model
            self.attention = WindowAttention(inputs, eps, **attention)
            self.attention_norm = RMSNorm(K, eps)
        self.output = Output(d_model, H * K)

    def forward(self, x_BLD: Tensor, tokens: Tokens, state: State) -> Tensor:
        """Mixes the tokens; the state then holds them too."""
        if not state:
            state |= {"memory": {}, "local": [{} for _ in self.local], "window": {}}
        q, k, v = self.memory.project(x_BLD, tokens, state, "tail")
        learners: list[Any] = [self.memory, *self.local]
        reads = [
            learner.learn(q, k, v, learner.gate(x_BLD, tokens), tokens, its)
            for learner, its in zip(learners, [state["memory"], *state["local"]], strict=True)
        ]
        y_BLHK = self.memory_norm(torch.stack(reads).sum(0))
        if self.attention is not None and self.attention_norm is not None:
            mal = self.variant == "mal"
            inputs = y_BLHK.flatten(2) if mal else x_BLD
            a_BLHK = self.attention(inputs, tokens, self.window, state["window"])
            a_BLHK = self.attention_norm(a_BLHK)
            y_BLHK = a_BLHK if mal else a_BLHK * y_BLHK.sigmoid()
        return self.output(y_BLHK, x_BLD)


class MemoryAsContext(nn.Module):
    """mac: a text in windows. In each, in this order:

    h = M(q) at the weights that the window begins with         (retrieve)
    y = attention over [persistent | h | window], causal        (attend)
    M learns from y; m_t = M_t(q(y_t)) after each token's write  (write, read)
    o = norm(y) * sigmoid(norm(m))
    """

    def __init__(
        self,
        d_model: int,
        eps: float,
        *,
        window: int,
        memory: dict[str, Any],
        attention: dict[str, Any],
    ) -> None:
        super().__init__()
        H, K = memory["num_heads"], memory["head_dim"]
        self.window = window
        self.memory = Memory(d_model, **memory)
        self.attention = WindowAttention(d_model, eps, **attention)
        self.retrieved_out = nn.Linear(H * K, d_model, bias=False)
        self.attention_out = nn.Linear(H * K, d_model, bias=False)
        self.retrieved_norm = RMSNorm(K, eps)
        self.attention_norm = RMSNorm(K, eps)
        self.memory_norm = RMSNorm(K, eps)
        self.output = Output(d_model, H * K)

    def forward(self, x_BLD: Tensor, tokens: Tokens, state: State) -> Tensor:
        """Mixes the tokens; the state then holds them too."""
        if not state:
            memory = self.memory.start(len(x_BLD))
            state |= {"memory": memory, "retrieved": memory["now"], "kept": {}, "kept_h": {}}
        (ask_BLHK,) = self.memory.project(x_BLD, tokens, state, "ask_tail", first=1)
        qkv = self.attention.project(x_BLD, tokens)
        out = []
        for piece in tokens.pieces(self.window):
            ask, q, k, v = (x[:, piece] for x in (ask_BLHK, *qkv))
            out.append(self.piece(ask, q, k, v, tokens[piece], state))
        return self.output(torch.cat(out, 1), x_BLD)

    def piece(
        self, ask: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, state: State
    ) -> Tensor:
        """Tokens of one window -> (B, C, H, K)."""
        begins_B = tokens.begins(self.window)[:, 0]
        state["retrieved"] = where(begins_B, state["memory"]["now"], state["retrieved"])
        h_BLHK = read(state["retrieved"], heads(ask)).transpose(1, 2).to(ask.dtype)
        h_BLD = self.retrieved_out(self.retrieved_norm(h_BLHK).flatten(2))
        _, kh, vh = self.attention.project(h_BLD, tokens)
        kh, vh, _ = remember(state["kept_h"], kh, vh, tokens)
        k, v, keys = remember(state["kept"], k, v, tokens)
        own = tokens.positions_BL // self.window, keys.positions_BL // self.window
        mask_BLS = sees(tokens, keys) & (own[0][:, :, None] == own[1][:, None])
        k, v = torch.cat([kh, k], 1), torch.cat([vh, v], 1)
        a_BLHK = self.attention.attend(q, k, v, mask_BLS.repeat(1, 1, 2))
        forget(state["kept"], self.window)
        forget(state["kept_h"], self.window)

        y_BLD = self.attention_out(a_BLHK.flatten(2))
        q, k, v = self.memory.project(y_BLD, tokens, state, "tail")
        gates = self.memory.gate(y_BLD, tokens)
        m_BLHK = self.memory.learn(q, k, v, gates, tokens, state["memory"])
        return self.attention_norm(a_BLHK) * self.memory_norm(m_BLHK).sigmoid()


def make_titans(d_model: int, eps: float, *, variant: str, **sizes: Any) -> nn.Module:
    """The module of a variant: lmm, mac, mag or mal."""
    if variant == "mac":
        sizes.pop("local")
        return MemoryAsContext(d_model, eps, **sizes)
    return Titans(d_model, eps, variant=variant, **sizes)

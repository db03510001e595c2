"""Updates of MLP levels inside a text: the continuum memory of arXiv 2512.24695 (eq. 70-71).

Level i of every layer, with chunks of C_i tokens, begins a text at its trained weights and follows

    fast_i <- fast_i - rate * sum over the chunk's tokens of d nll / d fast_i

when a chunk ends. A text runs in pieces of the smallest chunk. The gradient of a piece is taken at
the weights that it ran with, and earlier pieces are constants in it. A piece is learned from when
the token after it arrives: only then is its last target known.

Shapes: B batch, L new tokens, C tokens of a piece, D model. Written by tlm-jax (Apache-2.0); needs
PyTorch alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .tapered_layers import State, Tokens, each

Changes = dict[str, dict[str, Tensor]]
"""Differences of a layer's MLPs from their trained weights, by level and parameter; (B, ...)."""
Run = Callable[[Tensor, Tokens, list[State], list[Changes]], Tensor]
"""Logits (B, L, V) of tokens (B, L); the states then hold the tokens too."""


def changed(level: nn.Module, x_BLD: Tensor, changes: dict[str, Tensor]) -> Tensor:
    """What a level gives with weights of each row's own."""
    weights = {name: p + changes[name] for name, p in level.named_parameters()}
    return torch.func.vmap(lambda w, x: torch.func.functional_call(level, w, (x,)))(weights, x_BLD)


def start(layers: Any, chunks: list[int], batch: int) -> State:
    """What a cache holds of the updates before the first token."""

    def none() -> list[Changes]:
        return [
            {
                str(index): {
                    name: p.detach().new_zeros(batch, *p.shape)
                    for name, p in layer.mlp[index].named_parameters()
                }
                for index, chunk in enumerate(chunks)
                if chunk
            }
            for layer in layers
        ]

    return {"used": none(), "ahead": none()}


def advance(
    run: Run,
    tokens_BL: Tensor,
    places: Tokens,
    before: int,
    states: list[State],
    online: State,
    *,
    chunks: list[int],
    rate: float,
) -> Tensor:
    """Reads tokens with the updates -> logits (B, L, V); changes both states.

    Args:
      run: the model.
      tokens_BL: the next tokens.
      places: where they stand.
      before: how many tokens came before them.
      states: of the mixers, after those.
      online: of the updates; from `start`.
      chunks: C_i of each level, 0 for a level that is not updated.
      rate: of the updates.
    """
    if not places.real_BL.all():
        raise ValueError("a model that learns inside a text takes rows without padding")
    C = min(chunk for chunk in chunks if chunk)
    out, at = [], 0
    while at < tokens_BL.shape[1]:
        here = (before + at) % C
        if here == 0:
            if before + at:
                gradients = learn(run, online, tokens_BL[:, at])
                descend(online, gradients, before + at, chunks, rate)
            online["states"] = each(torch.Tensor.detach, states)
            online["tokens"], online["positions"] = (x[:, :0] for x in (tokens_BL, tokens_BL))
        part = slice(at, at + C - here)
        out.append(run(tokens_BL[:, part], places[part], states, online["used"]))
        online["tokens"] = torch.cat([online["tokens"], tokens_BL[:, part]], 1)
        online["positions"] = torch.cat([online["positions"], places[part].positions_BL], 1)
        at = part.stop
    return torch.cat(out, 1)


def learn(run: Run, online: State, next_B: Tensor) -> Any:
    """Gradients of the piece's losses in the weights that it ran with; `next_B` follows it."""
    with torch.inference_mode(False), torch.enable_grad():
        used = each(lambda x: x.detach().clone().requires_grad_(), online["used"])
        states = each(lambda x: x.detach().clone(), online["states"])
        tokens_BC, positions_BC = online["tokens"].clone(), online["positions"].clone()
        places = Tokens(positions_BC, torch.ones_like(positions_BC, dtype=torch.bool))
        logits = run(tokens_BC, places, states, used)
        targets = torch.cat([tokens_BC[:, 1:], next_B[:, None]], 1)
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        leaves: list[Tensor] = []
        each(leaves.append, used)
        found = iter(torch.autograd.grad(loss, leaves))
    return each(lambda _: next(found), used)


def descend(online: State, gradients: Any, tokens: int, chunks: list[int], rate: float) -> None:
    """A step of the weights ahead; chunks that end after `tokens` tokens use them from now on."""
    for layer, levels in enumerate(gradients):
        for level, parts in levels.items():
            ahead = online["ahead"][layer][level]
            ahead = {name: ahead[name] - rate * parts[name] for name in parts}
            online["ahead"][layer][level] = ahead
            if tokens % chunks[int(level)] == 0:
                online["used"][layer][level] = ahead

"""Exact parameters and FLOPs of a layer's parts; `costs` adds them up."""

import dataclasses
import functools

from tlm_jax.mixers import AttentionConfig, GatedAttentionConfig, TitansConfig
from tlm_jax.mlp import MLPConfig
from tlm_jax.validation import UserError, round_up

_UNKNOWN = "no module is registered for {name}; call tlm_jax.register({name}, Module)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerCosts:
    """Costs of one layer's sequence mixer, per token where not said otherwise."""

    parameters: int
    """All parameters, with norms inside the mixer."""
    projection_flops: int
    """Forward FLOPs of products with parameters."""
    mixing_flops: int
    """Forward FLOPs between tokens, each seeing itself and those before."""
    mixing_flops_full: int
    """The same with every token seeing all, or a whole window."""
    cache_values: int
    """Values a decoder keeps of each token."""
    state_values: int = 0
    """Values a decoder keeps of each sequence, however long it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPCosts:
    """Costs of one MLP, without the norm in front of it."""

    parameters: int
    flops: int
    """Of the forward pass, per token."""


@functools.singledispatch
def mlp_costs(mlp: object, d_model: int, width: int) -> MLPCosts:
    """Costs of one level of an MLP, chosen by the type of its config.

    Args:
      mlp: the config.
      d_model: width of the residual stream.
      width: of the level.

    Raises:
      TypeError: neither costs nor a module are registered for this config.
    """
    del d_model, width
    raise TypeError(_UNKNOWN.format(name=type(mlp).__name__))


@mlp_costs.register
def _swiglu_costs(mlp: MLPConfig, d_model: int, width: int) -> MLPCosts:
    del mlp
    matrices = 3 * d_model * width  # gate, up and down
    return MLPCosts(parameters=matrices, flops=2 * matrices)


NORM_PARAMETERS = {"rms": 1}
"""Parameters of each kind of norm per dim of the stream."""
NORM_MODULES: dict[str, str] = {}
"""Module that registered each kind of norm; see `models.registry.register_norm`."""


def norm_parameters(kind: str) -> int:
    """Parameters of a norm per dim of the stream.

    Raises:
      UserError: nobody registered this kind.
    """
    if kind not in NORM_PARAMETERS:
        raise UserError(
            f"model.norm={kind!r} is not one of {', '.join(NORM_PARAMETERS)}; if your own module "
            "registers it, add --trust_module MODULE (or its file, FOLDER/NAME.py)"
        )
    return NORM_PARAMETERS[kind]


@functools.singledispatch
def mixer_costs(mixer: object, d_model: int, seq_len: int) -> MixerCosts:
    """Costs of a mixer, chosen by the type of its config.

    A new mixer may add its own with `@mixer_costs.register`; otherwise they are counted in its
    module's program (`models.registry.register`).

    Args:
      mixer: the mixer's config.
      d_model: width of the residual stream.
      seq_len: tokens in a sequence.

    Raises:
      TypeError: neither costs nor a module are registered for this config.
    """
    raise TypeError(_UNKNOWN.format(name=type(mixer).__name__))


@mixer_costs.register
def _attention_costs(mixer: AttentionConfig, d_model: int, seq_len: int) -> MixerCosts:
    heads, kv_heads, head_dim = mixer.heads(d_model)
    queries, keys = heads * head_dim, kv_heads * head_dim
    matrices = d_model * queries + 2 * d_model * keys + queries * d_model
    biases = {"none": 0, "qkv": queries + 2 * keys, "all": queries + 2 * keys + d_model}[mixer.bias]
    window = min(mixer.window or seq_len, seq_len)
    # Twice the keys that a token sees on average: 1 + 2 + ... in a row, then a whole window each.
    seen = round(window * (2 * seq_len - window + 1) / seq_len)
    return MixerCosts(
        parameters=matrices + biases + (2 * head_dim if mixer.qk_norm else 0),
        projection_flops=2 * matrices,
        # Scores and weighted values, 2 * queries FLOPs each for every key seen.
        mixing_flops=2 * queries * seen,
        mixing_flops_full=4 * queries * window,
        cache_values=2 * keys,
    )


@mixer_costs.register
def _gated_attention_costs(mixer: GatedAttentionConfig, d_model: int, seq_len: int) -> MixerCosts:
    attention = _attention_costs(mixer, d_model, seq_len)
    gate = mixer.gate_parameters(d_model)
    return dataclasses.replace(
        attention,
        parameters=attention.parameters + gate,
        projection_flops=attention.projection_flops + 2 * gate,
    )


@mixer_costs.register
def _titans_costs(mixer: TitansConfig, d_model: int, seq_len: int) -> MixerCosts:
    """Memories of each head; beside them, before them or after them attention in a window.

    Persistent tokens' own keys and values are made once for a whole batch and not counted;
    neither is what documents cost that begin inside a chunk.
    """
    H, K = mixer.heads(d_model)
    mac = mixer.variant == "mac"
    values = H * K
    matrix = d_model * values
    memories = 1 + len(mixer.local_chunks)
    gates = memories * H * (1 + mixer.forgetting + mixer.momentum)
    inputs = values if mixer.variant == "mal" else d_model
    attention = 3 * inputs * values if mixer.attends else 0
    # q, k, v, the output's gate and projection; mac leads h and y back to the model's width.
    matrices = (7 if mac else 5) * matrix + d_model * gates + attention
    conv = 3 * mixer.conv_width * values if mixer.conv_width > 1 else 0
    norms = K + (3 * K if mixer.attends else 0) + (K if mac else 0)
    shapes = mixer.memory_shapes(d_model)
    memory = H * sum(i * o for i, o in shapes)
    persistent = mixer.num_persistent * inputs if mixer.attends else 0

    learning, learning_full = _learning(mixer, H, shapes)
    learning += 2 * memory * mac  # the read of h
    learning_full += 2 * memory * mac
    keys, keys_full = _keys_seen(mixer, seq_len)
    reused = 3 * matrix if mac else 0  # q of x and of y; k and v of x and of h
    state = memories * memory * (2 + mixer.momentum) + 3 * (mixer.conv_width - 1) * values
    state += len(mixer.local_chunks) * H * K * K * mixer.project_queries
    if mac:
        state += memory * (2 + mixer.momentum) + (mixer.conv_width - 1 + 4 * mixer.window) * values
    return MixerCosts(
        parameters=matrices + conv + norms + gates + memories * memory + persistent,
        projection_flops=2 * (matrices + reused),
        mixing_flops=learning + round(4 * values * keys),
        mixing_flops_full=learning_full + 4 * values * keys_full,
        cache_values=2 * values if mixer.attends and not mac else 0,
        state_values=state,
    )


def _memories(mixer: TitansConfig) -> list[tuple[int, bool, bool]]:
    """Of each memory: its chunk, whether it reads after each write, whether it projects queries."""
    return [
        (mixer.chunk, not mixer.local_chunks, False),
        *((chunk, True, mixer.project_queries) for chunk in mixer.local_chunks),
    ]


def _learning(
    mixer: TitansConfig, heads: int, shapes: tuple[tuple[int, int], ...]
) -> tuple[int, int]:
    """Forward FLOPs per token of all memories, causal and in full."""
    memory = sum(i * o for i, o in shapes)
    causal = full = 0
    for chunk, after_write, projects in _memories(mixer):
        # In multiply-adds. Products with weights of the memory: the error's forward and backward
        # pass, the read, the update; momentum updates the last step too, and reads after a write
        # read it.
        inner = (4 + mixer.momentum * (1 + after_write)) * memory - shapes[0][0] * shapes[0][1]
        pairs = 0  # with each token of the chunk
        if after_write:
            inner += (chunk * chunk + chunk) * mixer.momentum  # what gates multiply out to
            pairs += sum(i + o for i, o in shapes)
        if projects:
            inner += 2 * shapes[0][0] ** 2
            pairs += 2 * shapes[0][0]
        causal += heads * (2 * inner + pairs * (chunk + 1))
        full += heads * (2 * inner + 2 * pairs * chunk)
    return causal, full


def _keys_seen(mixer: TitansConfig, seq_len: int) -> tuple[float, int]:
    """Keys of attention that a token sees on average, and that a dense kernel computes."""
    if not mixer.attends:
        return 0, 0
    P, window = mixer.num_persistent, mixer.window
    if mixer.variant == "mac":  # what the tokens of the window retrieved, and they themselves
        tokens = min(window, round_up(seq_len, mixer.chunk))
        return P + tokens + 1, P + 2 * tokens
    if seq_len <= window:
        return P + (seq_len + 1) / 2, P + seq_len
    return P + window - window * (window - 1) / (2 * seq_len), P + 2 * window

"""Configs of sequence mixers: what a layer does across tokens.

A mixer is a config here (or in a user's own file), a Flax module registered for
it in `models.registry`, and its costs in `costs.mixer_costs`.
"""

import dataclasses

from tlm_jax.validation import divisors, require, round_up


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """Base of all mixer configs; static, hashable, compared by value."""

    def check(self, d_model: int) -> None:
        """Raises `ValueError` if the mixer does not fit a stream of this width."""

    def describe(self, d_model: int) -> str:
        """A few words for tables."""
        return type(self).__name__.removesuffix("Config")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    """Multi-head or grouped-query softmax attention with rotary positions."""

    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads; None means as many as query heads."""
    head_dim: int | None = None
    """Dimension of a head; None means d_model / num_heads."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""

    def __post_init__(self) -> None:
        require(self.num_heads > 0, f"num_heads is {self.num_heads}; it must be at least 1")
        kv = self.num_kv_heads
        if kv is not None:
            require(
                kv > 0 and self.num_heads % kv == 0,
                f"num_kv_heads={kv} does not divide num_heads={self.num_heads}; "
                f"use one of {divisors(self.num_heads)}",
            )
        if self.head_dim is not None:
            require(
                self.head_dim > 0 and self.head_dim % 2 == 0,
                f"head_dim={self.head_dim} must be even and positive (rotary positions pair dims)",
            )

    def heads(self, d_model: int) -> tuple[int, int, int]:
        """(query heads H, key/value heads N, head dim K)."""
        kv_heads = self.num_kv_heads or self.num_heads
        return self.num_heads, kv_heads, self.head_dim or d_model // self.num_heads

    def check(self, d_model: int) -> None:
        """Raises `ValueError` unless the heads divide the stream evenly."""
        pairs = 2 * self.num_heads
        require(
            self.head_dim is not None or d_model % pairs == 0,
            f"d_model={d_model} does not divide into num_heads={self.num_heads} heads of even "
            f"dimension; use d_model={round_up(d_model, pairs)} or set mixer.head_dim",
        )

    def describe(self, d_model: int) -> str:
        """Heads and their dimension."""
        heads, kv_heads, head_dim = self.heads(d_model)
        kv = "" if kv_heads == heads else f" ({kv_heads} key/value)"
        return f"attention, {heads} head{'s' * (heads > 1)}{kv} of {head_dim}"

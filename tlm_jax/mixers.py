"""Configs of a layer's parts: mixers, which work across tokens, and MLPs.

A mixer is a config here (or in a user's own file), a Flax module registered for
it in `models.registry`, and its costs in `costs.mixer_costs`.
"""

import dataclasses
import itertools
from typing import Annotated, ClassVar, Literal, Self

from tlm_jax import taper as taper_lib
from tlm_jax.taper_config import TaperConfig
from tlm_jax.validation import (
    Checked,
    Count,
    NaturalNumber,
    NotNegative,
    Positive,
    Range,
    divisors,
    require,
    round_up,
)

PeriodRate = Literal["schedule", "times_period"]
CHAOTIC_RATE = 0.1
"""Of online updates: from here on what a row learns depends on rounding, and losses rise."""
NO_TAPER = TaperConfig(schedule="uniform", multiple_of=1)
_MAX_LEVELS = 64
NO_MEMORY_TAPER = TaperConfig(schedule="uniform", multiple_of=8)


_RopeTheta = Annotated[float, Range(least=1, most=1e15)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig(Checked):
    """A chain of residual pre-norm SwiGLU MLPs in each layer.

    One level is the ordinary MLP. More are a continuum memory system (arXiv
    2512.24695, eq. 70-71): the layer's width is shared by the levels, so the budget
    is that of one MLP, and the optimizer updates each level with its own period.
    """

    periods: tuple[int, ...] = (1,)
    """Update period of each level in optimizer steps, in the order of the chain."""
    period_rate: PeriodRate = "schedule"
    """Learning rate of a level of period C: the schedule's, or times_period for C times that."""
    level_taper: TaperConfig = NO_TAPER
    """How a layer's width is spread over its levels."""
    online_chunks: tuple[int, ...] = ()
    """Tokens between updates of each level inside a sequence; 0 is never, () turns them off."""
    online_learning_rate: NotNegative = 1e-3
    """Step of these updates along the gradient summed over the tokens of a chunk, below 0.1."""
    online_in_training: bool = False
    """Make these updates in training too, not only in evaluation and decoding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 < len(self.periods) <= _MAX_LEVELS and min(self.periods) >= 1,
            f"mlp.periods is {str(self.periods)[:80]}; every level needs a period of at least 1 "
            f"step, and there are 1 to {_MAX_LEVELS} levels",
        )
        self._check_online()

    def _check_online(self) -> None:
        chunks, levels = self.online_chunks, len(self.periods)
        require(
            len(chunks) in (0, levels),
            f"mlp.online_chunks={chunks} has {len(chunks)} entries and mlp.periods has {levels}; "
            "give one chunk length a level (0 for a level that is not updated), or none at all",
        )
        require(
            not chunks or (min(chunks) >= 0 and max(chunks) > 0),
            f"mlp.online_chunks={chunks}: lengths must not be negative and at least one must be "
            "positive; () turns updates inside a sequence off",
        )
        uneven = [chunk for chunk in chunks if chunk % self.online_piece]
        require(
            not uneven,
            f"mlp.online_chunks={chunks}: {uneven} must be multiples of the smallest, "
            f"{self.online_piece}",
        )
        rate = self.online_learning_rate
        require(
            rate < CHAOTIC_RATE,
            f"mlp.online_learning_rate={rate}: updates inside a sequence turn chaotic from about "
            f"{CHAOTIC_RATE} on; use 0.01 or less",
        )
        require(
            bool(chunks) or not self.online_in_training,
            "mlp.online_in_training needs mlp.online_chunks, one chunk length a level",
        )

    @property
    def online_piece(self) -> int:
        """Tokens that run with the same weights: the smallest chunk; 1 without updates."""
        return min((chunk for chunk in self.online_chunks if chunk), default=1)

    def check_length(self, seq_len: int) -> None:
        """Raises `ValueError` unless the chunks divide a sequence of this length."""
        for chunk in self.online_chunks:
            require(
                chunk == 0 or seq_len % chunk == 0,
                f"mlp.online_chunks={self.online_chunks}: {chunk} does not divide "
                f"data.seq_len={seq_len}; use divisors of it: {divisors(seq_len)}",
            )

    def level_widths(self, width: int) -> tuple[int, ...]:
        """Widths of the levels of a layer that is `width` wide."""
        levels = len(self.periods)
        return self.level_taper.apply(levels, width // levels)

    def check(self, width: int, layer: int) -> None:
        """Raises `ValueError` if a layer of this width cannot be shared by the levels."""
        levels = len(self.periods)
        require(
            width % levels == 0,
            f"MLP width {width} of layer {layer} does not divide into {levels} levels; "
            f"use taper.multiple_of={16 * levels}",
        )
        try:
            self.level_widths(width)
        except taper_lib.TaperError as error:
            text = str(error).replace("num_layers", "levels").replace("base_width", "level_width")
            raise ValueError(f"mlp.level_taper in layer {layer}: {text}") from None

    def uniform_twin(self) -> Self:
        """The same with levels of equal width."""
        return dataclasses.replace(self, level_taper=NO_TAPER)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerConfig(Checked):
    """Base of all mixer configs; static, hashable, compared by value."""

    masks_by_segment: ClassVar[bool] = False
    """What a token sees follows from segment ids and positions, wherever in the row it stands.

    So padding before it changes nothing, and documents may branch (see `branches.BRANCH`).
    True of attention that masks keys; not of mixers that count tokens from the row's start.
    Evaluation then packs its rows.
    """
    splits_sequence: ClassVar[bool] = False
    """Whether a row may be split over the mesh axis `sequence`."""

    def layers(self, num_layers: int, d_model: int) -> tuple["MixerConfig", ...]:
        """The mixer of each layer; a mixer that tapers gives configs that differ."""
        del d_model
        return (self,) * num_layers

    @property
    def turn(self) -> int:
        """Layers after which the kinds of mixers repeat."""
        return 1

    def uniform_twin(self) -> "MixerConfig":
        """The same mixer with nothing tapered."""
        return self

    def mlp_width_taken(self, d_model: int) -> int:
        """MLP width that this mixer's parameters take off every layer's budget."""
        del d_model
        return 0

    def check(self, d_model: int) -> None:
        """Raises `ValueError` if the mixer does not fit a stream of this width."""

    def sizes(self) -> dict[str, int]:
        """What a taper may change from layer to layer, by name."""
        return {}

    def describe(self, d_model: int) -> str:
        """A few words for tables."""
        return type(self).__name__.removesuffix("Config")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterleavedConfig(MixerConfig):
    """Mixers that take turns over depth, such as three of attention and one of Titans."""

    mixers: tuple[MixerConfig, ...]
    """One turn, which is repeated to the last layer. The MLPs of a turn are equally wide."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.mixers) > 1, f"interleaved mixers need at least 2, not {self.mixers}")
        require(
            all(mixer.turn == 1 for mixer in self.mixers),
            "interleaved mixers cannot be interleaved themselves; write out one turn",
        )

    @property
    def turn(self) -> int:
        """Layers of one turn."""
        return len(self.mixers)

    def layers(self, num_layers: int, d_model: int) -> tuple[MixerConfig, ...]:
        """Each mixer tapers over the layers that are its own."""
        require(
            num_layers % self.turn == 0,
            f"num_layers={num_layers} does not divide into turns of {self.turn} mixers; use "
            f"{round_up(num_layers, self.turn)}",
        )
        turns = num_layers // self.turn
        parts = [mixer.layers(turns, d_model) for mixer in self.mixers]
        return tuple(itertools.chain.from_iterable(zip(*parts, strict=True)))

    def uniform_twin(self) -> "InterleavedConfig":
        """The same turns with nothing tapered."""
        return InterleavedConfig(mixers=tuple(mixer.uniform_twin() for mixer in self.mixers))

    def mlp_width_taken(self, d_model: int) -> int:
        """The mean over a turn, to the nearest multiple of 16."""
        taken = sum(mixer.mlp_width_taken(d_model) for mixer in self.mixers)
        return 16 * round(taken / self.turn / 16)

    def check(self, d_model: int) -> None:
        """Raises `ValueError` if one of them does not fit the stream."""
        for mixer in self.mixers:
            mixer.check(d_model)

    def describe(self, d_model: int) -> str:
        """One turn, such as `3 x attention, ... + 1 x Titans ...`."""
        runs = itertools.groupby(mixer.describe(d_model) for mixer in self.mixers)
        return " + ".join(f"{len(list(run))} x {words}" for words, run in runs)


def _check_head_dim(head_dim: int | None) -> None:
    require(
        head_dim is None or (head_dim > 0 and head_dim % 2 == 0),
        f"head_dim={head_dim} must be even and positive (rotary positions pair dims)",
    )


def _check_heads(d_model: int, num_heads: int, head_dim: int | None) -> None:
    pairs = 2 * num_heads
    require(
        head_dim is not None or d_model % pairs == 0,
        f"d_model={d_model} does not divide into num_heads={num_heads} heads of even "
        f"dimension; use d_model={round_up(d_model, pairs)} or set mixer.head_dim",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    """Multi-head or grouped-query softmax attention with rotary positions."""

    masks_by_segment: ClassVar[bool] = True
    splits_sequence: ClassVar[bool] = True

    num_heads: Count = 4
    """Query heads."""
    num_kv_heads: Count | None = None
    """Key and value heads; None means as many as query heads."""
    head_dim: Count | None = None
    """Dimension of a head; None means d_model / num_heads."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head."""
    rope_theta: _RopeTheta = 10_000.0
    """Base of the rotary frequencies."""
    heads_taper: TaperConfig = NO_TAPER
    """How query heads, with their key/value heads, are spread over depth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kv = self.num_kv_heads
        if kv is not None:
            require(
                self.num_heads % kv == 0,
                f"num_kv_heads={kv} does not divide num_heads={self.num_heads}; "
                f"use one of {divisors(self.num_heads)}",
            )
        _check_head_dim(self.head_dim)

    def heads(self, d_model: int) -> tuple[int, int, int]:
        """(query heads H, key/value heads N, head dim K)."""
        kv_heads = self.num_kv_heads or self.num_heads
        return self.num_heads, kv_heads, self.head_dim or d_model // self.num_heads

    def layers(self, num_layers: int, d_model: int) -> tuple["AttentionConfig", ...]:
        """Heads of each layer, in whole groups around a key/value head; sum unchanged."""
        heads, kv_heads, head_dim = self.heads(d_model)
        taper = dataclasses.replace(self.heads_taper, multiple_of=1)
        try:
            groups = taper.apply(num_layers, kv_heads)
        except taper_lib.TaperError as error:
            raise ValueError(
                f"mixer.heads_taper: {str(error).replace('base_width', 'num_kv_heads')}"
            ) from None
        distinct = {
            n: dataclasses.replace(
                self,
                num_heads=n * (heads // kv_heads),
                num_kv_heads=n,
                head_dim=head_dim,
                heads_taper=NO_TAPER,
            )
            for n in set(groups)
        }
        return tuple(distinct[n] for n in groups)

    def sizes(self) -> dict[str, int]:
        """Query heads."""
        return {"heads": self.num_heads}

    def uniform_twin(self) -> "AttentionConfig":
        """As many heads in every layer."""
        return dataclasses.replace(self, heads_taper=NO_TAPER)

    def check(self, d_model: int) -> None:
        """Raises `ValueError` unless the heads divide the stream evenly."""
        _check_heads(d_model, self.num_heads, self.head_dim)

    def describe(self, d_model: int) -> str:
        """Heads and their dimension."""
        heads, kv_heads, head_dim = self.heads(d_model)
        kv = "" if kv_heads == heads else f" ({kv_heads} key/value)"
        return f"attention, {heads} head{'s' * (heads > 1)}{kv} of {head_dim}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedAttentionConfig(AttentionConfig):
    """Attention whose output is gated by the layer's input (arXiv 2505.06708, variant G1)."""

    gate: Literal["elementwise", "headwise"] = "elementwise"
    """A gate for every value of every head, or one a head."""
    gate_from_mlp: bool = False
    """Take the gate's parameters off the MLP width, before it is tapered."""

    def gate_parameters(self, d_model: int) -> int:
        """Parameters of one layer's gate, with the mean number of heads."""
        heads, _, head_dim = self.heads(d_model)
        return d_model * heads * (head_dim if self.gate == "elementwise" else 1)

    def mlp_width_taken(self, d_model: int) -> int:
        """The gate's parameters in units of MLP width, to the nearest multiple of 16."""
        if not self.gate_from_mlp:
            return 0
        return 16 * round(self.gate_parameters(d_model) / (3 * d_model) / 16)

    def describe(self, d_model: int) -> str:
        """Heads, their dimension and the kind of gate."""
        return f"{self.gate} gated {super().describe(d_model)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TitansConfig(MixerConfig):
    """A neural memory that learns while it reads, alone or with windowed attention.

    Titans, arXiv 2501.00663. Sizes that the paper does not give are our choice.
    """

    variant: Literal["lmm", "mac", "mag", "mal"] = "mag"
    """Memory alone, as context of attention, as its gate, or as the layer before it."""
    num_heads: Count = 4
    """Heads, each with a memory of its own."""
    head_dim: Count | None = None
    """Dimension of a head; None means d_model / num_heads."""
    memory_depth: int = 2
    """Layers of the memory, 1 to 4; from 2 on it is residual with GELU between them."""
    memory_width: Count | None = None
    """Mean hidden width of a head's memory; None means 4 head_dim."""
    memory_taper: TaperConfig = NO_MEMORY_TAPER
    """How the memory's hidden width is spread over depth; exact at memory_depth=2."""
    chunk: Count = 64
    """Tokens whose gradients are taken at the same memory."""
    momentum: bool = True
    """Steps go on in the direction of those before (eta)."""
    forgetting: bool = True
    """The memory decays (alpha)."""
    max_rate: Positive | None = None
    """Bound of a token's learning rate, theta / (1 - eta); None means 0.3 / chunk."""
    gradient_clip: Positive | None = 4.0
    """Soft bound on the norm of a token's gradient; None leaves it alone."""
    conv_width: Count = 4
    """Tokens that the convolution of q, k and v sees; 1 turns it off."""
    num_persistent: NaturalNumber = 4
    """Learned tokens that attention sees in front of every document (not in lmm)."""
    window: Count = 256
    """Tokens that attention sees; in mac the length of a segment."""
    rope_theta: _RopeTheta = 10_000.0
    """Base of attention's rotary frequencies."""
    chunks_per_checkpoint: Count = 1
    """Chunks between the memories kept for the backward pass; about sqrt(seq_len / chunk)
    takes the least memory, at one more forward pass."""
    precision: Literal["default", "high", "highest"] = "highest"
    """Of the memory's float32 products on an accelerator."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            1 <= self.memory_depth <= 4,
            f"memory_depth is {self.memory_depth}; a memory has 1 to 4 layers",
        )
        _check_head_dim(self.head_dim)
        require(
            self.variant != "mac" or self.window % self.chunk == 0,
            f"chunk={self.chunk} does not divide window={self.window}, the segment of variant mac; "
            f"use one of {divisors(self.window)}, or window={round_up(self.window, self.chunk)}",
        )
        require(
            self.memory_depth == 2 or self.memory_taper.schedule == "uniform",
            f"memory_taper needs memory_depth=2, not {self.memory_depth}: only there are "
            "parameters and FLOPs linear in the memory's width, so that the budget stays exact",
        )

    @property
    def attends(self) -> bool:
        """Whether attention is a part of it."""
        return self.variant != "lmm"

    def heads(self, d_model: int) -> tuple[int, int]:
        """(heads H, head dim K)."""
        return self.num_heads, self.head_dim or d_model // self.num_heads

    def memory_shapes(self, d_model: int) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of each layer of a head's memory."""
        _, head_dim = self.heads(d_model)
        width = self.memory_width or 4 * head_dim
        sizes = (head_dim, *(width,) * (self.memory_depth - 1), head_dim)
        return tuple(itertools.pairwise(sizes))

    def layers(self, num_layers: int, d_model: int) -> tuple["TitansConfig", ...]:
        """Hidden width of each layer's memory; sum unchanged."""
        _, head_dim = self.heads(d_model)
        try:
            widths = self.memory_taper.apply(num_layers, self.memory_width or 4 * head_dim)
        except taper_lib.TaperError as error:
            text = str(error).replace("base_width", "mixer.memory_width")
            raise ValueError(f"mixer.memory_taper: {text}") from None
        distinct = {
            width: dataclasses.replace(self, memory_width=width, memory_taper=NO_TAPER)
            for width in set(widths)
        }
        return tuple(distinct[width] for width in widths)

    def sizes(self) -> dict[str, int]:
        """Hidden width of a head's memory."""
        return {"memory": self.memory_width or 0}

    def uniform_twin(self) -> "TitansConfig":
        """Memories of equal width in every layer."""
        return dataclasses.replace(self, memory_taper=NO_TAPER)

    def check(self, d_model: int) -> None:
        """Raises `ValueError` unless the heads divide the stream evenly."""
        _check_heads(d_model, self.num_heads, self.head_dim)

    def describe(self, d_model: int) -> str:
        """Variant, heads and the memory's shape."""
        heads, head_dim = self.heads(d_model)
        width = self.memory_width or 4 * head_dim
        hidden = f" x {width}" if self.memory_depth > 1 else ""
        return (
            f"Titans {self.variant.upper()}, {heads} head{'s' * (heads > 1)} of {head_dim}, memory "
            f"{self.memory_depth} layer{'s' * (self.memory_depth > 1)}{hidden}"
        )

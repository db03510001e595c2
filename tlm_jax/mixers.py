"""Configs of mixers, the parts of a layer that work across tokens.

A mixer is a config here (or in a user's own file), a Flax module registered for
it in `models.registry`, and its costs in `costs.mixer_costs`.
"""

import dataclasses
import itertools
import math
from typing import Annotated, ClassVar, Literal, Self

from tlm_jax.taper_config import NO_TAPER, TaperConfig
from tlm_jax.validation import (
    Checked,
    Count,
    NaturalNumber,
    Positive,
    Range,
    divisors,
    require,
    round_up,
)

NO_MEMORY_TAPER = TaperConfig(schedule="uniform", multiple_of=8)
_Factor = Annotated[float, Range(least=1, most=1e6)]
_RopeTheta = Annotated[float, Range(least=1, most=1e15)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerConfig(Checked):
    """Base of all mixer configs; static, hashable, compared by value."""

    masks_by_document: ClassVar[bool] = False
    """What a token sees follows from document ids and positions, wherever in the row it stands.

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
        """MLP width deducted from every layer's budget for this mixer's parameters."""
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
class _Several(MixerConfig):
    """Mixers of different layers, whose MLP widths must come out even."""

    mixers: tuple[MixerConfig, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.mixers), f"{type(self).__name__} needs mixers")
        require(
            not any(isinstance(mixer, _Several) for mixer in self.mixers),
            f"{type(self).__name__} cannot hold mixers of several layers; write them out",
        )

    def uniform_twin(self) -> Self:
        """The same mixers with nothing tapered."""
        return dataclasses.replace(self, mixers=tuple(m.uniform_twin() for m in self.mixers))

    def mlp_width_taken(self, d_model: int) -> int:
        """The mean over the mixers, to the nearest multiple of 16."""
        taken = sum(mixer.mlp_width_taken(d_model) for mixer in self.mixers)
        return 16 * round(taken / len(self.mixers) / 16)

    def check(self, d_model: int) -> None:
        """Raises `ValueError` if one of them does not fit the stream."""
        for mixer in self.mixers:
            mixer.check(d_model)

    def describe(self, d_model: int) -> str:
        """Runs of equal mixers, such as `3 x attention, ... + 1 x Titans ...`."""
        runs = itertools.groupby(mixer.describe(d_model) for mixer in self.mixers)
        return " + ".join(f"{len(list(run))} x {words}" for words, run in runs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterleavedConfig(_Several):
    """Mixers that take turns over depth, such as three of attention and one of Titans.

    `mixers` are one turn, which is repeated up to the last layer. The MLPs of a turn are equally
    wide.
    """

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListedConfig(_Several):
    """The mixer of each layer, written out. `taper.widths` does the same for the MLPs."""

    def layers(self, num_layers: int, d_model: int) -> tuple[MixerConfig, ...]:
        """The mixers as listed; each is one layer's, so that none of them can taper."""
        require(
            num_layers == len(self.mixers),
            f"num_layers={num_layers}, but the mixers of {len(self.mixers)} layers are listed",
        )
        return tuple(mixer.layers(1, d_model)[0] for mixer in self.mixers)


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
class RopeScaling(Checked):
    """How rotary frequencies are lowered for texts longer than those a model began with.

    linear divides all of them by `factor` (arXiv 2306.15595). llama3 divides those by it whose
    wavelength is above original_length / low_freq_factor, none below original_length /
    high_freq_factor, and interpolates between (Llama 3.1, arXiv 2407.21783).
    """

    method: Literal["none", "linear", "llama3"] = "none"
    factor: _Factor = 1.0
    """Of linear and llama3."""
    low_freq_factor: Positive = 1.0
    """For llama3 only, as what follows."""
    high_freq_factor: _Factor = 4.0
    original_length: Count = 8192
    """Tokens of the texts that the model began with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.low_freq_factor < self.high_freq_factor,
            f"low_freq_factor={self.low_freq_factor} must be below "
            f"high_freq_factor={self.high_freq_factor}",
        )

    def divisors(self, theta: float, head_dim: int) -> list[float]:
        """What each of the head_dim / 2 frequencies theta^(-2k/head_dim) is divided by."""
        if self.method != "llama3":
            return [self.factor if self.method == "linear" else 1.0] * (head_dim // 2)
        low, high = self.low_freq_factor, self.high_freq_factor
        found = []
        for k in range(head_dim // 2):
            turns = self.original_length * theta ** (-2 * k / head_dim) / (2 * math.pi)
            kept = min(max((turns - low) / (high - low), 0.0), 1.0)
            found.append(1 / (kept + (1 - kept) / self.factor))
        return found


NO_SCALING = RopeScaling()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    """Multi-head or grouped-query softmax attention with rotary positions."""

    splits_sequence: ClassVar[bool] = True

    num_heads: Count = 4
    """Query heads."""
    num_kv_heads: Count | None = None
    """Key and value heads; None means as many as query heads."""
    head_dim: Count | None = None
    """Dimension of a head; None means d_model / num_heads."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head."""
    bias: Literal["none", "qkv", "all"] = "none"
    """Biases: of queries, keys and values, or of the output too."""
    window: Count | None = None
    """Tokens that a token sees, itself included; None is the whole document before it."""
    rope_theta: _RopeTheta | None = 10_000.0
    """Base of the rotary frequencies; None is no positions."""
    rope_scaling: RopeScaling = NO_SCALING
    """How the rotary frequencies are changed for long texts."""
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
        require(
            self.rope_theta is not None or self.rope_scaling.method == "none",
            "rope_scaling scales rotary positions, and rope_theta=None turns them off",
        )

    @property
    def masks_by_document(self) -> bool:  # type: ignore[override]
        """Without a window, which counts tokens of the row and not of the branch."""
        return self.window is None

    def heads(self, d_model: int) -> tuple[int, int, int]:
        """(query heads H, key/value heads N, head dim K)."""
        kv_heads = self.num_kv_heads or self.num_heads
        return self.num_heads, kv_heads, self.head_dim or d_model // self.num_heads

    def layers(self, num_layers: int, d_model: int) -> tuple["AttentionConfig", ...]:
        """Heads of each layer, in whole groups around a key/value head; sum unchanged."""
        heads, kv_heads, head_dim = self.heads(d_model)
        taper = dataclasses.replace(self.heads_taper, multiple_of=1)
        groups = taper.apply(
            num_layers, kv_heads, where="mixer.heads_taper: ", base_width="num_kv_heads"
        )
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
        window = "" if self.window is None else f", window {self.window:,}"
        positions = "" if self.rope_theta else ", no positions"
        return f"attention, {heads} head{'s' * (heads > 1)}{kv} of {head_dim}{window}{positions}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedAttentionConfig(AttentionConfig):
    """Attention whose output is gated by the layer's input (arXiv 2505.06708, variant G1)."""

    gate: Literal["elementwise", "headwise"] = "elementwise"
    """One gate per value of each head, or one per head."""
    gate_from_mlp: bool = False
    """Deduct the gate's parameters from the MLP width, before it is tapered."""

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
    """Heads, each with its own memory."""
    head_dim: Count | None = None
    """Dimension of a head; None means d_model / num_heads."""
    memory_depth: int = 2
    """Layers of the memory, 1 to 4; from 2 on it is residual with GELU between them."""
    memory_width: Count | None = None
    """Mean hidden width of a head's memory; None means 4 head_dim."""
    memory_taper: TaperConfig = NO_MEMORY_TAPER
    """How the memory's hidden width is spread over depth; exact at memory_depth=2."""
    chunk: Count = 64
    """Tokens whose gradients are taken at the same state of the memory."""
    local_chunks: tuple[Count, ...] = ()
    """TNT (arXiv 2511.07343): chunks of local memories, whose reads are added to those of the
    memory above. That one, now the global memory, reads what earlier chunks have written, so
    that `chunk` may be long. Not in mac."""
    shard: Count = 2048
    """Tokens after which local memories start over; shards are computed side by side."""
    project_queries: bool = True
    """Project the queries of local memories onto the keys that their shard has seen."""
    momentum: bool = True
    """The memory's steps have momentum (eta)."""
    forgetting: bool = True
    """The memory decays (alpha)."""
    max_rate: Positive | None = None
    """Bound of a token's learning rate, theta / (1 - eta); None means 0.3 / chunk."""
    gradient_clip: Positive | None = 4.0
    """Soft bound on the norm of a token's gradient; None is no bound."""
    conv_width: Count = 4
    """Tokens that the convolution of q, k and v sees; 1 turns it off."""
    num_persistent: NaturalNumber = 4
    """Learned tokens that attention sees in front of every document (not in lmm)."""
    window: Count = 256
    """Tokens that attention sees; in mac the length of a block of them."""
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
            f"chunk={self.chunk} does not divide window={self.window}, the block of variant mac; "
            f"use one of {divisors(self.window)}, or window={round_up(self.window, self.chunk)}",
        )
        require(
            not self.local_chunks or self.variant != "mac",
            "local_chunks need variant lmm, mag or mal: in mac the memory learns window by window, "
            "so that shards cannot be computed side by side",
        )
        for chunk in self.local_chunks:
            require(
                self.shard % chunk == 0,
                f"a local chunk of {chunk} does not divide shard={self.shard}; use one of "
                f"{divisors(self.shard)}, or shard={round_up(self.shard, chunk)}",
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
        widths = self.memory_taper.apply(
            num_layers,
            self.memory_width or 4 * head_dim,
            where="mixer.memory_taper: ",
            base_width="mixer.memory_width",
        )
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
        chunks = ", ".join(map(str, self.local_chunks))
        local = f", local chunks {chunks} in shards of {self.shard}" if chunks else ""
        return (
            f"Titans {self.variant.upper()}, {heads} head{'s' * (heads > 1)} of {head_dim}, memory "
            f"{self.memory_depth} layer{'s' * (self.memory_depth > 1)}{hidden}{local}"
        )

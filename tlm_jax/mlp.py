"""Config of MLPs, the parts of a layer that work on each token."""

import dataclasses
from typing import Literal, Self

from tlm_jax.taper_config import NO_TAPER, TaperConfig
from tlm_jax.validation import Checked, NotNegative, divisors, require

PeriodRate = Literal["schedule", "times_period"]
CHAOTIC_RATE = 0.1
"""Of online updates: from here on what a row learns depends on rounding, and losses rise."""
_MAX_LEVELS = 64


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
            "give one chunk length per level (0 for a level that is not updated), or none at all",
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
            f"mlp.online_learning_rate={rate}: updates inside a sequence become chaotic from about "
            f"{CHAOTIC_RATE} on; use 0.01 or less",
        )
        require(
            bool(chunks) or not self.online_in_training,
            "mlp.online_in_training needs mlp.online_chunks, one chunk length per level",
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
        where = f"mlp.level_taper in layer {layer}: "
        names = {"num_layers": "levels", "base_width": "level_width"}
        self.level_taper.apply(levels, width // levels, where=where, **names)

    def uniform_twin(self) -> Self:
        """The same with levels of equal width."""
        return dataclasses.replace(self, level_taper=NO_TAPER)

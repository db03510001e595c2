"""Configs of optimizers and learning-rate schedules; `training.updates` makes them.

A custom optimizer is a config that derives from `OptimizerConfig`, and a function registered
for it with `tlm_jax.register_optimizer`.
"""

import dataclasses
from typing import Annotated, Literal

from tlm_jax.validation import (
    Checked,
    Fraction,
    NaturalNumber,
    NotNegative,
    Positive,
    Range,
    require,
)

_Decay = Annotated[float, Range(least=0, below=1)]
_Epsilon = Annotated[float, Range(above=0, most=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Checked):
    """AdamW (arXiv 1711.05101); other optimizers derive from it, for schedule and clipping."""

    learning_rate: Annotated[float, Range(above=0, most=1e3)] = 4e-4
    """Peak learning rate."""
    final_learning_rate: NotNegative = 4e-5
    """Learning rate at the last step."""
    warmup_steps: NaturalNumber = 1000
    """Steps from zero to the peak, linear."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """Decay from the peak to the final rate: cosine or linear over all steps after the warm-up, or
    warm-up-stable-decay, which stays at the peak until the last `decay_fraction` of the steps."""
    decay_fraction: Fraction = 0.2
    """Share of the steps in which wsd falls, linearly."""
    weight_decay: NotNegative = 0.1
    """Decoupled decay, on matrices only (docs/training.md lists what is exempt)."""
    beta1: _Decay = 0.9
    beta2: _Decay = 0.95
    eps: _Epsilon = 1e-8
    clip_norm: Positive = 1.0
    """Gradients are scaled down to this global norm."""
    rate_by_width: bool = False
    """Multiply the rate of an MLP's last matrix by the mean width over its own: a matrix with more
    inputs moves its outputs further at the same rate (arXiv 2203.03466; not for Muon)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        peak, final = self.learning_rate, self.final_learning_rate
        require(
            final <= peak,
            f"final_learning_rate={final} is more than learning_rate={peak}, from which it "
            f"falls; use final_learning_rate={peak / 10:g}",
        )
        require(
            peak * self.weight_decay <= 1,
            f"weight_decay={self.weight_decay} at learning_rate={peak} shrinks each weight by "
            f"more than its value in a step; use at most {1 / peak:g}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MuonConfig(OptimizerConfig):
    """Muon for the matrices inside layers, AdamW for all else (Jordan et al. 2024).

    The momentum of each layer's own matrix is orthogonalised, stacked or not. Its update is
    scaled by 0.2 sqrt(longer side), which gives it the size of AdamW's at the same rate whatever
    the matrix's shape (arXiv 2502.16982): one learning rate serves all widths and both optimizers.
    """

    momentum: _Decay = 0.95
    """Decay of the momentum (Nesterov's)."""
    newton_schulz_steps: Annotated[int, Range(least=1, most=20)] = 5
    """Iterations of the orthogonalisation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdafactorConfig(OptimizerConfig):
    """Adafactor (arXiv 1804.04235): second moments by row and column, no first moment.

    beta1 and beta2 are not used; eps is added to squared gradients.
    """

    decay_rate: _Decay = 0.8
    """Exponent of the second moments' decay, 1 - step^-rate."""
    min_dim_factored: Annotated[int, Range(least=1)] = 128
    """Matrices with a shorter side keep all second moments."""

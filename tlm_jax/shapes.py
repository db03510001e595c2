"""Curves over depth: those of a taper, and widths of related work at a uniform model's budget.

Each shape of related work gives the width of a layer at depth x (0 at the first layer, 1 at the
last) up to a factor, which the budget fixes. The papers vary more than MLP widths, or other sizes
of the block; here only the MLP's width follows their curve (our reading, to compare shapes and
nothing else).
"""

import math
from collections.abc import Callable

from tlm_jax import _fit

_DECIMALS = 9  # of a unit; removes the noise of floats so that ties are ties


def _sigmoid(x: float, steepness: float) -> float:
    """sigma(-k (x - 1/2)) between the ends, which are 1 and 0 (arXiv 2606.23670, eq. 6).

    Not rescaled: with k = 10 the second layer of 24 stands at 0.990, and the last but one at 0.010.
    """
    if x in (0.0, 1.0):
        return 1.0 - x
    return (1.0 - math.tanh(steepness * (x - 0.5) / 2)) / 2.0  # tanh does not overflow


CURVES: dict[str, Callable[[float, float], float]] = {
    "linear": lambda x, _: 1.0 - x,
    "cosine": lambda x, _: (1.0 + math.cos(math.pi * x)) / 2.0,
    "sigmoid": _sigmoid,
}
"""f(x, steepness), falling from 1 at depth 0 to 0 at depth 1; see `taper.layer_widths`."""


def _openelm(x: float) -> float:
    """OpenELM 1.1B (arXiv 2404.14619): FFN multipliers grow linearly from 0.5 to 4."""
    return 0.5 + 3.5 * x


def _delight(x: float) -> float:
    """DeLighT (arXiv 2008.00623): multipliers grow from m_w to m_w + N_max / N_min - 1.

    With m_w = 2 and N_max = 2 N_min: from 2 to 3.
    """
    return 2.0 + x


def _middle(x: float) -> float:
    """Ikeda et al. (arXiv 2508.17734): the middle 70% of the layers share all of the width.

    They leave out the other MLPs; here those keep a thousandth, which rounds to one unit.
    """
    return 1.0 if 0.15 <= x <= 0.85 else 1e-3


def _crown(x: float) -> float:
    """After the crown of arXiv 2509.06518: from 0.5 at both ends linearly to 1.5 in the middle."""
    return 1.5 - 2.0 * abs(x - 0.5)


def _frame(x: float) -> float:
    """The opposite: wide at both ends (our reading; the names are not used consistently)."""
    return 0.5 + 2.0 * abs(x - 0.5)


def _bottleneck(x: float) -> float:
    """The ><former (arXiv 2606.18246): geometric down to 0.3 at three quarters, and up again."""
    return 0.3 ** (x / 0.75 if x <= 0.75 else (1.0 - x) / 0.25)


SHAPES: dict[str, Callable[[float], float]] = {
    "openelm": _openelm,
    "delight": _delight,
    "middle": _middle,
    "crown": _crown,
    "frame": _frame,
    "bottleneck": _bottleneck,
}
"""Width at depth x, up to a factor."""


def units(name: str, num_layers: int, budget: int) -> tuple[list[float], list[int] | None]:
    """The curve, and the positive whole numbers nearest to it, that sum to `budget`.

    The second is None if the budget has fewer units than there are layers.
    """
    last = max(num_layers - 1, 1)
    curve = [SHAPES[name](layer / last) for layer in range(num_layers)]
    scale = budget / sum(curve)
    ideal = [round(width * scale, _DECIMALS) for width in curve]
    near = [max(round(width), 1) for width in ideal]
    return ideal, _fit.nearest(near, ideal, budget, 1, None)

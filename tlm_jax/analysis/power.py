"""How many seeds it takes to tell a difference from zero, from the spread of a finished sweep.

Differences are paired (`sweep_report`): an arm minus its baseline with the same seed.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence

from rich.table import Table

from tlm_jax import output
from tlm_jax.analysis.sweep_report import LEVEL, Record, findings

POWER = 0.8
"""Chance of seeing what is there."""
_MOST = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """Standard deviation of paired differences, in nats per token."""

    deviation: float
    low: float
    high: float
    """Its 95% interval (chi-squared)."""
    degrees: int
    """Degrees of freedom: pairs minus one, summed over arms."""


def spread(records: Sequence[Record]) -> Spread | None:
    """That of all arms together, as if it were the same in each; None if no arm has two pairs."""
    from scipy import stats  # slow to import

    squares, degrees = 0.0, 0
    cells = {(r["arm"], r["seed"]): r["final"]["loss"] for r in records}
    for found in findings(records):
        pairs = [(found.baseline, seed) for seed in found.seeds]
        apart = [cells[found.arm, pair[1]] - cells[pair] for pair in pairs if pair in cells]
        if found.difference is not None and len(apart) > 1:
            squares += statistics.variance(apart) * (len(apart) - 1)
            degrees += len(apart) - 1
    if not degrees:
        return None
    low, high = (math.sqrt(squares / stats.chi2.ppf(p, degrees)) for p in (0.975, 0.025))
    return Spread(deviation=math.sqrt(squares / degrees), low=low, high=high, degrees=degrees)


def seeds_needed(deviation: float, difference: float, *, comparisons: int = 1) -> int:
    """Fewest pairs with which a two-sided paired t test sees `difference` with chance `POWER`.

    Args:
      deviation: standard deviation of paired differences.
      difference: the true one, in the same unit.
      comparisons: primary ones that share `LEVEL` (Bonferroni).

    Raises:
      ValueError: 1,000 pairs are not enough.
    """
    from scipy import stats

    for pairs in range(2, _MOST + 1):
        edge = stats.t.ppf(1 - LEVEL / comparisons / 2, pairs - 1)
        shift = abs(difference) / deviation * math.sqrt(pairs)
        seen = stats.nct.sf(edge, pairs - 1, shift) + stats.nct.cdf(-edge, pairs - 1, shift)
        if seen >= POWER:
            return pairs
    raise ValueError(f"a difference of {difference} needs more than {_MOST} pairs")


def table(
    records: Sequence[Record],
    differences: Sequence[float] = (0.04, 0.02, 0.01),
    comparisons: Sequence[int] = (1, 3, 6),
) -> Table | None:
    """Seeds for each difference and number of comparisons; None without two pairs of any arm."""
    found = spread(records)
    if found is None:
        return None
    title = (
        f"Seeds needed to tell a difference from zero ({POWER:.0%} power, {LEVEL:.0%} level): "
        f"paired differences spread by {found.deviation:.4f} nats ({found.low:.4f} to "
        f"{found.high:.4f}, {found.degrees} degrees of freedom)"
    )
    nouns = (f"{n} comparison{'s' * (n > 1)}" for n in comparisons)
    result = output.table("nats per token", *nouns, title=title)
    for difference in differences:
        needed = [seeds_needed(found.deviation, difference, comparisons=n) for n in comparisons]
        result.add_row(f"{difference:g}", *map(str, needed))
    return result

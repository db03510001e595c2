"""Does the gain of a taper fade with scale? A line through paired differences over compute.

Each pair (an arm and its baseline with equal seed, size and length) is a point: the difference of
their held-out losses, in nats per token, over log10 of the training FLOPs of each.
A least-squares line goes through the points of a taper; intervals are Student's t at 95%. Past the
largest model that was trained, the line is an extrapolation, and what it says there is printed
with how far that is.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from tlm_jax import output
from tlm_jax.analysis.sweep_report import Estimate, Record
from tlm_jax.config import UserError

PAPER_PARAMETERS, PAPER_TOKENS = 440e6, 30e9
PAPER_FLOPS = 6 * PAPER_PARAMETERS * PAPER_TOKENS
"""The paper's smallest model (arXiv 2606.23670), by 6 N D."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A pair of runs."""

    taper: str
    parameters: int
    """Of each of the two, embeddings included."""
    tokens: int
    flops: float
    """Of the training of each of the two."""
    difference: float
    """Held-out loss minus the baseline's, in nats per token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """Difference = gain + slope * log10(flops / center)."""

    taper: str
    pairs: int
    center: float
    """Geometric mean of the FLOPs."""
    most: float
    """Most FLOPs of any point."""
    gain: Estimate
    slope: Estimate
    """Nats per token for ten times the FLOPs."""
    deviation: float
    """Of points from the line."""
    spread: float
    """Sum of squares of log10(flops) about its mean."""

    def at(self, flops: float) -> Estimate:
        """The line's mean at the given FLOPs."""
        from scipy import stats  # slow to import

        away = math.log10(flops / self.center)
        reach = stats.t.ppf(0.975, self.pairs - 2) * self.deviation
        return Estimate(
            mean=self.gain.mean + self.slope.mean * away,
            half_width=reach * math.sqrt(1 / self.pairs + away**2 / self.spread),
        )


def points(records: Sequence[Record]) -> list[Point]:
    """All pairs, in the order of their compute."""
    cells = {(r["arm"], r["seed"]): r for r in records}
    found = []
    for record in records:
        other = cells.get((record["baseline"], record["seed"]))
        if other is None or other is record:
            continue
        taper = record["config"]["model"]["taper"]
        ends = (
            f" {taper['start']:g} to {taper['end']:g}"
            if taper["schedule"] in ("cosine", "linear", "sigmoid")
            else ""
        )
        budget = record["budget"]
        found.append(
            Point(
                taper=f"{taper['schedule']}{ends}",
                parameters=budget["parameters"],
                tokens=budget["tokens"],
                flops=float(budget["FLOPs a token"] * budget["tokens"]),
                difference=record["final"]["loss"] - other["final"]["loss"],
            )
        )
    return sorted(found, key=lambda point: point.flops)


def fit(found: Sequence[Point]) -> Line:
    """The line through the points of one taper.

    Raises:
      UserError: fewer than three points, or all of one compute.
    """
    x = np.log10([point.flops for point in found])
    if len(found) < 3 or np.ptp(x) < 1e-6:
        raise UserError("a line needs three pairs of runs, and two amounts of compute")
    from scipy import stats  # slow to import

    center = float(x.mean())
    line = stats.linregress(x - center, [point.difference for point in found])
    reach = float(stats.t.ppf(0.975, len(found) - 2))
    spread = float(((x - center) ** 2).sum())
    return Line(
        taper=found[0].taper,
        pairs=len(found),
        center=10**center,
        most=found[-1].flops,
        gain=Estimate(mean=line.intercept, half_width=reach * line.intercept_stderr),
        slope=Estimate(mean=line.slope, half_width=reach * line.stderr),
        deviation=line.stderr * math.sqrt(spread),
        spread=spread,
    )


def markdown(sweeps: Sequence[Sequence[Record]]) -> str:
    """A table of the differences by size and length, and a sentence for the line of each taper.

    Args:
      sweeps: pairs are made within each; tapers that the first one lacks are left out.
    """
    tapers = list(dict.fromkeys(point.taper for point in points(sweeps[0])))
    if not tapers:
        raise UserError("there are no pairs: arms of a ladder need baselines with equal seeds")
    found = [point for records in sweeps for point in points(records) if point.taper in tapers]
    found.sort(key=lambda point: point.flops)
    scales = list(dict.fromkeys((point.parameters, point.tokens, point.flops) for point in found))
    header = ["parameters", "tokens", "FLOPs", "pairs", *tapers]
    lines = []
    for parameters, tokens, flops in scales:
        here = [p for p in found if (p.parameters, p.tokens) == (parameters, tokens)]
        by_taper = [[p.difference for p in here if p.taper == taper] for taper in tapers]
        cells = [Estimate.of(values).text(4) if values else "" for values in by_taper]
        pairs = "/".join(str(len(values)) for values in by_taper)
        lines.append([f"{parameters:,}", f"{tokens:,}", f"{flops:.1e}", pairs, *cells])
    table = output.markdown_table(header, lines)
    sentences = [_sentence(fit([p for p in found if p.taper == taper])) for taper in tapers]
    return (
        f"{table}\n\nHeld-out loss minus the baseline's, in nats per token; ± is the 95% interval "
        "of a mean over seeds (Student's t).\n\n" + "\n".join(f"- {one}" for one in sentences)
    )


def _sentence(line: Line) -> str:
    paper = line.at(PAPER_FLOPS)
    beyond = PAPER_FLOPS / line.most
    return (
        f"{line.taper}: {line.gain.text(4)} at {line.center:.1e} FLOPs, {line.slope.text(4)} for "
        f"ten times the FLOPs ({line.pairs} pairs). If the line went on to the paper's 440M "
        f"parameters and 30B tokens, {beyond:,.0f} times the most that was trained, it would say "
        f"{paper.text(3)} there."
    )

"""What a sweep found: arms against their baseline, seed by seed, in tables.

A difference is taken between cells of one seed (equal order of data), and the interval is that of
the mean of those differences (Student's t, 95%).
"""

import dataclasses
import itertools
import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from tlm_jax import files, output
from tlm_jax.config import UserError

Record = dict[str, Any]
LEVEL = 0.05
"""Chance of a false alarm, of all primary comparisons together."""
_WIDE = 110
"""Columns of a terminal with room for a row in one line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Mean over seeds."""

    mean: float
    half_width: float | None
    """Of the interval, 95% unless said otherwise; None for a single seed."""

    @classmethod
    def of(cls, values: Sequence[float], level: float = LEVEL) -> "Estimate":
        """From one value per seed; `level` is the chance that the interval misses the mean."""
        count = len(values)
        if count < 2:
            return cls(mean=values[0], half_width=None)
        from scipy import stats  # slow to import

        reach = float(stats.t.ppf(1 - level / 2, count - 1))
        deviation = statistics.stdev(values) / math.sqrt(count)
        return cls(mean=statistics.fmean(values), half_width=reach * deviation)

    def text(self, digits: int, sign: str = "+") -> str:
        """ "+0.012 ± 0.003"."""
        spread = "" if self.half_width is None else f" ± {self.half_width:.{digits}f}"
        return f"{self.mean:{sign}.{digits}f}{spread}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """An arm over its seeds."""

    arm: str
    baseline: str
    records: tuple[Record, ...]
    """One per seed."""
    losses: Estimate
    """Nats per token on held-out text at the end."""
    difference: Estimate | None
    """Minus the baseline's with the same seeds; None for the baseline itself."""
    perplexity_ratio: float | None
    """exp of the mean difference."""
    pairs: int
    """Seeds that both have."""
    speed: Estimate | None
    """Share of the tokens after which the loss is below the baseline's final loss; an arm that
    does not reach it has none."""

    @property
    def seeds(self) -> list[int]:
        """Those that have a result."""
        return [record["seed"] for record in self.records]


def read(path: pathlib.Path) -> list[Record]:
    """The results of a sweep: a file of JSON lines, or the folder of the sweep.

    Raises:
      UserError: there are none, or a value does not match its checksum.
    """
    file = path / "results.jsonl" if path.is_dir() else path
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
        records = [(n, json.loads(line)) for n, line in enumerate(lines, 1) if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file} holds no results of a sweep: {error}") from None
    if not records or not all(isinstance(one, dict) and "arm" in one for _, one in records):
        raise UserError(f"{file} holds no results of a sweep")
    return [files.verified(one, f"{file}, line {number}") for number, one in records]


def findings(records: Sequence[Record]) -> list[Finding]:
    """Every arm, in the order of the sweep."""
    cells = {(r["arm"], r["seed"]): r for r in records}
    arms = dict.fromkeys(r["arm"] for r in sorted(records, key=lambda r: (r["order"], r["seed"])))
    found = []
    for arm in arms:
        mine = [r for r in records if r["arm"] == arm]
        mine.sort(key=lambda r: r["seed"])
        baseline = mine[0]["baseline"]
        pairs = [
            (r, cells[baseline, r["seed"]])
            for r in mine
            if arm != baseline and (baseline, r["seed"]) in cells
        ]
        apart = [r["final"]["loss"] - other["final"]["loss"] for r, other in pairs]
        reached = [reaches(r, other["final"]["loss"]) for r, other in pairs]
        difference = Estimate.of(apart) if apart else None
        found.append(
            Finding(
                arm=arm,
                baseline=baseline,
                records=tuple(mine),
                losses=Estimate.of([r["final"]["loss"] for r in mine]),
                difference=difference,
                perplexity_ratio=math.exp(difference.mean) if difference else None,
                pairs=len(pairs),
                speed=None
                if not reached or None in reached
                else Estimate.of([r for r in reached if r is not None]),
            )
        )
    return found


def reaches(record: Record, loss: float) -> float | None:
    """Share of the steps after which held-out loss is at most `loss`; None if it never is.

    Between evaluations the loss is taken to fall in a straight line.
    """
    points = record["validation"]
    end = points[-1][0]
    for (step, before), (later, after) in itertools.pairwise(points):
        if after <= loss:
            share = 1.0 if before <= after else (before - loss) / (before - after)
            return (step + (later - step) * max(0.0, share)) / end
    return None


HEADER = (
    "arm",
    "seeds",
    "loss",
    "perplexity",
    "loss minus baseline",
    "perplexity ratio",
    "tokens to match",
)


def rows(found: Sequence[Finding]) -> list[list[str]]:
    """One row per arm, under `HEADER`; the difference is negative where the arm is better."""
    return [
        [
            f.arm,
            str(len(f.records)),
            f.losses.text(4, ""),
            f"{math.exp(f.losses.mean):.3f}",
            f.difference.text(4) if f.difference else "",
            f"{f.perplexity_ratio:.4f}" if f.perplexity_ratio else "",
            "" if f.difference is None else f.speed.text(3, "") if f.speed else "not reached",
        ]
        for f in found
    ]


def table(records: Sequence[Record], width: int = _WIDE) -> Table:
    """The same for a terminal of so many columns; a narrow one has more lines in each row."""

    def folded(cell: str) -> str:
        return cell if width >= _WIDE else cell.replace(" ± ", "\n± ").replace("not ", "not\n")

    arm, *numbers = HEADER
    names = numbers if width >= _WIDE else (name.replace(" ", "\n") for name in numbers)
    result = output.table(arm, *names, title=records[0]["sweep"])
    for arm, *cells in rows(findings(records)):
        result.add_row(arm, *map(folded, cells))
    return result


def markdown(records: Sequence[Record]) -> str:
    """The table, and what was held equal."""
    table = output.markdown_table(HEADER, rows(findings(records)))
    return f"{table}\n\n{primary(records)}{conditions(records)}"


def primary(records: Sequence[Record]) -> str:
    """The primary comparisons of the sweep, at a level that they share (Bonferroni), or nothing."""
    pairs = [tuple(pair) for pair in records[0].get("primary", ())]
    chosen_on = records[0].get("chosen_on", ())
    cells = {(r["arm"], r["seed"]): r["final"]["loss"] for r in records}
    best = {
        name: _best(cells, arms, chosen_on) for name, arms in records[0].get("best_of", {}).items()
    }
    lines = []
    for names in pairs:
        one, other = (best.get(name, name) for name in names)
        used_up = chosen_on if set(names) & set(best) else ()
        seeds = [s for arm, s in cells if arm == one and (other, s) in cells and s not in used_up]
        if seeds:
            apart = [cells[one, seed] - cells[other, seed] for seed in seeds]
            text = Estimate.of(apart, LEVEL / len(pairs)).text(4)
            noun = "pair" if len(seeds) == 1 else "pairs"
            choice = ""
            if used_up:
                by = f"seed{'s' * (len(used_up) > 1)} {' and '.join(map(str, used_up))}"
                choice = f"; {one!r} and {other!r}, chosen on {by}"
            lines.append(f"- {names[0]} minus {names[1]}: {text} ({len(seeds)} {noun}{choice})")
    if not lines:
        return ""
    share = f"{1 - LEVEL / len(pairs):.1%} intervals, so that together they err in 5% of studies"
    return f"Primary comparisons ({share}):\n\n" + "\n".join(lines) + "\n\n"


def _best(
    losses: Mapping[tuple[str, int], float], arms: Sequence[str], seeds: Sequence[int]
) -> str | None:
    """The arm of the lowest mean loss over these seeds; None if one of their cells is missing."""
    if not all((arm, seed) in losses for arm in arms for seed in seeds):
        return None
    return min(arms, key=lambda arm: statistics.fmean(losses[arm, seed] for seed in seeds))


def conditions(records: Sequence[Record]) -> str:
    """One paragraph: budget, data, and how the intervals are made."""
    budgets = {json.dumps(r["budget"], sort_keys=True): r["budget"] for r in records}
    each = "; ".join(
        ", ".join(f"{value:,} {what}" for what, value in one.items()) for one in budgets.values()
    ).replace("FLOPs a token", "FLOPs per token")  # records keep the name that they were made with
    baselines = sorted({r["baseline"] for r in records})
    versions = {", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in records}
    machines = {r["machine"] for r in records if "machine" in r}  # older records have none
    return (
        f"Held-out loss in nats per token. Each cell: {each}. Baseline: {', '.join(baselines)}. "
        "Differences are paired by seed (parameters and order of data); ± is the 95% interval of "
        "the mean over seeds (Student's t). Tokens to match: the share of the tokens after which "
        "the loss equals the baseline's final loss. "
        f"{'; '.join([*sorted(machines), *sorted(versions)])}."
    )


def replace(page: str, name: str, text: str) -> str:
    """The page with `text` between the marks `<!-- name -->` and `<!-- end name -->`.

    Raises:
      UserError: the page has no such marks.
    """
    start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    if start not in page or end not in page:
        raise UserError(f"the page has no marks {start} and {end}")
    before, rest = page.split(start, 1)
    _, after = rest.split(end, 1)
    return f"{before}{start}\n{text}\n{end}{after}"

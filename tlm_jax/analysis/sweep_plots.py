"""Pictures of a sweep, and one HTML page that holds them all."""

import base64
import html
import math
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tlm_jax import files
from tlm_jax.analysis import sweep_report
from tlm_jax.analysis.style import EVAL, GRID, INK, MUTED, WIDE, Path, house_figure
from tlm_jax.analysis.sweep_report import Finding, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = (WIDE, EVAL, "#2f855a", "#805ad5", "#b7791f", "#4fa3c7", "#c53078", INK)
_LINES, _MARKERS = ("-", "--", "-."), "os^Dv"
"""With the colours they tell arms apart in print, too."""


def _color(index: int) -> str:
    return _COLORS[index % len(_COLORS)]


def _line(index: int) -> dict[str, Any]:
    """How the line of an arm looks."""
    return {
        "color": _color(index),
        "linestyle": _LINES[index % len(_LINES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 4,
        "linewidth": 1.5,
    }


def plot_widths(found: Sequence[Finding], path: Path) -> None:
    """The widths of every arm as a wedge, layers upwards, all on one scale."""
    columns = min(4, len(found))
    lines = math.ceil(len(found) / columns)
    with house_figure(path, figsize=(2.3 * columns, 2.2 * lines)) as figure:
        panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
        reach = max(max(f.records[0]["widths"]) for f in found) / 2
        for axes in panels:
            axes.set_axis_off()
        for index, (axes, f) in enumerate(zip(panels, found, strict=False)):
            for layer, width in enumerate(f.records[0]["widths"]):
                axes.barh(layer, width, left=-width / 2, height=0.8, color=_color(index))
            axes.set_title(f.arm, loc="center", fontsize=9)
            axes.set_xlim(-1.05 * reach, 1.05 * reach)
        figure.supxlabel("MLP width of each layer; the first is at the bottom", fontsize=9)


def plot_differences(found: Sequence[Finding], path: Path) -> None:
    """Each arm's loss minus its baseline's: one dot per seed, the mean, and its 95% interval."""
    shown = [f for f in found if f.difference]
    with house_figure(path, figsize=(7.5, 0.9 + 0.45 * len(shown))) as figure:
        axes = figure.subplots()
        axes.use_sticky_edges = False  # intervals end inside
        for place, f in enumerate(reversed(shown)):
            base = {r["seed"]: r for g in found if g.arm == f.baseline for r in g.records}
            dots = [
                r["final"]["loss"] - base[r["seed"]]["final"]["loss"]
                for r in f.records
                if r["seed"] in base
            ]
            assert f.difference is not None
            color = WIDE if f.difference.mean <= 0 else EVAL
            if f.difference.half_width is not None:
                low = f.difference.mean - f.difference.half_width
                axes.barh(
                    place, 2 * f.difference.half_width, left=low, height=0.5, color=color, alpha=0.2
                )
            axes.plot(dots, [place] * len(dots), "o", color=color, markersize=4)
            axes.plot([f.difference.mean] * 2, [place - 0.3, place + 0.3], color=color)
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_yticks(range(len(shown)), [f.arm for f in reversed(shown)])
        axes.set_xlabel("validation loss minus the baseline's (nats per token)")
        axes.grid(axis="x")


def plot_losses(found: Sequence[Finding], path: Path) -> None:
    """Held-out loss against steps; below, minus the baseline's of equal seed, bands over seeds."""
    with house_figure(path, figsize=(8.0, 6.0)) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1])
        by_arm = {f.arm: {r["seed"]: dict(r["validation"]) for r in f.records} for f in found}
        for index, f in enumerate(found):
            curves, base = by_arm[f.arm], by_arm[f.baseline]
            _band(top, list(curves.values()), index, f.arm)
            apart = [
                {step: loss - base[seed][step] for step, loss in curve.items()}
                for seed, curve in curves.items()
                if seed in base and f.arm != f.baseline
            ]
            if apart:
                _band(bottom, apart, index, f.arm)
        bottom.axhline(0, color=MUTED, linewidth=1)
        # The first third would squeeze the rest.
        points = [r["validation"] for f in found for r in f.records]
        settled = [loss for curve in points for _, loss in curve[len(curve) // 3 :]]
        margin = 0.05 * (max(settled) - min(settled)) or 0.1
        top.set_ylim(min(settled) - margin, max(settled) + margin)
        top.set_ylabel("validation loss (nats per token)")
        bottom.set_ylabel("minus the baseline's")
        bottom.set_xlabel("step")
        bottom.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        figure.align_ylabels()
        top.legend(fontsize=8, ncols=2, handlelength=3.5)
        for axes in (top, bottom):
            axes.grid()


def _band(axes: "Axes", curves: Sequence[dict[int, float]], index: int, label: str) -> None:
    """Mean, least and most over seeds."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = [[curve[step] for curve in curves] for step in steps]
    low, high = list(map(min, values)), list(map(max, values))
    axes.fill_between(steps, low, high, color=_color(index), alpha=0.12, linewidth=0)
    axes.plot(steps, list(map(statistics.fmean, values)), label=label, **_line(index))


def plot_ratios(found: Sequence[Finding], path: Path) -> bool:
    """Loss against the first layer's width over the mean (the paper's U), one line per schedule.

    Returns:
      False, and nothing is drawn, where there are fewer than three ratios of one schedule.
    """
    lines: dict[str, dict[float, list[float]]] = {}
    for f in found:
        taper = f.records[0]["config"]["model"]["taper"]
        if taper["schedule"] in ("linear", "cosine", "sigmoid"):
            ratios = lines.setdefault(taper["schedule"], {})
            ratios.setdefault(taper["start"], []).extend(r["final"]["loss"] for r in f.records)
    uniform = [r["final"]["loss"] for f in found if f.arm == f.baseline for r in f.records]
    if max(map(len, lines.values()), default=0) < 3 or not uniform:
        return False
    with house_figure(path, figsize=(7.0, 4.2)) as figure:
        axes = figure.subplots()
        for index, (schedule, ratios) in enumerate(lines.items()):
            points = sorted((ratios | {1.0: uniform}).items())
            means = [statistics.fmean(v) for _, v in points]
            spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for _, v in points]
            aside = 0.006 * (index - (len(lines) - 1) / 2)  # so that bars do not cover each other
            axes.errorbar(
                [x + aside for x, _ in points],
                means,
                yerr=spread,
                capsize=3,
                label=schedule,
                **_line(index),
            )
        axes.axhline(statistics.fmean(uniform), color=MUTED, linestyle=(0, (5, 3)), linewidth=1)
        axes.set_xlabel("width of the first layer over the mean (1 is uniform)")
        axes.set_ylabel("validation loss (bars: deviation over seeds)")
        exp_and_log = np.exp, lambda x: np.log(np.maximum(x, 1e-9))  # it asks for log(0), too
        perplexity = axes.secondary_yaxis("right", functions=exp_and_log)
        perplexity.set_ylabel("perplexity")
        axes.legend(handlelength=3.5)
        axes.grid()
    return True


def plot_speed(found: Sequence[Finding], path: Path) -> bool:
    """Share of the tokens after which an arm reaches its baseline's final loss.

    Returns:
      False, and nothing is drawn, where no arm reaches it.
    """
    shown = [f for f in found if f.speed]
    if not shown:
        return False
    with house_figure(path, figsize=(7.5, 1.2 + 0.45 * len(shown))) as figure:
        axes = figure.subplots()
        means = [f.speed.mean for f in shown if f.speed][::-1]
        reach = [f.speed.half_width or math.nan for f in shown if f.speed][::-1]
        axes.barh(range(len(shown)), means, height=0.5, color=WIDE, alpha=0.8)
        axes.errorbar(means, range(len(shown)), xerr=reach, fmt="none", ecolor=INK, capsize=3)
        axes.axvline(1, color=MUTED, linewidth=1)
        axes.set_yticks(range(len(shown)), [f.arm for f in reversed(shown)])
        axes.set_xlabel("share of tokens to match the baseline's final loss (95% interval)")
        axes.set_xlim(0.0, 1.05 * np.nanmax([1.0, *means, *np.add(means, reach)]))
        axes.grid(axis="x")
    return True


PICTURES: dict[str, tuple[str, Callable[[Sequence[Finding], Path], Any]]] = {
    "widths": ("Width of each layer", plot_widths),
    "differences": ("Loss against the baseline", plot_differences),
    "losses": ("Loss curves", plot_losses),
    "speed": ("Learning speed", plot_speed),
    "ratios": ("Loss against the ratio", plot_ratios),
}


def draw(records: Sequence[Record], folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws what the results allow into `folder`; returns the files."""
    found = sweep_report.findings(records)
    paths = []
    for name, (_, plot) in PICTURES.items():
        path = folder / f"{name}.png"
        if plot(found, path) is not False:
            paths.append(path)
    return paths


def page(records: Sequence[Record], pictures: Sequence[pathlib.Path]) -> str:
    """Tables and pictures as one self-contained HTML page."""
    title = html.escape(records[0]["sweep"])
    rows = "\n".join(map(_row, sweep_report.rows(sweep_report.findings(records))))
    intro, _, comparisons = sweep_report.primary(records).strip().partition("\n\n")
    items = "".join(f"<li>{html.escape(line[2:])}</li>" for line in comparisons.splitlines())
    primary = f"<p>{html.escape(intro)}</p>\n<ul>{items}</ul>" if items else ""
    return f"""<!doctype html>
<!-- {files.MARK} -->
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: {INK}; max-width: 60rem; margin: 2rem auto;
        padding: 0 1rem }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }}
th, td {{ padding: .3rem .7rem; border-bottom: 1px solid {GRID}; text-align: right }}
th {{ vertical-align: bottom }}
td {{ white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0 }}
figure {{ margin: 1rem 0 2rem }}
figcaption {{ font-size: .9rem }}
img {{ max-width: 100% }}
</style>
</head>
<body>
<h1>{title}</h1>
<div class="wide">
<table>
<thead>{_row(sweep_report.HEADER, "th")}</thead>
<tbody>
{rows}
</tbody>
</table>
</div>
{primary}
<p>{html.escape(sweep_report.conditions(records))}</p>
{"".join(map(_figure, pictures))}</body>
</html>
"""


def _row(cells: Sequence[str], tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _figure(path: pathlib.Path) -> str:
    """A picture with its title, and what its function says of it below."""
    title, plot = PICTURES[path.stem]
    caption = html.escape((plot.__doc__ or title).splitlines()[0])
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f"<h2>{title}</h2>\n"
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">\n'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )

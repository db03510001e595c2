"""Pictures of a sweep, and one HTML page that holds them all."""

import base64
import html
import math
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tlm_jax import files
from tlm_jax.analysis import sweep_report
from tlm_jax.analysis.style import EVAL, GRID, INK, MUTED, NARROW, WIDE, Path, house_figure
from tlm_jax.analysis.sweep_report import Finding, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = (WIDE, EVAL, "#2f855a", "#805ad5", "#b7791f", NARROW, "#c53078", INK)


def _color(index: int) -> str:
    return _COLORS[index % len(_COLORS)]


def plot_widths(found: Sequence[Finding], path: Path) -> None:
    """The widths of every arm as a wedge, layers upwards, all on one scale."""
    columns = min(4, len(found))
    lines = -(-len(found) // columns)
    with house_figure(path, figsize=(2.3 * columns, 2.2 * lines)) as figure:
        panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat
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
        axes.grid(axis="x", color=GRID)
        axes.set_axisbelow(True)


def plot_losses(found: Sequence[Finding], path: Path) -> None:
    """Held-out loss against steps; below, minus the baseline's of equal seed, bands over seeds."""
    with house_figure(path, figsize=(8.0, 6.0)) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1])
        by_arm = {f.arm: {r["seed"]: dict(r["validation"]) for r in f.records} for f in found}
        for index, f in enumerate(found):
            curves, base = by_arm[f.arm], by_arm[f.baseline]
            _band(top, list(curves.values()), _color(index), f.arm)
            apart = [
                {step: loss - base[seed][step] for step, loss in curve.items()}
                for seed, curve in curves.items()
                if seed in base and f.arm != f.baseline
            ]
            if apart:
                _band(bottom, apart, _color(index), f.arm)
        bottom.axhline(0, color=MUTED, linewidth=1)
        # The first third would squeeze the rest.
        points = [r["validation"] for f in found for r in f.records]
        settled = [loss for curve in points for _, loss in curve[len(curve) // 3 :]]
        margin = 0.05 * (max(settled) - min(settled)) or 0.1
        top.set_ylim(min(settled) - margin, max(settled) + margin)
        top.set_ylabel("validation loss")
        bottom.set_ylabel("minus baseline")
        bottom.set_xlabel("step")
        top.legend(frameon=False, fontsize=8, ncols=2)
        for axes in (top, bottom):
            axes.grid(color=GRID)
            axes.set_axisbelow(True)


def _band(axes: "Axes", curves: Sequence[dict[int, float]], color: str, label: str) -> None:
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = [[curve[step] for curve in curves] for step in steps]
    axes.fill_between(
        steps, list(map(min, values)), list(map(max, values)), color=color, alpha=0.15
    )
    axes.plot(steps, list(map(statistics.fmean, values)), color=color, linewidth=1.5, label=label)


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
            axes.errorbar(
                [x for x, _ in points],
                means,
                yerr=spread,
                marker="o",
                markersize=4,
                capsize=3,
                color=_color(index),
                label=schedule,
            )
        axes.axhline(statistics.fmean(uniform), color=MUTED, linestyle=(0, (5, 3)), linewidth=1)
        axes.set_xlabel("width of the first layer over the mean (1 is uniform)")
        axes.set_ylabel("validation loss (bars: deviation over seeds)")
        axes.legend(frameon=False)
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
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
        reach = [f.speed.half_width or 0.0 for f in shown if f.speed][::-1]
        axes.barh(range(len(shown)), means, height=0.5, color=WIDE, alpha=0.8)
        axes.errorbar(means, range(len(shown)), xerr=reach, fmt="none", ecolor=INK, capsize=3)
        axes.axvline(1, color=MUTED, linewidth=1)
        axes.set_yticks(range(len(shown)), [f.arm for f in reversed(shown)])
        axes.set_xlabel("share of tokens to match the baseline's final loss (95% interval)")
        axes.set_xlim(0.0, 1.05)
        axes.grid(axis="x", color=GRID)
        axes.set_axisbelow(True)
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
    """Table and pictures as one self-contained HTML page."""
    found = sweep_report.findings(records)
    title = html.escape(records[0]["sweep"])
    cells = [sweep_report.HEADER, *sweep_report.rows(found)]
    table = "\n".join(
        "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in line) + "</tr>"
        for tag, line in zip(("th", *("td" for _ in cells[1:])), cells, strict=True)
    )
    images = "\n".join(
        f"<h2>{PICTURES[path.stem][0]}</h2>\n"
        f'<img alt="{PICTURES[path.stem][0]}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path in pictures
    )
    losses = ", ".join(f"{math.exp(f.losses.mean):.2f} ({html.escape(f.arm)})" for f in found)
    return f"""<!doctype html>
<!-- {files.MARK} -->
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: {INK}; max-width: 60rem; margin: 2rem auto;
        padding: 0 1rem }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .3rem .7rem; border-bottom: 1px solid {GRID}; text-align: right }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 100% }}
</style>
<h1>{title}</h1>
<p>Perplexity: {losses}.</p>
<table>
{table}
</table>
<p>{html.escape(sweep_report.conditions(records))}</p>
{images}
</html>
"""

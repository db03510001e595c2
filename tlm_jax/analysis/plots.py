"""Pictures of a taper and of a training run, as PNG files.

`python -m tlm_jax.analysis.plots docs/images/taper.png` draws the picture of the README.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tlm_jax import costs as costs_lib
from tlm_jax import files, storage
from tlm_jax import taper as taper_lib
from tlm_jax.analysis.plan import short_count
from tlm_jax.analysis.style import EVAL, INK, MUTED, NARROW, TRAIN, WIDE, Path, house_figure
from tlm_jax.config import ModelConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_plan(model: ModelConfig, path: Path) -> None:
    """Draws the MLP width of every layer against the uniform width.

    Args:
      model: the model; every block is a segment.
      path: the PNG to write; folders are made.
    """
    from matplotlib.ticker import MaxNLocator

    widths = model.mlp_widths
    stairs = model.segments
    parameters = costs_lib.model_costs(model, seq_len=1).parameters
    with house_figure(path, figsize=(8.0, 4.5)) as figure:
        axes = figure.subplots()
        for segment in stairs:
            # One block per segment, for one scan runs its layers; thin lines part those.
            layers = range(segment.start, segment.stop)
            left = [layer - (0.44 if layer == segment.start else 0.5) for layer in layers]
            right = [layer + (0.44 if layer == layers[-1] else 0.5) for layer in layers]
            axes.bar(
                left,
                [widths[layer] for layer in layers],
                width=[b - a for a, b in zip(left, right, strict=True)],
                align="edge",
                color=[_shade(widths[layer], widths) for layer in layers],
                zorder=2,
            )
            axes.vlines(
                left[1:], 0, [widths[x] for x in layers[1:]], color="white", linewidth=0.5, zorder=3
            )
        _uniform_line(axes, model.mlp_width, len(widths))
        axes.set_xlim(-0.7, len(widths) - 0.3)
        axes.set_ylim(0, max(*widths, model.mlp_width) * 1.12)
        axes.set_xlabel("layer (0 reads the embeddings)")
        axes.set_ylabel("MLP width")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.grid(axis="y")
        _label_ends(axes, widths)
        noun = "segment" if len(stairs) == 1 else "segments"
        axes.set_title(
            f"{short_count(parameters)} parameters, {len(widths)} layers in {len(stairs)} {noun}",
            pad=22,
        )
        axes.text(
            0,
            1.03,
            f"sum of widths {sum(widths):,} = {len(widths)} x {model.mlp_width:,}, "
            "exactly that of the uniform model",
            transform=axes.transAxes,
            color=MUTED,
        )


def _uniform_line(axes: "Axes", width: int, layers: int) -> None:
    axes.axhline(width, color=EVAL, linestyle=(0, (5, 3)), linewidth=1.6, zorder=4)
    axes.annotate(
        f"uniform: {width:,}",
        (layers - 0.4, width),
        xytext=(0, 5),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=EVAL,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85},
        zorder=5,
    )


def _label_ends(axes: "Axes", widths: Sequence[int]) -> None:
    """Writes the first and the last width over their bars."""
    for layer, side in ((0, "left"), (len(widths) - 1, "right")):
        if layer and widths[layer] == widths[0]:
            continue
        axes.annotate(
            f"{widths[layer]:,}",
            (layer - 0.43 if side == "left" else layer + 0.43, widths[layer]),
            xytext=(0, 4),
            textcoords="offset points",
            ha=side,
            zorder=5,
        )


def plot_taper(path: Path, *, num_layers: int = 24, base_width: int = 4096) -> None:
    """Draws the idea: a uniform and a tapered stack side by side, layers upwards.

    Args:
      path: the PNG to write.
      num_layers: depth of both.
      base_width: mean MLP width of both; the taper is cosine, 1.5 to 0.5.
    """
    uniform = taper_lib.layer_widths(num_layers, base_width, "uniform")
    tapered = taper_lib.layer_widths(num_layers, base_width)
    with house_figure(path, figsize=(8.4, 4.6)) as figure:
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        reach = max(tapered) * 0.56
        for axes, widths, name in zip(
            panels, (uniform, tapered), ("uniform", "tapered"), strict=True
        ):
            for layer, width in enumerate(widths):
                axes.barh(layer, width, left=-width / 2, height=0.8, color=_shade(width, tapered))
            for layer in (0, num_layers - 1):
                axes.annotate(
                    f"{widths[layer]:,}",
                    (widths[layer] / 2, layer),
                    xytext=(5, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=9,
                    color=MUTED,
                )
            axes.set_title(name, loc="center")
            axes.set_xlim(-reach, reach * 1.12)
            axes.set_axis_off()
        dashed = {"color": EVAL, "linestyle": (0, (5, 3)), "linewidth": 1.3}
        for x in (-base_width / 2, base_width / 2):
            panels[1].plot([x, x], [-0.6, num_layers - 0.4], **dashed)
        panels[1].text(
            base_width / 2 + reach * 0.03,
            num_layers - 1.6,
            "uniform width",
            color=EVAL,
            fontsize=9,
            va="center",
        )
        for layer, words in ((0, "first layer"), (num_layers - 1, "last layer")):
            panels[0].text(-reach * 1.02, layer, words, ha="right", va="center", color=MUTED)
        panels[0].annotate(
            "",
            (-reach * 1.2, num_layers - 2.2),
            xytext=(-reach * 1.2, 1.2),
            arrowprops={"arrowstyle": "->", "color": MUTED},
            annotation_clip=False,
        )
        figure.supxlabel(
            f"MLP width of {num_layers} layers. Both stacks: {sum(tapered):,} hidden units, "
            "the same parameters, the same FLOPs.",
            fontsize=10,
            color=INK,
        )


def plot_curves(metrics: Path, path: Path) -> None:
    """Draws the losses and the learning rate of a run.

    Args:
      metrics: JSON lines with `step`, `kind` ("train" or "eval"), `loss` in nats and, for
        train, `tokens` and `learning_rate`. Of lines with the same kind and step the last
        counts (a resumed run repeats steps); an incomplete last line is skipped.
      path: the PNG to write.

    Raises:
      ValueError: the file has no finite loss.
    """
    train, evaluation = (series(metrics, kind) for kind in ("train", "eval"))
    if not train and not evaluation:
        raise ValueError(f"{metrics} has no losses to draw")
    with house_figure(path, figsize=(8.0, 5.2)) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        if train:
            steps = [row["step"] for row in train]
            losses = [row["loss"] for row in train]
            faint = len(train) > 60
            if not faint:
                top.plot(steps, losses, color=WIDE, linewidth=1.4, label="training")
            else:
                top.plot(steps, losses, color=TRAIN, linewidth=1)
                smooth = _smooth(losses)
                top.plot(steps, smooth, color=WIDE, linewidth=1.8, label="training (smoothed)")
        if evaluation:
            last = evaluation[-1]
            top.plot(
                [row["step"] for row in evaluation],
                [row["loss"] for row in evaluation],
                color=EVAL,
                marker="o",
                markersize=4.5,
                linewidth=1.6,
                label="validation",
            )
            top.annotate(
                f"{last['loss']:.3f}",
                (last["step"], last["loss"]),
                xytext=(0, 8),
                textcoords="offset points",
                ha="right",
                color=EVAL,
            )
        top.set_ylabel("loss (nats per token)")
        top.legend()
        # The first steps would squeeze the rest of the curve.
        shown = [row["loss"] for row in (*train[len(train) // 50 :], *evaluation)]
        margin = 0.06 * (max(shown) - min(shown)) or 0.1
        top.set_ylim(min(shown) - margin, max(shown) + margin)
        _token_scale(top, train)
        rates = [row for row in train if "learning_rate" in row]
        bottom.plot(
            [row["step"] for row in rates],
            [row["learning_rate"] for row in rates],
            color=INK,
            linewidth=1.4,
        )
        bottom.set_ylim(bottom=0)
        bottom.set_ylabel("learning rate")
        bottom.set_xlabel("step")
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        bottom.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        for axes in (top, bottom):
            axes.grid()
        figure.align_ylabels()


def plot_arms(panels: dict[str, dict[str, list[tuple[int, float]]]], path: Path) -> None:
    """Draws validation losses of paired runs, one panel per pair, all on one scale.

    Args:
      panels: for each title the arms, at most two; for each arm its (step, loss) points.
      path: the PNG to write.
    """
    with house_figure(path, figsize=(10.0, 3.4)) as figure:
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (title, arms) in zip(all_axes, panels.items(), strict=True):
            for (arm, points), color, line in zip(
                arms.items(), (EVAL, WIDE), ("-", "--"), strict=False
            ):
                steps, losses = zip(*points, strict=True)
                axes.plot(
                    steps,
                    losses,
                    marker="o",
                    markersize=3.5,
                    linewidth=1.5,
                    label=f"{arm}  {losses[-1]:.3f}",
                    color=color,
                    linestyle=line,
                )
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.legend()
            axes.grid()
        all_axes[0].set_ylabel("validation loss (nats per token)")


def series(metrics: Path, kind: str) -> list[dict[str, Any]]:
    """The finite rows of one kind, by step; the last line of a step wins.

    Damaged lines are left out with a note (see `files.read_lines`).

    Raises:
      UserError: the file cannot be read.
    """
    rows: dict[int, dict[str, Any]] = {}
    for row in files.read_lines(storage.path(metrics)):
        if row.get("kind") == kind and "step" in row:
            rows[row["step"]] = row
    finite = (row for row in rows.values() if abs(row.get("loss") or float("nan")) < float("inf"))
    return sorted(finite, key=lambda row: row["step"])


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over a centred window of about a thirtieth of the run."""
    half = max(len(values) // 60, 1)
    last = len(values) - 1
    # Narrower towards the ends, so that it stays centred and the ends are not biased.
    reach = [min(half, i, last - i) for i in range(len(values))]
    return [sum(values[i - r : i + r + 1]) / (2 * r + 1) for i, r in enumerate(reach)]


def _token_scale(axes: "Axes", train: Sequence[dict[str, Any]]) -> None:
    """Adds tokens seen as a second scale on top, as they are proportional to steps."""
    last = train[-1] if train else {}
    if not last.get("tokens") or not last["step"]:
        return
    per_step = last["tokens"] / last["step"]
    scale = axes.secondary_xaxis("top", functions=(lambda x: x * per_step, lambda x: x / per_step))
    scale.set_xlabel("tokens")
    scale.xaxis.set_major_formatter(lambda value, _: short_count(value))


def _shade(width: float, widths: Sequence[int]) -> tuple[float, float, float, float]:
    """Darker for wider layers."""
    from matplotlib.colors import LinearSegmentedColormap

    low, high = min(widths), max(widths)
    colors = LinearSegmentedColormap.from_list("widths", [NARROW, WIDE])
    return colors(0.5 if low == high else (width - low) / (high - low))


if __name__ == "__main__":
    plot_taper(sys.argv[1])

"""Pictures of evaluations, as PNG files."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tlm_jax.analysis.style import EVAL, MUTED, TRAIN, WIDE, Path, house_figure


def plot_alignment(
    rho: Mapping[str, Sequence[float]], pearson: Mapping[str, float], title: str, path: Path
) -> None:
    """Draws the mean cosine of what a layer or its MLP adds with the stream, over depth.

    Args:
      rho: `alignment.REFERENCES`: one value per layer.
      pearson: correlation with depth, by the same names.
      title: of the picture.
      path: the PNG to write.
    """
    from matplotlib.ticker import MaxNLocator

    names = {
        "h": "MLP's output, stream before the layer",
        "z": "MLP's output, stream before the MLP",
        "block": "layer's output, stream before the layer",
    }
    with house_figure(path, figsize=(8.0, 4.2)) as figure:
        axes = figure.subplots()
        for (name, words), color in zip(names.items(), (WIDE, EVAL, TRAIN), strict=True):
            for key, line, which in (
                (f"{name}_after_first", "-", ", without position 0"),
                (name, ":", ""),
            ):
                axes.plot(
                    rho[key],
                    line,
                    color=color,
                    linewidth=1.6,
                    marker="o" if line == "-" else None,
                    markersize=4,
                    label=f"{words}{which}: r = {pearson[key]:+.2f}",
                )
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.set_title(title)
        axes.set_xlabel("layer")
        axes.set_ylabel("mean cosine with the stream")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=9)
        axes.grid()


def plot_needles(answers: Sequence[dict[str, Any]], path: Path) -> None:
    """Share of needles found by depth and length, a panel for each variant.

    Args:
      answers: of `evaluation.needle.run`.
      path: where to write the PNG.
    """
    variants = list(dict.fromkeys(a["variant"] for a in answers))
    lengths = sorted({a["length"] for a in answers})
    depths = sorted({a["depth"] for a in answers})
    with house_figure(path, (1.8 + 3.2 * len(variants), 3.6)) as figure:
        all_axes = figure.subplots(1, len(variants), sharey=True, squeeze=False)[0]
        for axes, variant in zip(all_axes, variants, strict=True):
            found: dict[tuple[float, int], list[float]] = {}
            for a in answers:
                if a["variant"] == variant:
                    found.setdefault((a["depth"], a["length"]), []).append(a["score"])
            share = [
                [sum(c) / len(c) if (c := found.get((d, n))) else math.nan for n in lengths]
                for d in depths
            ]
            image = axes.imshow(share, vmin=0, vmax=1, cmap="Blues", aspect="auto")
            total = [c for of_cell in found.values() for c in of_cell]
            axes.set_title(f"{variant}: {sum(total) / len(total):.0%}")
            axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
            axes.set_xlabel("tokens")
        all_axes[0].set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
        all_axes[0].set_ylabel("depth of the needle")
        figure.colorbar(image, ax=list(all_axes), label="found")

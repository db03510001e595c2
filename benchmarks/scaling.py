"""Time of a train step by tokens in a batch, depth and context length.

    python -m benchmarks.scaling

The first shape of `step_time`, tapered, with one of the three changed at a time: 512 to 8,192
tokens in rows of 256, 3 to 24 layers, and 4,096 tokens in rows of 256 to 4,096. The steps of a
series take turns, a process each. The table goes to docs/speed.md, the picture beside it.
"""

import argparse
import dataclasses
import pathlib
import tempfile

from benchmarks import race, report
from benchmarks.step_time import ROOT, SHAPES, Folder, describe, flops_a_step
from tlm_jax.analysis.style import GRID, WIDE, house_figure
from tlm_jax.config import RunConfig

PICTURE = ROOT / "docs" / "images" / "step_scaling.png"
Series = dict[int, RunConfig]


def with_data(rows: int, length: int) -> RunConfig:
    """The base with another batch."""
    data = dataclasses.replace(SHAPES[0].data, batch_size=rows, seq_len=length)
    training = dataclasses.replace(SHAPES[0].training, loss_chunk=min(128, length))
    return dataclasses.replace(SHAPES[0], data=data, training=training)


def with_layers(number: int) -> RunConfig:
    """The base with another depth."""
    model = dataclasses.replace(SHAPES[0].model, num_layers=number)
    return dataclasses.replace(SHAPES[0], model=model)


SERIES: dict[str, Series] = {
    "tokens per batch": {rows * 256: with_data(rows, 256) for rows in (2, 4, 8, 16, 32)},
    "layers": {number: with_layers(number) for number in (3, 6, 12, 24)},
    "context": {
        length: with_data(4096 // length, length) for length in (256, 512, 1024, 2048, 4096)
    },
}
"""What is changed: its value and the config."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    rows, lines = [], {}
    with tempfile.TemporaryDirectory() as path:
        folder = Folder(path)
        for name, series in SERIES.items():
            arms = {str(value): folder.ours(config) for value, config in series.items()}
            found = race.run(arms, options.steps)
            lines[name] = {value: found[str(value)].median for value in series}
            for value, config in series.items():
                one = found[str(value)]
                tokens = config.data.batch_size * config.data.seq_len
                rows.append(
                    [
                        name,
                        f"{value:,}",
                        f"{one.median * 1e3:.0f}",
                        one.middle_half,
                        f"{one.median / tokens * 1e6:.0f}",
                        f"{flops_a_step(config) / one.median / 1e9:.0f}",
                        f"{one.said['peak_mib']:,.0f}",
                    ]
                )
    draw(lines, PICTURE)
    header = ["changed", "to", "ms", "middle half", "us a token", "GFLOP/s", "peak MiB"]
    report.publish(
        "scaling",
        f"{report.table(header, rows)}\n\n{describe(SHAPES[0])}, tapered, but for what a row says "
        f"(contexts: 4,096 tokens per batch). Medians of {options.steps} alternating steps, a "
        f"process each; FLOPs with attention over all keys. {report.machine()}.",
    )


def draw(lines: dict[str, dict[int, float]], path: pathlib.Path) -> None:
    """Milliseconds against what is changed, a panel each."""
    with house_figure(path, figsize=(10, 3.2)) as figure:
        panels = figure.subplots(1, len(lines))
        for axes, (name, times) in zip(panels, lines.items(), strict=True):
            axes.plot(list(times), [1e3 * seconds for seconds in times.values()], "o-", color=WIDE)
            axes.set_xlabel(name)
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.grid(color=GRID)
        panels[0].set_ylabel("ms per step")


if __name__ == "__main__":
    main()

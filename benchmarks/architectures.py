"""Trains each architecture at the tiny size, tapered and uniform, and draws the curves.

    python -m benchmarks.architectures [--runs runs/architectures] [--steps 300]

Eight runs one after the other, each `python train.py --config configs/tiny.py:NAME`; about an
hour and a half on two cores. A run that is complete is not repeated, one that was interrupted goes
on. Results are written to docs/results/architectures.json, and from there the table to
docs/architectures.md and the picture beside it (`--only-draw` does just that).
"""

import argparse
import json
import pathlib
import subprocess
import sys

from benchmarks import report
from tlm_jax import config_io, costs
from tlm_jax.analysis import plots
from tlm_jax.architectures import ARCHITECTURES

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architectures.md"
PICTURE = ROOT / "docs" / "images" / "architectures.png"
RESULTS = ROOT / "docs" / "results" / "architectures.json"
ARMS = {"tapered": (), "uniform": ("--model.taper.schedule", "uniform")}
TITLES = {
    "transformer": "Transformer",
    "gated_attention": "Gated Attention",
    "hope_attention": "Hope-attention",
    "titans": "Titans (MAG)",
}


def train(name: str, arm: str, folder: pathlib.Path, steps: int) -> list[tuple[int, float]]:
    """Runs, continues or finds a run; returns (step, validation loss) of its evaluations."""
    subprocess.run(
        [
            *(sys.executable, "train.py", "--config", f"configs/tiny.py:{name}"),
            *("--workdir", str(folder), "--training.num_steps", str(steps)),
            *("--training.eval_every", "50", "--training.checkpoint_every", "50", *ARMS[arm]),
        ],
        cwd=ROOT,
        check=True,
    )
    return [(row["step"], row["loss"]) for row in plots.series(folder / "metrics.jsonl", "eval")]


def publish() -> None:
    """Draws the curves and writes the table of the results that there are."""
    results = json.loads(RESULTS.read_text())
    curves, rows = {}, []
    for name, arms in results.items():
        config = config_io.load_config(ROOT / f"configs/tiny.py:{name}")
        parameters = costs.model_costs(config.model, config.data.seq_len).parameters
        first, last = ({arm: arms[arm][i][1] for arm in arms} for i in (0, -1))
        curves[TITLES[name]] = arms
        cells = [f"{first[a]:.3f} to {last[a]:.3f}" if a in arms else "not run" for a in ARMS]
        rows.append(
            [
                TITLES[name],
                f"{parameters:,}",
                *cells,
                f"{min(first[arm] - last[arm] for arm in arms):.2f}",
                f"{last['tapered'] - last['uniform']:+.4f}" if len(last) == 2 else "",
            ]
        )
    plots.plot_arms(curves, PICTURE)
    header = ["architecture", "parameters", *ARMS, "lower by at least", "tapered - uniform"]
    report.publish("architectures", report.table(header, rows), PAGE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs" / "architectures")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only-draw", action="store_true")
    options = parser.parse_args()
    if not options.only_draw:
        results: dict[str, dict[str, list[tuple[int, float]]]] = {}
        for name in ARCHITECTURES:
            for arm in ARMS:
                folder = options.runs.resolve() / f"{name}_{arm}"
                results.setdefault(name, {})[arm] = train(name, arm, folder, options.steps)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    publish()


if __name__ == "__main__":
    main()

"""Shapes of the width over depth at one budget (arXiv 2606.23670, its first and main experiments).

Command:   DATA=FOLDER tlm sweep configs/sweeps/shapes.py
Sizes:     FILE.py:medium takes configs/study.py:medium and the first three arms
Cost:      21 runs of configs/study.py, or 9 of medium (three seeds)
Expected:  docs/results.md

The paper gives no factors for its three groups; 1.5 for the heavy third is our choice.
"""

import pathlib

from tlm_jax import config_io
from tlm_jax.analysis.sweep import Arm, Sweep

STUDY = pathlib.Path(__file__).parents[1] / "study.py"


def curve(schedule: str, start: float, end: float) -> dict[str, object]:
    return {
        "model.taper.schedule": schedule,
        "model.taper.start": start,
        "model.taper.end": end,
    }


def heavy(third: str) -> dict[str, object]:
    return {
        "model.taper.schedule": "groups",
        "model.taper.heavy": third,
        "model.taper.start": 1.5,
    }


def get_sweep(size: str = "small") -> Sweep:
    main = (
        Arm(name="uniform", changes={"model.taper.schedule": "uniform"}),
        Arm(name="cosine 1.5 to 0.5", changes=curve("cosine", 1.5, 0.5)),
        Arm(name="reversed 0.5 to 1.5", changes=curve("cosine", 0.5, 1.5)),
        Arm(name="early-heavy", changes=heavy("early")),
    )
    others = (
        Arm(name="linear 1.5 to 0.5", changes=curve("linear", 1.5, 0.5)),
        Arm(name="middle-heavy", changes=heavy("middle")),
        Arm(name="late-heavy", changes=heavy("late")),
    )
    small = size == "small"
    return Sweep(
        name="shapes" if small else f"shapes-{size}",
        base=config_io.load_config(f"{STUDY}:{size}"),
        arms=main + others if small else main[:3],
        seeds=(0, 1, 2),
    )

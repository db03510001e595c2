"""Schedules at one ratio, with eight seeds: is cosine better than linear, and either than uniform?

Command:   DATA=FOLDER tlm sweep configs/sweeps/schedules.py
Sizes:     FILE.py:micro and :medium use the sizes of configs/study.py
Cost:      32 runs of configs/study.py
Plan:      docs/studies.md, study a

The paper has 0.10 nats between cosine and linear, whose widths differ by a tenth of the base at
most. Sigmoid is its eq. 6.
"""

import pathlib

from tlm_jax import config_io
from tlm_jax.analysis.sweep import Arm, Sweep

STUDY = pathlib.Path(__file__).parents[1] / "study.py"


def get_sweep(size: str = "small") -> Sweep:
    arms = [
        Arm(name=name, changes={"model.taper.schedule": name})
        for name in ("uniform", "cosine", "linear", "sigmoid")
    ]
    return Sweep(
        name=f"schedules-{size}",
        base=config_io.load_config(f"{STUDY}:{size}"),
        arms=tuple(arms),
        seeds=tuple(range(8)),
        primary=(("cosine", "uniform"), ("linear", "uniform"), ("cosine", "linear")),
    )

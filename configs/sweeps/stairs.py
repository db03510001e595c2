"""Stairs instead of the smooth curve: what the shorter compile time costs in loss.

Command:   DATA=FOLDER tlm sweep configs/sweeps/stairs.py
Cost:      10 runs of configs/study.py (two seeds)
"""

import pathlib

from tlm_jax import config_io
from tlm_jax.analysis.sweep import Arm, Sweep

STUDY = pathlib.Path(__file__).parents[1] / "study.py"


def get_sweep() -> Sweep:
    arms = [Arm(name="uniform", changes={"model.taper.schedule": "uniform"})]
    arms += [
        Arm(name=f"{number} stairs", changes={"model.taper.num_segments": number})
        for number in (2, 3, 4)
    ]
    arms.append(Arm(name="exact"))
    return Sweep(name="stairs", base=config_io.load_config(STUDY), arms=tuple(arms), seeds=(0, 1))

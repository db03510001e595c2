"""Does each shape want its own learning rate? Uniform and tapered at three of them.

Command:   DATA=FOLDER tlm sweep configs/sweeps/learning_rates.py
Cost:      12 runs of configs/study.py (two seeds)

Every cell is compared with the uniform one of the same rate; the table of losses says which rate is
the best of each shape.
"""

import pathlib

from tlm_jax import config_io
from tlm_jax.analysis.sweep import Arm, Sweep

STUDY = pathlib.Path(__file__).parents[1] / "study.py"


def get_sweep() -> Sweep:
    arms = []
    for rate in (1.5e-3, 3e-3, 6e-3):
        for shape in ("uniform", "cosine"):
            changes = {
                "model.taper.schedule": shape,
                "optimizer.learning_rate": rate,
                "optimizer.final_learning_rate": rate / 10,
            }
            arms.append(
                Arm(name=f"{shape}, {rate:g}", changes=changes, baseline=f"uniform, {rate:g}")
            )
    return Sweep(
        name="learning_rates",
        base=config_io.load_config(STUDY),
        arms=tuple(arms),
        baseline=arms[0].name,
        seeds=(0, 1),
    )

"""Does what a taper gains come from the scale of its weights at the start?

Command:   DATA=FOLDER tlm sweep configs/sweeps/initialisation.py
Cost:      18 runs of configs/study.py
Expected:  docs/results.md

With 1/sqrt(fan-in), the default, the last matrix of a wide MLP starts with smaller weights than
that of a narrow one. With one standard deviation for all it does not, and wide MLPs add more to
the stream instead. Every shape is compared with uniform of the same start.
"""

import pathlib

from tlm_jax import config_io
from tlm_jax.analysis.sweep import Arm, Sweep

STUDY = pathlib.Path(__file__).parents[1] / "study.py"
STARTS = {"1/sqrt(fan-in)": None, "0.02": 0.02}
SHAPES = {"uniform": (1.0, 1.0), "cosine": (1.5, 0.5), "reversed": (0.5, 1.5)}


def get_sweep() -> Sweep:
    arms = []
    for start, std in STARTS.items():
        for shape, (first, last) in SHAPES.items():
            changes = {
                "model.init_std": std,
                "model.taper.schedule": "uniform" if shape == "uniform" else "cosine",
                "model.taper.start": first,
                "model.taper.end": last,
            }
            arms.append(
                Arm(name=f"{shape}, {start}", changes=changes, baseline=f"uniform, {start}")
            )
    return Sweep(
        name="initialisation",
        base=config_io.load_config(STUDY),
        arms=tuple(arms),
        baseline=arms[0].name,
    )

"""Does what a taper gains come from the scale of its weights at the start, or from their rate?

Command:   DATA=FOLDER tlm sweep configs/sweeps/initialisation.py
Sizes:     FILE.py:micro and :medium use the sizes of configs/study.py
Cost:      30 runs of configs/study.py (five seeds)
Plan:      docs/studies.md, study d

With 1/sqrt(fan-in), the default, the last matrix of a wide MLP starts with smaller weights than
that of a narrow one. With one standard deviation for all it does not, and wide MLPs add more to
the stream instead. The third start also divides the rate of each MLP's last matrix by its width
(`rate_by_width`). Every shape is compared with uniform of the same start.
"""

import pathlib

from tlm_jax import config_io
from tlm_jax.analysis.sweep import Arm, Sweep

STUDY = pathlib.Path(__file__).parents[1] / "study.py"
STARTS = {
    "1/sqrt(fan-in)": {"model.init_std": None},
    "0.02": {"model.init_std": 0.02},
    "1/sqrt(fan-in), rate by width": {"model.init_std": None, "optimizer.rate_by_width": True},
}


def get_sweep(size: str = "small") -> Sweep:
    arms = [
        Arm(
            name=f"{shape}, {start}",
            changes=changes | {"model.taper.schedule": shape},
            baseline=f"uniform, {start}",
        )
        for start, changes in STARTS.items()
        for shape in ("uniform", "cosine")
    ]
    return Sweep(
        name=f"initialisation-{size}",
        base=config_io.load_config(f"{STUDY}:{size}"),
        arms=tuple(arms),
        baseline=arms[0].name,
        seeds=tuple(range(5)),
    )

"""Does each shape need its own learning rate? Uniform and tapered at three of them.

Command:   DATA=FOLDER tlm sweep configs/sweeps/learning_rates.py
Sizes:     FILE.py:micro and :medium use the sizes of configs/study.py
           :SIZE-high, such as :micro-high, has the largest of the three rates and twice that
Cost:      30 runs of configs/study.py (five seeds); -high 32 (eight other seeds)
Plan:      docs/studies.md, study d; -high is study j

Every cell is compared with the uniform one of the same rate. The primary comparison takes each
shape at its best rate, chosen on two seeds and compared on the others.
"""

import pathlib

from tlm_jax import config_io
from tlm_jax.analysis.sweep import Arm, Sweep

STUDY = pathlib.Path(__file__).parents[1] / "study.py"
SHAPES = ("uniform", "cosine")


def get_sweep(size: str = "small") -> Sweep:
    base = config_io.load_config(f"{STUDY}:{size.removesuffix('-high')}")
    factors, seeds, chosen_on = (0.5, 1, 2), range(5), (3, 4)
    if size.endswith("-high"):
        factors, seeds, chosen_on = (2, 4), range(10, 18), (10, 11)
    arms = []
    for factor in factors:
        rate = factor * base.optimizer.learning_rate
        for shape in SHAPES:
            changes = {
                "model.taper.schedule": shape,
                "optimizer.learning_rate": rate,
                "optimizer.final_learning_rate": rate / 10,
            }
            arms.append(
                Arm(name=f"{shape}, {rate:g}", changes=changes, baseline=f"uniform, {rate:g}")
            )
    return Sweep(
        name=f"learning_rates-{size}",
        base=base,
        arms=tuple(arms),
        baseline=arms[0].name,
        seeds=tuple(seeds),
        primary=(("cosine at its best rate", "uniform at its best rate"),),
        best_of={
            f"{shape} at its best rate": tuple(a.name for a in arms if a.name.startswith(shape))
            for shape in SHAPES
        },
        chosen_on=chosen_on,
    )

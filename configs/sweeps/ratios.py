"""Three schedules by five ratios: the paper's U-curve of loss against the ratio.

Command:   DATA=FOLDER tlm sweep configs/sweeps/ratios.py
Cost:      32 runs of configs/study.py (two seeds)
"""

import pathlib

from tlm_jax import config_io
from tlm_jax.analysis.sweep import Arm, Sweep

STUDY = pathlib.Path(__file__).parents[1] / "study.py"
STARTS = (1.1, 1.25, 1.5, 1.75, 1.9)


def get_sweep() -> Sweep:
    arms = [Arm(name="uniform", changes={"model.taper.schedule": "uniform"})]
    for schedule in ("linear", "cosine", "sigmoid"):
        for start in STARTS:
            changes = {
                "model.taper.schedule": schedule,
                "model.taper.start": start,
                "model.taper.end": round(2 - start, 2),
            }
            arms.append(Arm(name=f"{schedule} {start}", changes=changes))
    return Sweep(name="ratios", base=config_io.load_config(STUDY), arms=tuple(arms), seeds=(0, 1))

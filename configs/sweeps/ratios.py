"""The paper's five ratios of a cosine taper: is there a U with its bottom at 1.5 to 0.5?

Command:   DATA=FOLDER tlm sweep configs/sweeps/ratios.py
Sizes:     FILE.py:micro and :medium use the sizes of configs/study.py
Cost:      30 runs of configs/study.py
Plan:      docs/studies.md, study b
"""

import pathlib

from tlm_jax import config_io
from tlm_jax.analysis.sweep import Arm, Sweep

STUDY = pathlib.Path(__file__).parents[1] / "study.py"
STARTS = (1.25, 1.375, 1.5, 1.625, 1.75)


def get_sweep(size: str = "small") -> Sweep:
    base = config_io.load_config(f"{STUDY}:{size}")
    arms = [Arm(name="uniform", changes={"model.taper.schedule": "uniform"})]
    for start in STARTS:
        changes = {"model.taper.start": start, "model.taper.end": 2 - start}
        arms.append(Arm(name=f"cosine {start:g} to {2 - start:g}", changes=changes))
    return Sweep(
        name=f"ratios-{size}",
        base=base,
        arms=tuple(arms),
        seeds=tuple(range(5)),
        primary=(
            ("cosine 1.5 to 0.5", "cosine 1.25 to 0.75"),
            ("cosine 1.5 to 0.5", "cosine 1.75 to 0.25"),
        ),
    )

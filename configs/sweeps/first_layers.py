"""Where does width count: in the first layers only, or along a taper?

Command:   DATA=FOLDER tlm sweep configs/sweeps/first_layers.py
Sizes:     FILE.py:micro and :medium use the sizes of configs/study.py
Cost:      25 runs of configs/study.py (five seeds)
Plan:      docs/studies.md, study g

The wide first third has 1.5 times the mean width; `tlm_jax/shapes.py` says what frame and
bottleneck are.
"""

import pathlib

from tlm_jax import config_io
from tlm_jax.analysis.sweep import Arm, Sweep

STUDY = pathlib.Path(__file__).parents[1] / "study.py"


def get_sweep(size: str = "small") -> Sweep:
    arms = [
        Arm(name=name, changes={"model.taper.schedule": name})
        for name in ("uniform", "cosine", "frame", "bottleneck")
    ]
    third = {"model.taper.schedule": "groups", "model.taper.heavy": "early"}
    arms.insert(2, Arm(name="wide first third", changes=third))
    return Sweep(
        name=f"first_layers-{size}",
        base=config_io.load_config(f"{STUDY}:{size}"),
        arms=tuple(arms),
        seeds=tuple(range(5)),
        primary=(("wide first third", "cosine"),),
    )

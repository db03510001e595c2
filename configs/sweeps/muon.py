"""Does the gain of a taper survive another optimizer? AdamW and Muon, uniform and cosine.

Command:   DATA=FOLDER tlm sweep configs/sweeps/muon.py
Sizes:     FILE.py:micro and :medium use the sizes of configs/study.py
Cost:      20 runs of configs/study.py (five seeds)
Plan:      docs/studies.md, study e

Muon's update has the size of AdamW's at one rate (`MuonConfig`), so both take the same.
"""

import pathlib

from tlm_jax import config_io
from tlm_jax.analysis.sweep import Arm, Sweep
from tlm_jax.optimizers import MuonConfig

STUDY = pathlib.Path(__file__).parents[1] / "study.py"


def get_sweep(size: str = "small") -> Sweep:
    base = config_io.load_config(f"{STUDY}:{size}")
    optimizers = {"AdamW": base.optimizer, "Muon": MuonConfig(**vars(base.optimizer))}
    arms = [
        Arm(
            name=f"{shape}, {name}",
            changes={"optimizer": optimizer, "model.taper.schedule": shape},
            baseline=f"uniform, {name}",
        )
        for name, optimizer in optimizers.items()
        for shape in ("uniform", "cosine")
    ]
    return Sweep(
        name=f"muon-{size}",
        base=base,
        arms=tuple(arms),
        baseline=arms[0].name,
        seeds=tuple(range(5)),
        primary=(("cosine, Muon", "uniform, Muon"),),
    )

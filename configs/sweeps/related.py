"""Shapes of related work at one budget, against uniform and the paper's taper.

Command:   DATA=FOLDER tlm sweep configs/sweeps/related.py
Cost:      24 runs of configs/study.py
Expected:  no figures yet

Growth with depth (OpenELM, DeLighT), width in the middle only (Ikeda et al.), crown and frame, and
the bottleneck of the ><former; `tlm_jax/shapes.py` says how each is read.
"""

import pathlib

from tlm_jax import config_io
from tlm_jax.analysis.sweep import Arm, Sweep
from tlm_jax.shapes import SHAPES

STUDY = pathlib.Path(__file__).parents[1] / "study.py"


def get_sweep() -> Sweep:
    arms = [Arm(name=name, changes={"model.taper.schedule": name}) for name in ("uniform", *SHAPES)]
    cosine = Arm(name="cosine 1.5 to 0.5", changes={"model.taper.schedule": "cosine"})
    return Sweep(name="related", base=config_io.load_config(STUDY), arms=(*arms, cosine))

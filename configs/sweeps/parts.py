"""Tapering other parts than the MLP: query heads, the width of a neural memory, and both with it.

Command:   DATA=FOLDER tlm sweep configs/sweeps/parts.py
           DATA=FOLDER tlm sweep configs/sweeps/parts.py:titans
Cost:      12 runs of configs/study.py (three seeds)
Expected:  no figures yet

The mixer's budget is kept by itself, as the MLP's is (docs/concepts.md).
"""

import dataclasses
import pathlib

from tlm_jax import config_io
from tlm_jax.analysis.sweep import Arm, Sweep
from tlm_jax.architectures import with_architecture
from tlm_jax.mixers import TitansConfig

STUDY = pathlib.Path(__file__).parents[1] / "study.py"
UNIFORM = {"model.taper.schedule": "uniform"}


def cosine(field: str) -> dict[str, object]:
    return {f"{field}.schedule": "cosine", f"{field}.start": 1.5, f"{field}.end": 0.5}


def get_sweep(architecture: str = "transformer") -> Sweep:
    base = with_architecture(config_io.load_config(STUDY), architecture)
    if isinstance(base.model.mixer, TitansConfig):  # wide enough to taper; 4 head_dim
        mixer = dataclasses.replace(base.model.mixer, memory_width=None)
        base = dataclasses.replace(base, model=dataclasses.replace(base.model, mixer=mixer))
    field, what = {
        "transformer": ("model.mixer.heads_taper", "heads"),
        "titans": ("model.mixer.memory_taper", "memory"),
    }[architecture]
    both = {**cosine("model.taper"), **cosine(field)}
    return Sweep(
        name=f"parts-{what}",
        base=base,
        arms=(
            Arm(name="uniform", changes=UNIFORM),
            Arm(name="MLP", changes=cosine("model.taper")),
            Arm(name=what, changes={**UNIFORM, **cosine(field)}),
            Arm(name=f"MLP and {what}", changes=both),
        ),
    )

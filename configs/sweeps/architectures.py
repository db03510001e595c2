"""The four architectures, tapered against uniform, each with its own baseline.

Command:   DATA=FOLDER tlm sweep configs/sweeps/architectures.py
Sizes:     FILE.py:micro and the other sizes of configs/study.py; :440m, :760m, :1_3b (tlm_*.py)
Cost:      40 runs (five seeds)
Plan:      docs/studies.md, study h
"""

import pathlib

from tlm_jax import config_io
from tlm_jax.analysis.sweep import Arm, Sweep
from tlm_jax.architectures import ARCHITECTURES, with_architecture

CONFIGS = pathlib.Path(__file__).parents[1]
PAPER = ("440m", "760m", "1_3b")


def get_sweep(size: str = "small") -> Sweep:
    file = f"tlm_{size}.py" if size in PAPER else f"study.py:{size}"
    base = config_io.load_config(f"{CONFIGS}/{file}")
    arms = []
    for name in ARCHITECTURES:
        model = with_architecture(base, name).model
        for shape, one in (("uniform", model.uniform_twin()), ("tapered", model)):
            arms.append(
                Arm(name=f"{name} {shape}", changes={"model": one}, baseline=f"{name} uniform")
            )
    return Sweep(
        name=f"architectures-{size}",
        base=base,
        arms=tuple(arms),
        baseline=arms[0].name,
        seeds=tuple(range(5)),
    )

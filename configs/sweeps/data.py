"""Uniform and cosine on code, and on the study's text byte by byte.

Command:   DATA_CODE=FOLDER DATA_BYTES=FOLDER tlm sweep configs/sweeps/data.py
Sizes:     FILE.py:micro and :medium use the sizes of configs/study.py
Cost:      12 runs of configs/study.py (three seeds)
Data:      two folders of `tlm prepare`; the second with --tokenizer bytes (docs/results.md)
Plan:      docs/studies.md, study f
"""

import os
import pathlib

from tlm_jax import config_io
from tlm_jax.analysis.sweep import Arm, Sweep

STUDY = pathlib.Path(__file__).parents[1] / "study.py"
DATA = {
    "code": {"data.path": os.environ.get("DATA_CODE", "data/code")},
    "bytes": {
        "data.path": os.environ.get("DATA_BYTES", "data/study-bytes"),
        "data.tokenizer": "bytes",
        "model.vocab_size": 257,
    },
}


def get_sweep(size: str = "small") -> Sweep:
    arms = [
        Arm(
            name=f"{shape}, {name}",
            changes=changes | {"model.taper.schedule": shape},
            baseline=f"uniform, {name}",
        )
        for name, changes in DATA.items()
        for shape in ("uniform", "cosine")
    ]
    return Sweep(
        name=f"data-{size}",
        base=config_io.load_config(f"{STUDY}:{size}"),
        arms=tuple(arms),
        baseline=arms[0].name,
        seeds=tuple(range(3)),
    )

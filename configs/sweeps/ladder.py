"""Does the gain of a taper fade with size and training length? Sizes by tokens per parameter.

Command:   DATA=FOLDER tlm sweep configs/sweeps/ladder.py, then tlm ladder runs/sweeps/ladder-cpu
Sizes:     FILE.py:cpu (0.03M to 0.24M parameters besides the embeddings), :gpu (0.1M to 3.2M)
Cost:      144 runs (cpu) or 216 (gpu); three seeds
Plan:      docs/studies.md, study c

Eight layers of every width, so that a taper has the same stairs; 2, 5, 10 and 20 tokens per
parameter, each with its own schedule of the learning rate.
"""

import pathlib

from tlm_jax import config_io
from tlm_jax.analysis.sweep import Arm, Sweep
from tlm_jax.config import UserError

STUDY = pathlib.Path(__file__).parents[1] / "study.py"
WIDTHS = {"cpu": (16, 24, 32, 48), "gpu": (32, 48, 64, 96, 128, 176)}
LENGTHS = (2, 5, 10, 20)
SHAPES = {"uniform": (1.0, 1.0), "cosine": (1.5, 0.5), "reversed": (0.5, 1.5)}


def get_sweep(sizes: str = "cpu") -> Sweep:
    if sizes not in WIDTHS:
        raise UserError(f"unknown sizes {sizes!r}; one of {', '.join(WIDTHS)}")
    base = config_io.load_config(STUDY)
    arms = []
    for width in WIDTHS[sizes]:
        for length in LENGTHS:
            config = config_io.load_config(f"{STUDY}:{width}x{length}")
            where = f"{width} wide, {length} per parameter"
            for shape, (start, end) in SHAPES.items():
                changes = {
                    "model": config.model,
                    "data.batch_size": config.data.batch_size,
                    "optimizer": config.optimizer,
                    "training": config.training,
                    "model.taper.schedule": "uniform" if shape == "uniform" else "cosine",
                    "model.taper.start": start,
                    "model.taper.end": end,
                }
                arms.append(
                    Arm(name=f"{shape}, {where}", changes=changes, baseline=f"uniform, {where}")
                )
    return Sweep(name=f"ladder-{sizes}", base=base, arms=tuple(arms), baseline=arms[0].name)

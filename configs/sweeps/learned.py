"""Widths that a short uniform run proposes, against uniform and cosine at the same total compute.

Commands:  DATA=FOLDER tlm train --config configs/study.py --model.taper.schedule uniform \\
             --training.num_steps 200 --seed 100 --data.seed 100 --workdir runs/short
           tlm importance --checkpoint runs/short     # the widths for IMPORTANCE
           tlm align --checkpoint runs/short          # the widths for ALIGNMENT
           DATA=FOLDER IMPORTANCE="..." ALIGNMENT="..." tlm sweep configs/sweeps/learned.py
Sizes:     FILE.py:micro and :medium use the sizes of configs/study.py
Cost:      20 runs of configs/study.py (five seeds)
Plan:      docs/studies.md, study i

The short run has a tenth of the steps, and the arms that use it train for that many fewer.
"""

import os
import pathlib

from tlm_jax import config_io
from tlm_jax.analysis.sweep import Arm, Sweep
from tlm_jax.config import RunConfig, UserError

STUDY = pathlib.Path(__file__).parents[1] / "study.py"


def widths(name: str, config: RunConfig) -> tuple[int, ...]:
    """From the environment; without it the uniform widths, so that the file can be loaded."""
    words = os.environ.get(name, "").split()
    if not words:
        return (config.model.base_mlp_width,) * config.model.num_layers
    if not all(word.isdigit() for word in words):
        raise UserError(f"{name} must be widths, such as 224 208 176")
    return tuple(map(int, words))


def get_sweep(size: str = "small") -> Sweep:
    base = config_io.load_config(f"{STUDY}:{size}")
    steps = base.training.num_steps
    arms = [
        Arm(name=name, changes={"model.taper.schedule": name}) for name in ("uniform", "cosine")
    ]
    for name in ("IMPORTANCE", "ALIGNMENT"):
        changes = {
            "model.taper.schedule": "explicit",
            "model.taper.widths": list(widths(name, base)),
            "training.num_steps": steps - steps // 10,
        }
        before = steps // 10 * base.data.batch_size * base.data.seq_len
        arms.append(Arm(name=name.lower(), changes=changes, tokens_before=before))
    return Sweep(
        name=f"learned-{size}",
        base=base,
        arms=tuple(arms),
        seeds=tuple(range(5)),
        primary=(("importance", "cosine"),),
    )

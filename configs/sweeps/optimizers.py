"""Muon and warm-up-stable-decay beside AdamW with a cosine, each at three learning rates.

Command:   tlm sweep configs/sweeps/optimizers.py
Cost:      9 runs of 300 steps of configs/tiny.py, about 3 minutes each on two idle cores

Compare the best of each. There is one seed: differences below about 0.03 mean nothing.
"""

import dataclasses
import pathlib

from tlm_jax import config_io
from tlm_jax.analysis.sweep import Arm, Sweep
from tlm_jax.optimizers import MuonConfig, OptimizerConfig

TINY = pathlib.Path(__file__).parents[1] / "tiny.py"
RATES = (1.25e-3, 2.5e-3, 5e-3)
OPTIMIZERS = {
    "AdamW": OptimizerConfig(warmup_steps=30),
    "AdamW, wsd": OptimizerConfig(warmup_steps=30, schedule="wsd"),
    "Muon": MuonConfig(warmup_steps=30),
}


def get_sweep() -> Sweep:
    base = config_io.load_config(TINY)
    training = dataclasses.replace(base.training, num_steps=300, checkpoint_every=150)
    arms = []
    for name, optimizer in OPTIMIZERS.items():
        for rate in RATES:
            one = dataclasses.replace(optimizer, learning_rate=rate, final_learning_rate=rate / 10)
            arms.append(Arm(name=f"{name}, {rate:g}", changes={"optimizer": one}))
    return Sweep(
        name="optimizers",
        base=dataclasses.replace(base, training=training),
        arms=tuple(arms),
        baseline="AdamW, 0.0025",
        seeds=(0,),
    )

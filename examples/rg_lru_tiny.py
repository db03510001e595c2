"""The tiny model with a recurrent mixer of one's own.

Command:   python train.py --config examples/rg_lru_tiny.py --workdir runs/rg_lru
"""

import dataclasses

from examples.rg_lru import RGLRUConfig
from tlm_jax.config import RunConfig
from tlm_jax.config_io import load_config


def get_config() -> RunConfig:
    tiny = load_config("configs/tiny.py")
    model = dataclasses.replace(tiny.model, mixer=RGLRUConfig(width=192))
    return dataclasses.replace(tiny, name="rg_lru", model=model)

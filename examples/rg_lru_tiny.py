"""The tiny model with a custom recurrent mixer.

Command:   python train.py --config examples/rg_lru_tiny.py --workdir runs/rg_lru
"""

import dataclasses
import pathlib

from rg_lru import RGLRUConfig  # the file beside this one

from tlm_jax.config import RunConfig
from tlm_jax.config_io import load_config


def get_config() -> RunConfig:
    tiny = load_config(pathlib.Path(__file__).parents[1] / "configs" / "tiny.py")
    model = dataclasses.replace(tiny.model, mixer=RGLRUConfig(width=192))
    return dataclasses.replace(tiny, name="rg_lru", model=model)

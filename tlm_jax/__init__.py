"""Tapered language models (arXiv 2606.23670) in JAX and Flax.

    import tlm_jax

    tlm_jax.train(config, "runs/mine")
    print(tlm_jax.load("runs/mine").generate("Once upon"))

Names are imported when they are first used, so that importing the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tlm_jax.analysis.plan import plan as plan
    from tlm_jax.api import LoadedModel as LoadedModel
    from tlm_jax.api import load as load
    from tlm_jax.api import train as train
    from tlm_jax.config import DataConfig as DataConfig
    from tlm_jax.config import MeshConfig as MeshConfig
    from tlm_jax.config import ModelConfig as ModelConfig
    from tlm_jax.config import RunConfig as RunConfig
    from tlm_jax.config import TrainingConfig as TrainingConfig
    from tlm_jax.config_io import load_config as load_config
    from tlm_jax.mixers import AttentionConfig as AttentionConfig
    from tlm_jax.mixers import GatedAttentionConfig as GatedAttentionConfig
    from tlm_jax.mixers import InterleavedConfig as InterleavedConfig
    from tlm_jax.mixers import ListedConfig as ListedConfig
    from tlm_jax.mixers import MixerConfig as MixerConfig
    from tlm_jax.mixers import RopeScaling as RopeScaling
    from tlm_jax.mixers import TitansConfig as TitansConfig
    from tlm_jax.mlp import MLPConfig as MLPConfig
    from tlm_jax.models.registry import register as register
    from tlm_jax.models.registry import register_norm as register_norm
    from tlm_jax.optimizers import AdafactorConfig as AdafactorConfig
    from tlm_jax.optimizers import MuonConfig as MuonConfig
    from tlm_jax.optimizers import OptimizerConfig as OptimizerConfig
    from tlm_jax.stack import Stack as Stack
    from tlm_jax.taper import layer_widths as layer_widths
    from tlm_jax.taper_config import TaperConfig as TaperConfig
    from tlm_jax.training.updates import register_optimizer as register_optimizer

__version__ = "0.1.0"
_NAMES = {
    "analysis.plan": "plan",
    "api": "LoadedModel load train",
    "config": "DataConfig MeshConfig ModelConfig RunConfig TrainingConfig",
    "config_io": "load_config",
    "mixers": "AttentionConfig GatedAttentionConfig InterleavedConfig ListedConfig MixerConfig "
    "RopeScaling TitansConfig",
    "mlp": "MLPConfig",
    "models.registry": "register register_norm",
    "optimizers": "AdafactorConfig MuonConfig OptimizerConfig",
    "stack": "Stack",
    "taper": "layer_widths",
    "taper_config": "TaperConfig",
    "training.updates": "register_optimizer",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]

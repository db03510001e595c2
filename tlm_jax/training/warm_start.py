"""A new run from another run's parameters: continued pre-training and fine-tuning."""

import pathlib
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from tlm_jax import config_io
from tlm_jax.config import RunConfig, UserError
from tlm_jax.data.tokenizers import Tokenizer
from tlm_jax.models import Skeleton
from tlm_jax.training import checkpoint, restore

_OF_THE_MODEL = ("special_tokens", "chat_template")
_KEPT = (*_OF_THE_MODEL, "init_from")
_FREE = ("model.init_std", "model.compute_dtype")
"""Fields of a model that may differ: they do not change what its parameters mean."""


def load(
    source: pathlib.Path, config: RunConfig, model: Skeleton, tokenizer: Tokenizer, mesh: Mesh
) -> tuple[Any, dict[str, Any]]:
    """The parameters of a run's newest checkpoint, and what the new run's metadata say of them.

    Args:
      source: the run folder.
      config: the new run.
      model: its model.
      tokenizer: of its data.
      mesh: where the parameters go.

    Raises:
      UserError: there is no such checkpoint, or its model or tokenizer is not the new run's.
    """
    step, saved = restore.saved_metadata(source, None)
    lines = config_io.differences(restore.saved_config(saved), config)
    other = [d for d in lines if d.startswith("model.") and d.split(":")[0] not in _FREE]
    if other:
        raise UserError(
            f"--init_from {source} has another model ({'; '.join(other[:4])}); "
            f"--config {source / 'config.json'} names its own"
        )
    params = restore.load_params(source, step, model, tokenizer, mesh)
    origin = {"folder": str(source), "step": step, "params": checkpoint.params_id(saved)}
    return params, {k: saved[k] for k in _OF_THE_MODEL if k in saved} | {"init_from": origin}


def kept(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What a resumed run takes over from its checkpoint's metadata, as `load` gave it at first."""
    return {key: saved[key] for key in _KEPT if key in saved}

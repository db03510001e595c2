"""The model that another one learns from while it trains.

Its distributions are computed in the train step, for the very tokens of the batch: a cache of them
would hold 2 k numbers per token (the k largest logits and their tokens) and be bound to one order
of the data, to save one forward pass, about a fifth of the step.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from tlm_jax import storage
from tlm_jax.config import RunConfig, UserError
from tlm_jax.data.tokenizers import Tokenizer
from tlm_jax.models import Skeleton, skeleton
from tlm_jax.training import checkpoint, restore

KEY = "teacher"
"""Of a checkpoint's metadata: which parameters the run learns from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A teacher that was found, before its parameters are read."""

    folder: pathlib.Path
    step: int
    skeleton: Skeleton
    origin: dict[str, Any]
    """For the metadata of the run's checkpoints."""

    def load(self, tokenizer: Tokenizer, mesh: Mesh) -> Any:
        """Its parameters, sharded like any others.

        Raises:
          UserError: see `restore.load_params`.
        """
        return restore.load_params(self.folder, self.step, self.skeleton, tokenizer, mesh)


def find(config: RunConfig) -> Source | None:
    """The newest checkpoint of `training.teacher`; None without a teacher.

    It computes in the student's dtype and with its kernel of attention.

    Raises:
      UserError: there is no such checkpoint, or its vocabulary is another.
    """
    if config.training.teacher is None:
        return None
    folder = storage.path(config.training.teacher).expanduser()
    step, saved = restore.saved_metadata(folder, None)
    model, student = restore.saved_config(saved).model, config.model
    if model.vocab_size != student.vocab_size:
        raise UserError(
            f"training.teacher {folder} has a vocabulary of {model.vocab_size:,} tokens and the "
            f"model one of {student.vocab_size:,}; a teacher needs the same"
        )
    model = dataclasses.replace(
        model, compute_dtype=student.compute_dtype, attention_kernel=student.attention_kernel
    )
    origin = {"folder": str(folder), "step": step, "params": checkpoint.params_id(saved)}
    return Source(folder=folder, step=step, skeleton=skeleton(model), origin=origin)


def require_same(source: Source | None, saved: Mapping[str, Any]) -> None:
    """Raises `UserError` if a run would go on with another teacher than its checkpoint had."""
    before = saved.get(KEY)
    if source is not None and before and before["params"] != source.origin["params"]:
        raise UserError(
            f"training.teacher {source.folder} no longer has the parameters that this run has "
            f"learned from so far (those of step {before['step']}); use another --workdir"
        )

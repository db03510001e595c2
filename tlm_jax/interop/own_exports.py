"""The way back: what our own exports are, by the key `tlm_jax` of their config.json."""

import dataclasses
from typing import Any

import numpy as np

from tlm_jax import config_io
from tlm_jax.config import ModelConfig, RunConfig, UserError
from tlm_jax.interop import families, llama
from tlm_jax.interop.tensors import TensorSource

KEY = "tlm_jax"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Original:
    """What the exported run folder knew of the model."""

    run: RunConfig
    native: bool
    """Whether the tensors carry our names."""
    data_layout: dict[str, Any]
    source: dict[str, Any] | None
    special_tokens: dict[str, Any] | None


def read(values: dict[str, Any], where: str) -> Original:
    """Reads config.json of an export.

    Raises:
      UserError: Llama's fields and ours say different things.
    """
    try:
        ours = values[KEY]
        run = config_io.from_dict(ours["config"])
        found = Original(
            run=run,
            native=ours["format"] == "native",
            data_layout=ours["data_layout"],
            source=ours.get("source"),
            special_tokens=ours.get("special_tokens"),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: {KEY} lacks {error}") from error
    if not isinstance(found.data_layout, dict) or not isinstance(found.source or {}, dict):
        raise UserError(f"{where}: data_layout and source of {KEY} must be objects")
    if not found.native:
        kind = values.get("model_type")  # that of remote code is a Llama's
        kind = kind if kind in families.FAMILIES else "llama"
        theirs = families.model_config({**values, "model_type": kind}, where)
        for name, before, after in _meanings(run.model, theirs):
            if before != after:
                raise UserError(
                    f"{where}: {name} is {after!r}, and its {KEY} says {before!r}; remove {KEY} "
                    "to import it as a plain Llama"
                )
    return found


def _meanings(ours: ModelConfig, theirs: ModelConfig) -> list[tuple[str, Any, Any]]:
    """What two configs say of which the tensors' shapes say nothing."""
    found: list[tuple[str, Any, Any]] = [
        ("rms_norm_eps", ours.norm_eps, theirs.norm_eps),
        ("tie_word_embeddings", ours.tie_embeddings, theirs.tie_embeddings),
    ]
    for pair in zip(ours.mixers, theirs.mixers, strict=False):
        one, other = map(vars, pair)
        found += [(name, value, other.get(name)) for name, value in one.items()]
    return found


class Trimmed:
    """A padded Llama's tensors without the padding.

    Raises:
      UserError: a unit that should be padding is not zero.
    """

    def __init__(self, source: TensorSource, widths: tuple[int, ...]) -> None:
        self.where = source.where
        self._source = source
        self._widths: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in source.shapes.items():
            dim = llama.mlp_dim(name)
            layer = llama.layer_of(name)
            if dim is not None and layer is not None and layer < len(widths):
                self._widths[name] = width = widths[layer]
                self._check_padding(name, shape, dim, width)
                shape = (*shape[:dim], min(width, shape[dim]), *shape[dim + 1 :])
            self.shapes[name] = shape

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a tensor, float32."""
        rows = self._source.read(name, start, stop)
        return rows[:, : self._widths[name]] if llama.mlp_dim(name) == 1 else rows

    def _check_padding(self, name: str, shape: tuple[int, ...], dim: int, width: int) -> None:
        if shape[dim] <= width:
            return
        start = width if dim == 0 else 0
        beyond = self._source.read(name, start, shape[0])
        beyond = beyond if dim == 0 else beyond[:, width:]
        if np.any(beyond):
            raise UserError(
                f"{self.where}: units of {name} from {width} on are not zero, so they are no "
                f"padding; remove {KEY} from config.json to import it as a plain Llama"
            )

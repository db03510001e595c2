"""How much the units of each MLP matter to the loss, by its gradient; widths in proportion.

With a mask m on the hidden units of an MLP, removing unit u changes a row's loss, to first
order, by -dL/dm_u = -sum_d W_ud dL/dW_ud, W being the last matrix (arXiv 1906.10771, eq. 8).
The importance of a unit is the mean of |dL/dm_u| over rows, in nats per token.

Shapes: B batch, L length, W MLP width, D model, N layers of a segment.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from tlm_jax import output
from tlm_jax._fit import nearest
from tlm_jax.analysis.alignment import spread
from tlm_jax.config import RunConfig
from tlm_jax.data import open_dataset
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.distributed.sharding import to_devices
from tlm_jax.models import Skeleton, skeleton
from tlm_jax.models.loss import batch_losses
from tlm_jax.models.skeleton import by_path, path_of, place
from tlm_jax.training import restore

LEAST, MOST = 0.25, 2.0
"""Bounds of a proposed width, relative to the mean (our choice)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Importance:
    """Of one layer's units."""

    layer: int
    units: np.ndarray
    """(W,), float64; in a chain of MLPs the units of all levels, first to last."""


def measure(folder: pathlib.Path, step: int, config: RunConfig, *, rows: int) -> list[Importance]:
    """Measures a checkpoint on its validation split, in float32.

    Args:
      folder: the run folder.
      step: which checkpoint.
      config: its config.
      rows: about how many, in batches spread evenly over the split.

    Raises:
      UserError: see `restore.load_params`.
    """
    mesh = mesh_lib.make_mesh(config)
    model = skeleton(dataclasses.replace(config.model, compute_dtype="float32"))
    dataset = open_dataset(config.data, config.model.vocab_size)
    count = math.ceil(rows / config.data.batch_size)
    batches = spread(dataset.validation_batches(), count)
    with jax.set_mesh(mesh):
        params = restore.load_params(folder, step, model, dataset.tokenizer, mesh)
        return importance(model, params, (to_devices(batch, mesh) for batch in batches))


def importance(
    model: Skeleton, params: Any, batches: Iterable[dict[str, jax.Array]]
) -> list[Importance]:
    """Importance of the units of each layer, first to last, on batches that are on the device."""
    step = jax.jit(lambda params, batch: _sums(model, params, batch))
    sums: dict[str, np.ndarray] = {}
    rows = 0
    for batch in batches:
        found, scored = jax.device_get(step(params, batch))
        rows += int(scored)
        sums = {k: sums.get(k, 0.0) + np.asarray(v, np.float64) for k, v in found.items()}
    layers: dict[int, list[np.ndarray]] = {}
    for path in sorted(sums):  # levels of a chain in their order
        _, stacked = place(model.config, path)
        assert stacked is not None
        for index, layer in enumerate(stacked):
            layers.setdefault(layer, []).append(sums[path][index] / max(rows, 1))
    return [Importance(layer=i, units=np.concatenate(layers[i])) for i in sorted(layers)]


def _sums(
    model: Skeleton, params: Any, batch: dict[str, jax.Array]
) -> tuple[dict[str, jax.Array], jax.Array]:
    """|dL/dm| summed over rows, (N, W) by the path of the last matrix; rows that have a target."""
    last = {path: leaf for path, leaf in by_path(params).items() if _writes_to_the_stream(path)}

    def loss(last: dict[str, jax.Array], row: dict[str, jax.Array]) -> jax.Array:
        whole = jax.tree_util.tree_map_with_path(lambda k, v: last.get(path_of(k), v), params)
        one = {name: value[None] for name, value in row.items()}
        nll, _, scored = batch_losses(model, whole, one, chunk=0, training=True)
        return jnp.sum(nll) / jnp.maximum(jnp.sum(scored), 1)

    def of_row(row: dict[str, jax.Array]) -> dict[str, jax.Array]:
        gradients = jax.grad(loss)(last, row)
        return {path: jnp.abs(jnp.sum(last[path] * g, -1)) for path, g in gradients.items()}

    # A row without targets has no gradient.
    found = jax.lax.map(of_row, batch)
    scored = jnp.sum(jnp.any(batch["document_ids"] > 0, -1))
    return {path: jnp.sum(values, 0) for path, values in found.items()}, scored


def _writes_to_the_stream(path: str) -> bool:
    parts = path.split("/")
    return "mlp" in parts and parts[-1] == "down"


def proposed_widths(values: Sequence[float], base_width: int, multiple_of: int) -> tuple[int, ...]:
    """MLP widths in proportion to positive values, at the budget of a uniform model (our choice).

    If the loss fell with the logarithm of each layer's width, with these values as the factors,
    such widths would be best: the next unit would then gain the same in every layer. No width
    is less than `LEAST` or more than `MOST` of the mean.

    Args:
      values: one per layer.
      base_width: mean of the widths.
      multiple_of: of which widths are multiples, where the budget is one.
    """
    unit = math.gcd(multiple_of, len(values) * base_width)
    total = len(values) * base_width // unit
    mean = total / len(values)
    low, high = max(1, math.ceil(LEAST * mean)), max(1, math.floor(MOST * mean))
    ideal = _within(np.asarray(values, float), total, low, high)
    units = nearest([round(value) for value in ideal], ideal, total, low, high)
    assert units is not None  # the mean lies between the limits
    return tuple(unit * value for value in units)


def _within(values: np.ndarray, total: int, low: int, high: int) -> list[float]:
    """Numbers in proportion to values, except those at a limit, with a given sum."""
    values = np.maximum(values / max(values.max(), np.finfo(float).tiny), 1e-9)
    least, most = 0.0, total / values.min()
    for _ in range(200):  # the factor, by bisection
        factor = (least + most) / 2
        if np.clip(factor * values, low, high).sum() < total:
            least = factor
        else:
            most = factor
    return [float(value) for value in np.clip(most * values, low, high)]


def table(title: str, found: Sequence[Importance]) -> Table:
    """One row per layer: width, total importance, and the fewest units that hold half of it."""
    header = ("layer", "MLP width", "importance", "share", "units with half of it")
    result = output.table(*header, title=title, texts=0)
    whole = sum(float(one.units.sum()) for one in found)
    for one in found:
        ordered = np.sort(one.units)[::-1].cumsum()
        half = int(np.searchsorted(ordered, ordered[-1] / 2)) + 1
        result.add_row(
            str(one.layer),
            f"{len(one.units):,}",
            f"{ordered[-1]:.4f}",
            f"{ordered[-1] / whole:.1%}",
            f"{half:,}",
        )
    return result

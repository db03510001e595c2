"""Other MLP widths for a trained model: layers lose the units that matter least, or gain new ones.

An MLP is a sum over its units, y = sum_u h_u W_u, with h_u = silu(x g_u) (x p_u) and W_u row u of
the last matrix. Removing a unit takes its term away; adding one with W_u = 0 adds zero, so growing
leaves the function as it is. New units read random inputs (g_u and p_u normal, as wide as the
layer's own), so no two are alike and each row W_u gets a gradient of its own from the first step
on. Split units (Net2Net, arXiv 1511.05641) would keep the function too, but copies get
proportional gradients, which Adam turns into equal updates: they stay copies unless noise, which
changes the function, tells them apart.

Shapes: B batch, L length, D model, F MLP width, N layers of a segment.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.table import Table

from tlm_jax import files, output, storage
from tlm_jax.analysis.importance import importance as taylor
from tlm_jax.config import ModelConfig, RunConfig, TaperConfig, UserError
from tlm_jax.data import Dataset, open_dataset
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.distributed import sharding
from tlm_jax.distributed.sharding import to_devices
from tlm_jax.evaluation import perplexity
from tlm_jax.mlp import MLPConfig
from tlm_jax.models import Skeleton, skeleton
from tlm_jax.models.decoder import normed
from tlm_jax.models.skeleton import by_path, path_of, place
from tlm_jax.training import checkpoint, restore

Measure = Literal["activation", "taylor"]
Units = tuple[int, int]
"""(layer, level) of an MLP."""
_LONGEST = 512
"""Most tokens of a row to measure on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """What became of the MLP of one layer, all levels together."""

    layer: int
    before: int
    after: int
    removed: int
    """Units; those of the levels that shrank."""
    added: int
    lost: float
    """Share of the layer's importance that the removed units had."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """A retapered model."""

    changes: tuple[Change, ...]
    before: perplexity.Score
    """On held-out text."""
    after: perplexity.Score
    num_params: tuple[int, int]
    """Before and after."""


def new_model(model: ModelConfig, taper: TaperConfig, base_width: int | None) -> ModelConfig:
    """The model with other MLP widths.

    Args:
      model: as it is.
      taper: of the new widths.
      base_width: their mean; None is that of the model.

    Raises:
      UserError: there are no such widths, or its MLPs have no units that are known.
    """
    if type(model.mlp) is not MLPConfig:
        raise UserError(
            f"its MLPs are of the kind {type(model.mlp).__name__}, whose units are not known; only "
            "the built-in MLP can be given other widths"
        )
    more = 0 if base_width is None else base_width - model.base_mlp_width
    try:
        return dataclasses.replace(model, taper=taper, mlp_width=model.mlp_width + more)
    except ValueError as error:
        raise UserError(str(error).replace("mlp_width=", "base_width=")) from None


def retaper(
    folder: pathlib.Path,
    out: pathlib.Path,
    *,
    step: int | None,
    taper: TaperConfig,
    base_width: int | None,
    measure: Measure,
    text: str | None,
    rows: int,
    seed: int,
) -> Outcome:
    """Writes a run folder with the model of another one at other MLP widths, all or nothing.

    On one device, whatever mesh the run has.

    Args:
      folder: a run, or an imported model.
      out: the new run folder; it may be there if it is empty.
      step: which checkpoint; None is the newest.
      taper, base_width: see `new_model`.
      measure: what the importance of a unit is (see `activation` and `importance.importance`).
      text: to measure on, as `data.path`; None is the run's own. Importance is measured on the
        training split, losses on the validation split.
      rows: about how many of each.
      seed: of the inputs of new units.

    Raises:
      UserError: there are no such widths, `out` is not empty, or see `restore.load_params`.
    """
    step, saved = restore.saved_metadata(folder, step)
    run = restore.saved_config(saved)
    try:
        target = new_model(run.model, taper, base_width)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    if target.mlp_widths == run.model.mlp_widths:
        raise UserError(f"{folder} has these widths already: {_brief(target.mlp_widths)}")
    config = _measuring(run, text)
    mesh = mesh_lib.single_device_mesh()
    old, new = (
        skeleton(dataclasses.replace(model, compute_dtype="float32"))
        for model in (config.model, target)
    )
    with files.new_folder(out) as part, jax.set_mesh(mesh):
        dataset = open_dataset(config.data, config.model.vocab_size)
        params = restore.load_params(folder, step, old, dataset.tokenizer, mesh)
        before = _loss(old, params, dataset, config, mesh, rows)
        found = _importance(measure, old, params, dataset, mesh, rows)
        host, changes = resize(old, new, jax.device_get(params), found, seed)
        del params
        shardings = sharding.param_shardings(new.shapes, new.logical_axes, mesh)
        params = jax.tree.map(jax.device_put, host, shardings)
        after = _loss(new, params, dataset, config, mesh, rows)
        outcome = Outcome(
            changes=changes,
            before=before,
            after=after,
            num_params=(old.num_params, new.num_params),
        )
        origin = {
            "folder": str(folder),
            "step": step,
            "params": checkpoint.params_id(saved),
            "mlp_widths": list(run.model.mlp_widths),
            "importance": measure,
            "text": text,
            "rows": rows,
            "seed": seed,
            "loss_before": before.loss,
            "loss_after": after.loss,
        }
        _write(part, out, folder, dataclasses.replace(run, model=target), params, saved, origin)
    return outcome


def _measuring(run: RunConfig, text: str | None) -> RunConfig:
    """The run, to be measured on rows of at most `_LONGEST` tokens, of another text if given.

    A batch keeps its tokens.
    """
    own = run.data.seq_len
    length = next(n for n in range(min(own, _LONGEST), 0, -1) if own % n == 0)
    data = dataclasses.replace(
        run.data, seq_len=length, batch_size=run.data.batch_size * (own // length)
    )
    if text is not None:
        data = dataclasses.replace(data, path=text, mixture=())
    training = dataclasses.replace(
        run.training, loss_chunk=math.gcd(run.training.loss_chunk, length)
    )
    try:
        return dataclasses.replace(run, data=data, training=training)
    except ValueError as error:
        raise UserError(str(error)) from None


def _loss(
    model: Skeleton, params: Any, dataset: Dataset, config: RunConfig, mesh: Mesh, rows: int
) -> perplexity.Score:
    score_step = perplexity.make_score_step(model, mesh, chunk=config.training.loss_chunk)
    limit = math.ceil(rows / config.data.batch_size)
    return perplexity.score_dataset(score_step, params, dataset, config, mesh, limit=limit)


def _importance(
    measure: Measure, model: Skeleton, params: Any, dataset: Dataset, mesh: Mesh, rows: int
) -> dict[Units, np.ndarray]:
    count = math.ceil(rows / dataset.config.batch_size)
    iterator = dataset.train_iterator()
    try:
        batches = (to_devices(batch, mesh) for batch in itertools.islice(iterator, count))
        if measure == "activation":
            return activation(model, params, batches)
        found = taylor(model, params, batches)
    finally:
        iterator.close()
    return {
        (one.layer, level): units
        for one in found
        for level, units in enumerate(
            np.split(one.units, np.cumsum(model.config.layers[one.layer].mlp_widths)[:-1])
        )
    }


def activation(
    model: Skeleton, params: Any, batches: Iterable[dict[str, jax.Array]]
) -> dict[Units, np.ndarray]:
    """sqrt(mean of h_u^2) |W_u| of each unit u: the size of what it adds to the stream.

    The mean is over tokens; |W_u| is the Euclidean norm of its row. Wanda's score (arXiv
    2306.11695), with a unit's whole row in place of single weights.

    Args:
      model: its structure; MLPs run as they are at the start of a row.
      params: its parameters.
      batches: that are on the device.

    Returns:
      float64 (F,) for each MLP.
    """
    step = jax.jit(lambda params, batch: _squares(model, params, batch))
    sums: dict[str, np.ndarray] = {}
    for batch in batches:
        found = jax.device_get(step(params, batch))
        sums = {k: sums.get(k, 0.0) + np.asarray(v, np.float64) for k, v in found.items()}
    tokens = max(float(sums.pop("tokens")), 1.0)
    result = {}
    for path, leaf in by_path(params).items():
        rest, stacked = place(model.config, path)
        if stacked is not None and (level := _level(rest, "down")) is not None:
            norms_NF = np.asarray(jnp.linalg.norm(leaf, axis=-1), np.float64)
            for index, layer in enumerate(stacked):
                mean_F = sums[f"{layer}/{level}"] / tokens
                result[layer, level] = np.sqrt(mean_F) * norms_NF[index]
    return result


def _squares(model: Skeleton, params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """h_u^2 (F,) summed over tokens, by `layer/level`, and the `tokens`."""
    scored_BL = batch["document_ids"] > 0
    merged = model.merge(params)

    def layer(block: Any, x_BLD: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        x_BLD, _ = block.mix(x_BLD, None, batch["positions"], batch["document_ids"])
        sums = []
        for level in block.mlp.values():
            in_BLD = normed(level.norm, x_BLD)
            hidden_BLF = jax.nn.silu(in_BLD @ level.gate[...]) * (in_BLD @ level.up[...])
            sums.append(jnp.einsum("blf,bl->f", jnp.square(hidden_BLF), scored_BL))
            x_BLD = x_BLD + hidden_BLF @ level.down[...]
        return x_BLD, tuple(sums)

    _, stacks = merged.segments.fold(layer, merged.embedding[...][batch["inputs"]])
    result = {"tokens": jnp.sum(scored_BL)}
    for segment, places in zip(model.config.segments, stacks, strict=True):
        for number, levels in enumerate(places):
            for level, sums_NF in enumerate(levels):
                for index, which in enumerate(segment.layers(number)):
                    result[f"{which}/{level}"] = sums_NF[index]
    return result


def resize(
    old: Skeleton, new: Skeleton, params: Any, importance: Mapping[Units, np.ndarray], seed: int
) -> tuple[Any, tuple[Change, ...]]:
    """Parameters at the widths of `new`, and what changed in each layer.

    A level that shrinks keeps the units that matter most, in their order; one that grows keeps all
    and gets new ones behind them (see above).

    Args:
      old: the model as it is.
      new: the same with other MLP widths.
      params: of `old`, NumPy arrays.
      importance: (F,) of each MLP of `old`.
      seed: of the inputs of new units.
    """
    parts: dict[tuple[str, int | None], np.ndarray] = {}
    for path, leaf in by_path(params).items():
        rest, stacked = place(old.config, path)
        if stacked is None:
            parts[rest, None] = leaf
        else:
            parts.update({(rest, layer): leaf[i] for i, layer in enumerate(stacked)})
    changes = []
    specs = zip(old.config.layers, new.config.layers, strict=True)
    for layer, (before, after) in enumerate(specs):
        removed, added, lost, whole = 0, 0, 0.0, 0.0
        widths = zip(before.mlp_widths, after.mlp_widths, strict=True)
        for level, (have, want) in enumerate(widths):
            units = importance[layer, level]
            keep = most_important(units, want)
            removed, added = removed + have - len(keep), added + max(want - have, 0)
            lost, whole = lost + units.sum() - units[keep].sum(), whole + units.sum()
            rng = np.random.default_rng([seed, layer, level])
            for name in ("gate", "up", "down"):
                key = f"mlp/{level}/{name}", layer
                parts[key] = _resized(parts[key], name, keep, want, rng)
        changes.append(
            Change(
                layer=layer,
                before=before.mlp_width,
                after=after.mlp_width,
                removed=removed,
                added=added,
                lost=float(lost / whole) if whole else 0.0,
            )
        )

    def made(keys: Any, _: Any) -> np.ndarray:
        path = path_of(keys)
        rest, stacked = place(new.config, path)
        if stacked is None:
            return parts[rest, None]
        return np.stack([parts[rest, layer] for layer in stacked])

    return jax.tree_util.tree_map_with_path(made, new.shapes), tuple(changes)


def most_important(units: np.ndarray, count: int) -> np.ndarray:
    """Indices, ascending, of the `count` units that matter most; of equal ones the first."""
    return np.sort(np.argsort(-units, kind="stable")[:count])


def _resized(
    matrix: np.ndarray, name: str, keep: np.ndarray, width: int, rng: np.random.Generator
) -> np.ndarray:
    """Some units of gate or up (D, F) or down (F, D), and new ones up to a width."""
    if name == "down":
        kept = matrix[keep]
        return np.concatenate([kept, np.zeros((width - len(keep), matrix.shape[1]), np.float32)])
    shape = (matrix.shape[0], width - len(keep))
    new = rng.normal(scale=np.sqrt(np.square(matrix).mean()), size=shape)
    return np.concatenate([matrix[:, keep], new.astype(np.float32)], axis=1)


def _level(rest: str, name: str) -> int | None:
    """Of an MLP's matrix `mlp/LEVEL/NAME`; None for others."""
    parts = rest.split("/")
    return int(parts[1]) if parts[0] == "mlp" and parts[2:] == [name] else None


def _write(
    part: pathlib.Path,
    out: pathlib.Path,
    folder: pathlib.Path,
    run: RunConfig,
    params: Any,
    saved: dict[str, Any],
    origin: dict[str, Any],
) -> None:
    """Fills `part`, which will lie at `out`: tokenizer, checkpoint 0 and config."""
    tokenizer = run.data.tokenizer
    if tokenizer is not None and storage.path(tokenizer).parent == folder:
        name = storage.path(tokenizer).name
        (part / name).write_bytes((folder / name).read_bytes())
        tokenizer = str(out / name)
    data = dataclasses.replace(run.data, tokenizer=tokenizer)
    run = dataclasses.replace(run, name=out.resolve().name, data=data)
    kept = ("special_tokens", "chat_template", "source")
    metadata = checkpoint.metadata(run, params, saved["data_layout"])
    metadata |= {key: saved[key] for key in kept if key in saved} | {"retaper": origin}
    with checkpoint.Checkpoints(part / checkpoint.CHECKPOINTS) as checkpoints:
        checkpoints.save_params(0, params, metadata)
    files.write_json(part / "config.json", metadata)


def table(title: str, changes: Sequence[Change]) -> Table:
    """One row per layer."""
    header = ("layer", "MLP width", "new width", "removed", "added", "importance lost")
    result = output.table(*header, title=title, texts=0)
    for one in changes:
        result.add_row(
            str(one.layer),
            f"{one.before:,}",
            f"{one.after:,}",
            f"{one.removed:,}",
            f"{one.added:,}",
            f"{one.lost:.1%}",
        )
    return result


def _brief(widths: Sequence[int]) -> str:
    """Widths as runs of equal ones."""
    return ", ".join(f"{len(list(same))} x {w}" for w, same in itertools.groupby(widths))

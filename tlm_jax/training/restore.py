"""A run's checkpoint, read back for evaluation."""

import pathlib
from typing import Any

import jax

from tlm_jax import config_io
from tlm_jax.config import RunConfig, UserError
from tlm_jax.data import open_dataset
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.distributed import sharding
from tlm_jax.evaluation import perplexity
from tlm_jax.models import skeleton
from tlm_jax.training import checkpoint
from tlm_jax.training.loop import CHECKPOINTS


def saved_metadata(folder: pathlib.Path, step: int | None) -> tuple[int, dict[str, Any]]:
    """(step, metadata) of a run's checkpoint; step None is the newest.

    Raises:
      UserError: there is no such run or checkpoint.
    """
    checkpoints = folder / CHECKPOINTS
    if not checkpoints.is_dir():
        raise UserError(f"{folder} is not a run folder: it has no {CHECKPOINTS}/")
    with checkpoint.Checkpoints(checkpoints, read_only=True) as found:
        if not found.steps:
            raise UserError(f"{folder} has no whole checkpoint")
        step = max(found.steps) if step is None else step
        if step not in found.steps:
            raise UserError(f"{folder} has no checkpoint of step {step}, only of {found.steps}")
        return step, found.metadata(step)


def evaluate(folder: pathlib.Path, step: int, config: RunConfig) -> perplexity.Score:
    """Scores the checkpoint of a step on the validation split that `config.data` names.

    Raises:
      UserError: the tokenizer is not the one the model was trained with, or the
        parameters do not fit the config.
    """
    mesh = mesh_lib.make_mesh(config)
    dataset = open_dataset(config.data, config.model.vocab_size)
    model = skeleton(config.model)
    _, saved = saved_metadata(folder, step)
    now = checkpoint.metadata(config, model.shapes, dataset.layout(process_count=1))
    trained, given = (m["data_layout"]["tokenizer"] for m in (saved, now))
    if trained != given:
        raise UserError(
            f"{folder} was trained with tokenizer {trained}, and this one is {given}; "
            "use the same --data.tokenizer"
        )
    changed = checkpoint.shape_differences(saved, now)
    if changed:
        raise UserError(f"the parameters in {folder} do not fit: {'; '.join(changed[:4])}")
    with (
        jax.set_mesh(mesh),
        checkpoint.Checkpoints(folder / CHECKPOINTS, read_only=True) as found,
    ):
        shardings = sharding.param_shardings(model.shapes, model.logical_axes, mesh)
        shapes = jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
            model.shapes,
            shardings,
        )
        params = found.restore_params(step, shapes)
        score_step = jax.jit(
            perplexity.make_score_step(model, chunk=config.training.loss_chunk),
            out_shardings=jax.sharding.NamedSharding(mesh, jax.P()),
        )
        return perplexity.score_dataset(score_step, params, dataset, config, mesh)


def saved_config(metadata: dict[str, Any]) -> RunConfig:
    """The resolved config that a checkpoint was trained with."""
    return config_io.from_dict(metadata["config"])

"""Validation loss, perplexity and bits per byte, with a standard error.

Shapes: B batch, L length.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from tlm_jax.config import RunConfig
from tlm_jax.data import Dataset
from tlm_jax.distributed.sharding import to_devices
from tlm_jax.models import Skeleton
from tlm_jax.models.loss import batch_losses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """How well a model predicts held-out text."""

    loss: float
    """Nats per token: the mean negative log-likelihood over all scored tokens."""
    standard_error: float
    """Of `loss`, taking the rows of the batches as independent."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float
    """Comparable between tokenizers."""
    tokens: int
    """Targets scored."""
    sequences: int
    """Rows that hold them."""


def make_score_step(skeleton: Skeleton, mesh: Mesh, *, chunk: int) -> Any:
    """The jitted function (params, batch) -> (summed nll_B float32, tokens_B int32).

    Every process can read its results.
    """

    def score_step(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        nll_BL, _, scored_BL = batch_losses(skeleton, params, batch, chunk=chunk)
        return jnp.sum(nll_BL, axis=1), jnp.sum(scored_BL, axis=1)

    return jax.jit(score_step, out_shardings=NamedSharding(mesh, jax.P()))


def score(
    step: Callable[..., tuple[jax.Array, ...]],
    params: Any,
    batches: Iterable[dict[str, jax.Array]],
    *,
    bytes_per_token: float,
    between: Callable[[], None] = lambda: None,
) -> Score:
    """Scores `params` on batches (see `make_score_step`) that lie on the device.

    Args:
      step: the compiled score step; its outputs must be readable by this process.
      params: the model's parameters.
      batches: with int32 (B, L) `inputs`, `targets`, `document_ids`, `positions`.
      bytes_per_token: UTF-8 bytes of the text for each target of the split.
      between: called once the device has a batch and the answer to the one before it has come;
        what it raises ends the evaluation.

    Raises:
      ValueError: no token was scored.
    """
    nll, tokens = score_rows(step, params, batches, between=between)
    return summarise(nll, tokens, bytes_per_token=bytes_per_token)


def score_rows(
    step: Callable[..., tuple[jax.Array, ...]],
    params: Any,
    batches: Iterable[dict[str, jax.Array]],
    *,
    between: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """(summed nll float64, tokens int64) of all rows of the batches, (N,); see `score`.

    With a step that scores several models, (models, N).

    Raises:
      ValueError: there are no batches.
    """
    nll_rows: list[np.ndarray] = []
    token_rows: list[np.ndarray] = []

    def read(answer: tuple[jax.Array, ...]) -> None:
        nll_rows.append(np.asarray(answer[0], np.float64))
        token_rows.append(np.asarray(answer[1], np.int64))

    pending: tuple[jax.Array, ...] | None = None
    for batch in batches:
        answer = step(params, batch)
        if pending is not None:  # read one batch late, so that the device never waits
            read(pending)
        pending = answer
        between()
    if pending is None:
        raise ValueError("there is nothing to score: no batches")
    read(pending)
    return np.concatenate(nll_rows, axis=-1), np.concatenate(token_rows, axis=-1)


def score_dataset(
    step: Callable[..., tuple[jax.Array, ...]],
    params: Any,
    dataset: Dataset,
    config: RunConfig,
    mesh: Mesh,
    *,
    limit: int | None = None,
    between: Callable[[], None] = lambda: None,
) -> Score:
    """Scores `params` on the validation split, or on `limit` batches spread evenly over it.

    Args:
      step: the compiled score step, with replicated outputs.
      params: the model's parameters.
      dataset: tokenised text.
      config: gives the batch size.
      mesh: the mesh that `params` lie on.
      limit: most batches to score; None is all.
      between: see `score`.
    """
    return score(
        step,
        params,
        validation_batches(dataset, config, mesh, limit=limit),
        bytes_per_token=dataset.statistics["validation"].bytes_per_target,
        between=between,
    )


def validation_batches(
    dataset: Dataset, config: RunConfig, mesh: Mesh, *, limit: int | None = None
) -> Iterator[dict[str, jax.Array]]:
    """The batches that `score_dataset` scores, on the mesh's devices."""
    batches = dataset.validation_batches(
        batch_size=config.data.batch_size // config.training.grad_accumulation
    )
    total = len(batches)
    wanted = min(limit or total, total)
    for index, batch in enumerate(batches):
        if index * wanted % total < wanted:  # `wanted` of them, from beginning to end
            yield to_devices(batch, mesh)


def summarise(nll: np.ndarray, tokens: np.ndarray, *, bytes_per_token: float) -> Score:
    """Token-weighted mean over rows, and the standard error of that ratio.

    Args:
      nll: summed nats of each row (N,).
      tokens: scored tokens of each row (N,); rows without any are left out.
      bytes_per_token: UTF-8 bytes of text for each target.

    Raises:
      ValueError: no token was scored.
    """
    nll, tokens = nll[tokens > 0], tokens[tokens > 0]
    if not len(tokens):
        raise ValueError("there is nothing to score: no tokens")
    total, rows = int(tokens.sum()), len(tokens)
    loss = float(nll.sum() / total)
    residual = nll - loss * tokens
    spread = math.sqrt(float(np.square(residual).sum()) * rows / max(rows - 1, 1)) / total
    return Score(
        loss=loss,
        standard_error=spread if rows > 1 else math.nan,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=loss / math.log(2) / bytes_per_token,
        tokens=total,
        sequences=rows,
    )

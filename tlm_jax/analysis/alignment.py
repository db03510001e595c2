"""How much of what a layer adds points along the residual stream, layer by layer.

Means over tokens (arXiv 2606.23670, eq. 8 and 9): rho_mlp = cos(F_l(z_l), h_l), where F_l(z_l)
is what the MLP branch of layer l adds to the stream and h_l the stream before the layer;
rho_block = cos(h_{l+1} - h_l, h_l). cos(F_l(z_l), z_l), against the stream that the MLP itself
reads, is reported too; and, because some models give the first token of a text a huge norm,
all of it once more without tokens that have nothing before them. In a chain of MLPs the branch
is what the whole chain adds.

Shapes: B batch, L length, D model, N layers, R references.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from tlm_jax import output
from tlm_jax.config import RunConfig, UserError
from tlm_jax.data import open_dataset
from tlm_jax.data.tokenizers import Tokenizer, load_tokenizer
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.distributed.sharding import to_devices
from tlm_jax.models import Skeleton, skeleton
from tlm_jax.training import restore

Batch = dict[str, Any]

MEASURES = {"h": "MLP, h", "z": "MLP, z", "block": "block, h"}
"""What is compared with which stream: the MLP's branch with h_l and z_l, the layer's with h_l."""
AFTER_FIRST = "_after_first"
LABELS = MEASURES | {f"{n}{AFTER_FIRST}": f"{w}, after pos. 0" for n, w in MEASURES.items()}
REFERENCES = tuple(LABELS)
"""The measures over all tokens, then without first ones."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alignment:
    """Mean cosines of a model on a text."""

    mlp_widths: tuple[int, ...]
    """One per layer."""
    rho: dict[str, tuple[float, ...]]
    """By reference: the mean cosine of each layer, first to last."""
    pearson: dict[str, float]
    """By reference: correlation of layer and rho; NaN with fewer than two layers."""
    tokens: int
    """Tokens averaged over."""
    first_tokens: int
    """Of them at position 0."""


def measure(
    folder: pathlib.Path, step: int, config: RunConfig, *, text: pathlib.Path | None, tokens: int
) -> Alignment:
    """Measures a checkpoint, in float32.

    Args:
      folder: the run folder.
      step: which checkpoint.
      config: its config.
      text: a file to read; None is the validation split of the run's data.
      tokens: about how many, in batches spread evenly over the text.

    Raises:
      UserError: the text cannot be read, or see `restore.load_params`.
    """
    mesh = mesh_lib.make_mesh(config)
    model = skeleton(dataclasses.replace(config.model, compute_dtype="float32"))
    if text is None:
        dataset = open_dataset(config.data, config.model.vocab_size)
        tokenizer = dataset.tokenizer
        batches: Any = dataset.validation_batches()
    else:
        tokenizer = load_tokenizer(config.data.tokenizer)
        batches = text_batches(text, tokenizer, config.data.batch_size, config.data.seq_len)
    wanted = math.ceil(tokens / (config.data.batch_size * config.data.seq_len))
    with jax.set_mesh(mesh):
        params = restore.load_params(folder, step, model, tokenizer, mesh)
        return align(model, params, (to_devices(b, mesh) for b in spread(batches, wanted)))


def spread(batches: Any, count: int) -> Iterator[Batch]:
    """So many batches, or all if there are fewer, evenly over a sequence of them."""
    stride = max(1, len(batches) // count)
    return itertools.islice(batches, 0, stride * count, stride)


def text_batches(
    path: pathlib.Path, tokenizer: Tokenizer, batch_size: int, seq_len: int
) -> list[Batch]:
    """A text as rows that each begin with the end-of-text token; the last is padded.

    Raises:
      UserError: the file cannot be read as UTF-8, or is empty.
    """
    try:
        ids = tokenizer.encode(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text {path} cannot be read: {error}") from error
    if not ids:
        raise UserError(f"text {path} is empty")
    room = seq_len - 1
    count = math.ceil(len(ids) / room)
    rows = np.zeros((math.ceil(count / batch_size) * batch_size, seq_len), np.int32)
    document_ids = np.zeros_like(rows)
    for index in range(count):
        row = [tokenizer.eot_id, *ids[index * room : (index + 1) * room]]
        rows[index, : len(row)] = row
        document_ids[index, : len(row)] = 1
    positions = np.broadcast_to(np.arange(seq_len, dtype=np.int32), rows.shape)
    return [
        {
            "inputs": rows[start : start + batch_size],
            "positions": positions[start : start + batch_size],
            "document_ids": document_ids[start : start + batch_size],
        }
        for start in range(0, len(rows), batch_size)
    ]


def align(model: Skeleton, params: Any, batches: Iterable[Batch]) -> Alignment:
    """The alignment of parameters on batches that are on the device."""
    sums_RN, counts_2 = np.zeros((len(REFERENCES), model.config.num_layers)), np.zeros(2, int)
    step = jax.jit(lambda params, batch: _sums(model, params, batch))
    for batch in batches:
        sums, counts = step(params, batch)
        sums_RN += np.asarray(sums, np.float64)
        counts_2 += np.asarray(counts)
    return mean(model.config.mlp_widths, sums_RN, *map(int, counts_2))


def mean(mlp_widths: tuple[int, ...], sums_RN: np.ndarray, tokens: int, first: int) -> Alignment:
    """From cosines summed over tokens.

    Args:
      mlp_widths: one per layer.
      sums_RN: in the order of `REFERENCES`.
      tokens: how many.
      first: how many of them at position 0.
    """
    counts_R = np.repeat([tokens, tokens - first], len(MEASURES))
    rho = {
        name: tuple((sums_N / max(count, 1)).tolist())
        for name, sums_N, count in zip(REFERENCES, sums_RN, counts_R, strict=True)
    }
    return Alignment(
        mlp_widths=mlp_widths,
        rho=rho,
        pearson={name: pearson(values) for name, values in rho.items()},
        tokens=tokens,
        first_tokens=first,
    )


def pearson(values: tuple[float, ...]) -> float:
    """The correlation of values with their index."""
    if len(values) < 2 or len(set(values)) == 1:
        return math.nan
    return float(np.corrcoef(np.arange(len(values)), values)[0, 1])


def _sums(model: Skeleton, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Cosines summed over tokens (R, N), and the tokens: all, and those at position 0."""
    positions_BL, document_ids_BL = batch["positions"], batch["document_ids"]
    all_BL = document_ids_BL > 0
    after_first_BL = all_BL & (positions_BL > 0)
    merged = model.merge(params)

    def layer(block: Any, h_BLD: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        z_BLD, _ = block.mix(h_BLD, None, positions_BL, document_ids_BL)
        y_BLD, branch_BLD = z_BLD, jnp.zeros_like(z_BLD)
        for level in block.mlp.values():
            added_BLD = level.branch(y_BLD)  # y - z would lose digits beside a large stream
            y_BLD, branch_BLD = y_BLD + added_BLD, branch_BLD + added_BLD
        added_BLD = z_BLD - h_BLD + branch_BLD
        pairs = ((branch_BLD, h_BLD), (branch_BLD, z_BLD), (added_BLD, h_BLD))
        cosines = [_cosine(*pair) for pair in pairs]  # in the order of MEASURES
        sums_R = jnp.stack(
            [jnp.sum(c, where=where) for where in (all_BL, after_first_BL) for c in cosines]
        )
        return y_BLD, sums_R

    _, sums = merged.segments.fold(layer, merged.embedding[...][batch["inputs"]])
    counts = jnp.stack([jnp.sum(all_BL), jnp.sum(all_BL) - jnp.sum(after_first_BL)])
    return merged.segments.per_layer(sums).T, counts


def _cosine(a_BLD: jax.Array, b_BLD: jax.Array) -> jax.Array:
    """Cosine of each token's vectors (B, L); 0 where one of them is zero."""
    norms_BL = jnp.linalg.norm(a_BLD, axis=-1) * jnp.linalg.norm(b_BLD, axis=-1)
    dots_BL = jnp.sum(a_BLD * b_BLD, axis=-1)
    return jnp.where(norms_BL > 0, dots_BL / jnp.where(norms_BL > 0, norms_BL, 1.0), 0.0)


def table(title: str, alignment: Alignment) -> Table:
    """One row per layer, and the correlations below."""
    result = Table(
        title=f"{title}: mean cosine of what is added with the residual stream, "
        f"{alignment.tokens:,} tokens, {alignment.first_tokens:,} of them at position 0",
        caption="r: Pearson's correlation with the layer's number",
        show_footer=True,
    )
    result.add_column("layer", "r", justify="right")
    result.add_column("width", justify="right")
    for name, label in LABELS.items():
        result.add_column(label, f"{alignment.pearson[name]:+.2f}", justify="right")
    for layer, width in enumerate(alignment.mlp_widths):
        values = (f"{alignment.rho[name][layer]:+.4f}" for name in REFERENCES)
        result.add_row(str(layer), f"{width:,}", *values)
    return result


def side_by_side(records: Sequence[Mapping[str, Any]], reference: str = "h") -> str:
    """Measurements of several checkpoints as a Markdown table, one column each.

    Args:
      records: what `tlm align` wrote, parsed; models of equal depth.
      reference: one of `REFERENCES`.
    """
    names = [one["checkpoint"] for one in records]
    if len(set(names)) < len(names):  # several steps of one run
        names = [f"{one['checkpoint']}, step {one['step']:,}" for one in records]
    lines = []
    for layer in range(len(records[0]["mlp_widths"])):
        cells = (f"{r['rho'][reference][layer]:+.3f} ({r['mlp_widths'][layer]})" for r in records)
        lines.append([str(layer), *cells])
    lines.append(["Pearson r", *(f"{r['pearson'][reference]:+.2f}" for r in records)])
    return output.markdown_table(["layer", *names], lines)

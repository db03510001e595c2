"""Segments: runs of equal layers, stored stacked and run as one scan.

A model is a list of layer specs; neighbours with equal specs form a segment,
whose parameters carry a leading layer dim. Parameters enter a scan as its
inputs and never leave it, so that no copy of them is made.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

STREAM, ATTENTION = "stream", "attention"
"""Names of values that a policy may keep: a layer's input, what attention's kernel gives."""
POLICIES: dict[str, Callable[..., Any] | None] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[STREAM],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""What the backward pass finds, besides each layer's input, and need not compute again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentSpec:
    """`length` equal layers from layer `start` on."""

    start: int
    length: int
    layer: Any


def group(layers: Sequence[Any]) -> tuple[SegmentSpec, ...]:
    """Groups equal neighbours of a list of layer specs."""
    segments = []
    for spec, run in itertools.groupby(enumerate(layers), key=lambda pair: pair[1]):
        indices = [index for index, _ in run]
        segments.append(SegmentSpec(start=indices[0], length=len(indices), layer=spec))
    return tuple(segments)


def stack(make_layer: Callable[[jax.Array], nnx.Module], keys: jax.Array) -> Any:
    """Makes one layer per key and stacks their parameters along a new first dim.

    The initialiser runs under vmap, so it sees the shapes of a single layer: a
    stacked shape would count the layer dim into the fan-in.
    """
    return jax.vmap(make_layer)(keys)


def layer_at(stacked: Any, index: int) -> Any:
    """Layer `index` of a stacked segment."""
    return jax.tree.map(lambda a: a[index], stacked)


def run_segment(
    stacked: Any,
    x: jax.Array,
    cache: Any,
    *args: jax.Array,
    length: int,
    remat: str,
    scan: bool,
) -> tuple[jax.Array, Any]:
    """Applies the layers of a segment one after the other.

    Args:
      stacked: a layer module whose parameters have a leading dim of `length`.
      x: the residual stream (B, L, D).
      cache: the layers' caches, stacked likewise, or None.
      *args: passed on to every layer as `layer(x, *args, cache)`.
      length: layers in the segment.
      remat: none, or one of `POLICIES`; each layer is rematerialised by itself, so that
        one layer's activations are alive at a time in the backward pass.
      scan: False unrolls the loop.

    Returns:
      The residual stream, and the new caches stacked, or None.
    """
    unrolled = length == 1 or not scan

    def body(carry: jax.Array, layer_and_cache: Any) -> tuple[jax.Array, Any]:
        layer, layer_cache = layer_and_cache
        carry = checkpoint_name(carry, STREAM)
        return layer(carry, *args, layer_cache)

    if remat != "none":
        # In straight-line code XLA would merge the recomputation with the forward
        # pass and so undo it; inside a loop it cannot, and the barrier costs memory.
        body = jax.checkpoint(body, policy=POLICIES[remat], prevent_cse=unrolled)
    if not unrolled:
        return jax.lax.scan(body, x, (stacked, cache))
    # Unstacked all at once, so that gradients are stacked once: those of indexing are sums of
    # arrays that are zero but for one layer.
    leaves, tree = jax.tree.flatten((stacked, cache))
    caches = []
    for parts in zip(*map(jax.numpy.unstack, leaves), strict=True):
        x, new = body(x, jax.tree.unflatten(tree, parts))
        caches.append(new)
    return x, jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *caches)

"""A stack of layers of unequal shape, for any Flax NNX module.

A list of layer specs and a constructor go in. Layers that repeat are stacked, run as one scan and
rematerialised one by one; parameters enter a scan as its inputs and never leave it, so that they
are not copied. Nothing here knows of language: examples/vit.py stacks layers of another kind.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from tlm_jax import segments
from tlm_jax.ops import ATTENTION

STREAM = "stream"
"""Name of a layer's input in rematerialisation policies."""
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
"""What is kept for the backward pass besides each layer's input, and not recomputed."""

MakeLayer = Callable[..., nnx.Module]
Body = Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]


class Stack(nnx.Module):
    """Layers one after the other, given as data.

        stack = Stack(specs, make_layer, key=key, remat="full")
        y = stack(x, *args)                        # layer(x, *args) -> x, for each layer

    Layer l draws its parameters from `fold_in(key, l)`, whatever the others are: a tapered
    stack and its uniform twin start from equal parameters wherever their shapes are equal.

    Layers are pure: what a layer changes in itself when called is lost. What it needs for
    itself besides parameters, such as a dropout key, comes in through `fold` and `per_segment`.

    Args:
      specs: one hashable spec per layer; equal specs have equal shapes.
      make_layer: called as `make_layer(spec, rngs=rngs)`; returns a module.
      key: of all parameters.
      remat: "none", or one of `POLICIES`.
      scan: False unrolls the layers of a segment, which compiles longer.

    Raises:
      ValueError: there is no layer, or no such policy.
    """

    def __init__(
        self,
        specs: Sequence[Hashable],
        make_layer: MakeLayer,
        *,
        key: jax.Array,
        remat: str = "none",
        scan: bool = True,
    ):
        if not specs:
            raise ValueError("a stack needs at least one layer")
        if remat not in ("none", *POLICIES):
            raise ValueError(f"unknown remat {remat!r}; known: none, {', '.join(POLICIES)}")
        self.layout = segments.group(tuple(specs))
        self.remat, self.scan = remat, scan
        for index, segment in enumerate(self.layout):
            parts = [
                _stacked(functools.partial(make_layer, spec), key, segment.layers(place))
                for place, spec in enumerate(segment.pattern)
            ]
            named = nnx.Dict({str(place): part for place, part in enumerate(parts)})
            setattr(self, _name(index), parts[0] if len(parts) == 1 else named)

    def __call__(self, x: jax.Array, *args: Any) -> jax.Array:
        """`x = layer(x, *args)` for each layer; `args` are the same for all."""
        return self.fold(lambda layer, x, _: (layer(x, *args), None), x)[0]

    def layer(self, index: int) -> Any:
        """Layer `index` by itself, counted from 0."""
        for number, segment in enumerate(self.layout):
            if segment.start <= index < segment.stop:
                repeat, place = divmod(index - segment.start, len(segment.pattern))
                return _at(self._pattern(number)[place], repeat)
        raise IndexError(f"layer {index} of {self.layout[-1].stop}")

    def init_cache(self, *args: Any) -> list[Any]:
        """`layer.init_cache(*args)` of each layer, first to last."""
        caches = []
        for number, segment in enumerate(self.layout):
            layers = [_at(layer, 0) for layer in self._pattern(number)]
            for _ in range(segment.repeats):
                caches += [layer.init_cache(*args) for layer in layers]
        return caches

    def decode(
        self, x: jax.Array, cache: list[Any], *args: Any, in_loops: bool = False
    ) -> tuple[jax.Array, list[Any]]:
        """`x, cache = layer.decode(x, cache, *args)` for each layer, each with its own cache.

        Layers run one by one: a loop would copy every cache, to change one token of it. With
        `in_loops` equal layers are a loop nevertheless, as in `fold`, which compiles faster: for
        tokens so many that a copy is little.
        """
        if in_loops and self.scan:
            inputs, end = [], 0
            for segment in self.layout:
                places = len(segment.pattern)
                begin, end = end, end + segment.repeats * places
                inputs.append(
                    tuple(_stack(cache[begin + place : end : places]) for place in range(places))
                )
            x, outputs = self.fold(lambda layer, x, one: layer.decode(x, one, *args), x, inputs)
            return x, [
                _at(part, repeat)
                for segment, output in zip(self.layout, outputs, strict=True)
                for repeat in range(segment.repeats)
                for part in output
            ]
        caches = []
        for index, before in enumerate(cache):
            x, after = self.layer(index).decode(x, before, *args)
            caches.append(after)
        return x, caches

    def fold(
        self, body: Body, x: jax.Array, inputs: list[Any] | None = None
    ) -> tuple[jax.Array, list[Any]]:
        """Carries x through the layers: `x, output = body(layer, x, input)` for each.

        Args:
          body: called once for each layer of each segment's pattern.
          x: the carry, of constant shape and dtype.
          inputs: one per layer, stacked as the layers are; `per_segment` makes them.

        Returns:
          The carry, and the outputs, stacked as the layers are; see `per_layer`.
        """
        outputs = []
        for index, segment in enumerate(self.layout):
            given = None if inputs is None else inputs[index]
            with jax.named_scope(f"segment_{index}"):
                x, output = self._run(segment, self._pattern(index), body, x, given)
            outputs.append(output)
        return x, outputs

    def per_layer(self, outputs: list[Any]) -> Any:
        """Outputs of `fold` with one leading dim over all layers, first to last."""

        def in_order(*parts: jax.Array) -> jax.Array:
            return jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])

        ordered = [jax.tree.map(in_order, *output) for output in outputs]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *ordered)

    def per_segment(self, values: Any) -> list[Any]:
        """Inputs of `fold` from arrays with one leading dim over all layers, first to last.

        Dropout, whose keys differ from layer to layer:

            keys = stack.per_segment(jax.random.split(key, num_layers))
            x, _ = stack.fold(lambda layer, x, key: (layer(x, key), None), x, keys)
        """

        def part(segment: segments.Segment[Any], place: int) -> Any:
            return jax.tree.map(lambda a: a[jnp.asarray(segment.layers(place))], values)

        return [tuple(part(s, place) for place in range(len(s.pattern))) for s in self.layout]

    def _pattern(self, index: int) -> tuple[Any, ...]:
        part = getattr(self, _name(index))
        places = len(self.layout[index].pattern)
        return (part,) if places == 1 else tuple(part[str(place)] for place in range(places))

    def _run(
        self,
        segment: segments.Segment[Any],
        pattern: tuple[Any, ...],
        body: Body,
        x: jax.Array,
        inputs: Any,
    ) -> tuple[jax.Array, Any]:
        unrolled = segment.repeats == 1 or not self.scan

        def layer_body(x: jax.Array, layer: Any, given: Any) -> tuple[jax.Array, Any]:
            return body(layer, checkpoint_name(x, STREAM), given)

        if self.remat != "none":
            # In straight-line code XLA would merge the recomputation with the forward pass and
            # so undo it; inside a loop it cannot, and the barrier costs memory.
            layer_body = jax.checkpoint(
                layer_body, policy=POLICIES[self.remat], prevent_cse=unrolled
            )

        def repeat(x: jax.Array, layers_and_inputs: Any) -> tuple[jax.Array, Any]:
            layers, given = layers_and_inputs
            outputs = []
            for place, layer in enumerate(layers):
                x, output = layer_body(x, layer, None if given is None else given[place])
                outputs.append(output)
            return x, tuple(outputs)

        if not unrolled:
            return jax.lax.scan(repeat, x, (pattern, inputs), length=segment.repeats)
        # Unstacked all at once, so that gradients are stacked once: those of indexing are sums of
        # arrays that are zero but for one layer.
        leaves, tree = jax.tree.flatten((pattern, inputs))
        unstacked = [jnp.unstack(leaf) for leaf in leaves]
        outputs = []
        for index in range(segment.repeats):
            parts = [leaf[index] for leaf in unstacked]
            x, output = repeat(x, jax.tree.unflatten(tree, parts))
            outputs.append(output)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def logical_axes(variable: nnx.Variable, ndim: int) -> tuple[str | None, ...]:
    """Names of a parameter's dims; those that stacking put in front are `layers`.

    They are the variable's metadata `logical_axes`, one name per dim of one layer; a variable
    without has no names.
    """
    axes = tuple(variable.get_metadata("logical_axes", None) or (None,) * ndim)
    return ("layers",) * (ndim - len(axes)) + axes


def _stacked(make: MakeLayer, key: jax.Array, layers: range) -> Any:
    """One module whose parameters carry a leading dim over the layers.

    The constructor runs under vmap and sees the shapes of a single layer: with a stacked shape
    an initialiser would count the layers into the fan-in.
    """
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.asarray(layers))
    return jax.vmap(lambda key: make(rngs=nnx.Rngs(params=key)))(keys)


def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _at(stacked: Any, index: int) -> Any:
    return jax.tree.map(lambda a: a[index], stacked)


def _name(index: int) -> str:
    return f"{index:03d}"

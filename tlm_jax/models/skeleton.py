"""A model without its numbers, and the way back to one with them."""

import dataclasses
import functools
import math
from typing import Any

import jax
from flax import nnx

from tlm_jax.config import ModelConfig, UserError
from tlm_jax.models.decoder import LanguageModel
from tlm_jax.stack import logical_axes

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skeleton:
    """A model without its numbers: structure, shapes and logical axes.

    Parameters travel through training and checkpoints as a plain nested dict of
    arrays; `merge` makes a model of them.
    """

    config: ModelConfig
    graphdef: Any
    state: Any

    @property
    def shapes(self) -> Params:
        """`jax.ShapeDtypeStruct` of each parameter."""
        return nnx.to_pure_dict(self.state)

    @property
    def logical_axes(self) -> Params:
        """Logical axis names of each parameter; a stack's first dim is `layers`."""

        def names(path: Any, leaf: Any) -> tuple[str | None, ...]:
            return logical_axes(self._variable(path), leaf.ndim)

        return jax.tree_util.tree_map_with_path(names, self.shapes)

    @property
    def decays(self) -> Params:
        """Whether weight decay acts on each parameter.

        It does on matrices: what has two dims or more in a single layer. A parameter says
        otherwise by its metadata `decays` (docs/training.md lists which do).
        """

        def decays(path: Any, leaf: Any) -> bool:
            dims = leaf.ndim - (path[0].key == "segments")  # stacks have one for the layers
            return bool(self._variable(path).get_metadata("decays", dims >= 2))

        return jax.tree_util.tree_map_with_path(decays, self.shapes)

    def _variable(self, path: Any) -> Any:
        return functools.reduce(lambda node, key: node[key.key], path, self.state)

    @property
    def num_params(self) -> int:
        """Parameters in all."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.shapes))

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters; jit it with out_shardings to create them sharded."""
        return _init(self.config, key)

    def merge(self, params: Params) -> LanguageModel:
        """The model with these parameters."""
        state = jax.tree.map(lambda leaf: leaf, self.state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self.graphdef, state)


@functools.partial(jax.jit, static_argnums=0)  # operation by operation it takes seconds
def _init(config: ModelConfig, key: jax.Array) -> Params:
    model = LanguageModel(config, key=key)
    return nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])


@functools.lru_cache(maxsize=64)
def skeleton(config: ModelConfig) -> Skeleton:
    """Traces the model's constructor without allocating anything.

    Raises:
      UserError: a parameter has no values; checkpoints cannot hold such.
    """
    abstract = nnx.eval_shape(lambda: LanguageModel(config, key=jax.random.key(0)))
    graphdef, state = nnx.split(abstract, nnx.Param)
    result = Skeleton(config=config, graphdef=graphdef, state=state)
    for path, leaf in by_path(result.shapes).items():
        if leaf.size == 0:
            raise UserError(f"parameter {path} of shape {leaf.shape} is empty; make it None")
    return result


Place = tuple[str, range | None]
"""(path below the layer, the layers that it stacks or None)."""


def place(config: ModelConfig, path: str) -> Place:
    """Which layers a parameter, such as `segments/003/mixer/query`, stacks."""
    if not path.startswith("segments/"):
        return path, None
    _, number, rest = path.split("/", 2)
    segment, place = config.segments[int(number)], "0"
    if len(segment.pattern) > 1:
        place, rest = rest.split("/", 1)
    return rest, segment.layers(int(place))


def path_of(keys: Any) -> str:
    """The place of a leaf in a tree as one name, such as `segments/000/mlp/0/gate`."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, in the tree's order."""
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}

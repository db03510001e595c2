"""Parameters out of tensor files, each device's share read by itself."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tlm_jax.config import UserError
from tlm_jax.distributed import sharding
from tlm_jax.interop import llama, own_exports
from tlm_jax.interop.tensors import TensorSource
from tlm_jax.models import Skeleton
from tlm_jax.models.skeleton import Place, by_path, path_of, place

_DIMS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_HARMLESS = 1 << 20
"""Numbers of a config up to here, such as the length of a chunk, cost nothing."""
Index = tuple[slice, ...]
Spelling = Callable[[str, int | None], llama.Tensor]
"""As `llama.tensor`."""


def load(
    skeleton: Skeleton,
    source: TensorSource,
    mesh: Mesh,
    *,
    native: bool,
    spell: Spelling = llama.tensor,
) -> Any:
    """The parameters of a model, placed on a mesh.

    Tensors are read one at a time, and of each no more than this process's devices hold.

    Args:
      skeleton: the model's structure.
      source: tensors under our names (`native`) or as `spell` says.
      mesh: where the parameters go.
      native: whether the names are ours.
      spell: how else a layer's tensors are spelled.

    Raises:
      UserError: a tensor is missing, of another shape, or none of the model's.
    """
    config = skeleton.config
    check(skeleton, source, native=native, spell=spell)
    shardings = sharding.param_shardings(skeleton.shapes, skeleton.logical_axes, mesh)

    def one(keys: Any, leaf: jax.ShapeDtypeStruct, where: jax.sharding.NamedSharding) -> jax.Array:
        path = path_of(keys)
        read: Callable[[Index], np.ndarray]
        if native:
            read = functools.partial(_part, source, llama.Tensor(name=path), leaf.shape)
        else:
            read = functools.partial(_stack, source, spell, place(config, path), leaf.shape)
        return jax.make_array_from_callback(leaf.shape, where, read)

    return jax.tree_util.tree_map_with_path(one, skeleton.shapes, shardings)


def check(
    skeleton: Skeleton, source: TensorSource, *, native: bool, spell: Spelling = llama.tensor
) -> None:
    """Raises `UserError` unless the source holds exactly the model's tensors."""
    wanted = expected_shapes(skeleton, native=native, spell=spell)
    for name, shape in wanted.items():
        if name not in source.shapes:
            raise UserError(f"{source.where} has no tensor {name}, which its config asks for")
        if source.shapes[name] != shape:
            raise UserError(
                f"{source.where}: {name} has shape {source.shapes[name]}, and its config asks "
                f"for {shape}"
            )
    for name in source.shapes:
        if name not in wanted and not llama.is_ignored(name, skeleton.config):
            raise UserError(
                f"{source.where}: tensor {name} has no place in this model, so it cannot be "
                "imported exactly"
            )


def check_sizes(values: dict[str, Any], source: TensorSource) -> None:
    """Refuses a config with numbers that no tensor has, before anything of that size is made.

    So memory and time are bounded by the size of the files.

    Args:
      values: what config.json holds, and under `own_exports.KEY` perhaps the config of an export.
      source: the tensors.

    Raises:
      UserError: the field and its number.
    """
    shapes = {name: shape for name, shape in source.shapes.items() if math.prod(shape)}
    widest = max((max(shape, default=1) for shape in shapes.values()), default=0)
    # Under our own names the layers of a segment are stacked.
    layers = sum(s[0] if s and n.startswith("segments/") else 1 for n, s in shapes.items())
    limits = {"num_hidden_layers": layers} | dict.fromkeys(_DIMS, widest)
    sizes = [(name, values.get(name), most) for name, most in limits.items()]
    ours: Any = values
    for key in (own_exports.KEY, "config", "model"):
        ours = ours.get(key) if isinstance(ours, dict) else None
    most = max(_HARMLESS, sum(map(math.prod, shapes.values())))
    for name, value in _leaves(ours, f"{own_exports.KEY}.config.model"):
        sizes.append((name, value, layers if name.endswith(".num_layers") else most))
    for name, value, most in sizes:
        if isinstance(value, int | float) and value > most:
            raise UserError(
                f"{source.where}: {name} is {value:,}, and its tensors have room for {most:,} at "
                "most"
            )


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            yield from _leaves(inner, f"{name}.{key}")
    elif not name.endswith(".rope_theta"):
        yield name, value


def expected_shapes(
    skeleton: Skeleton, *, native: bool, spell: Spelling = llama.tensor
) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a model in a file."""
    found: dict[str, tuple[int, ...]] = {}
    for path, leaf in by_path(skeleton.shapes).items():
        if native:
            found[path] = leaf.shape
            continue
        rest, layers = place(skeleton.config, path)
        shape = leaf.shape if layers is None else leaf.shape[1:]
        for layer in layers or [None]:
            spelled = spell(rest, layer)
            found[spelled.name] = flat_shape(shape, spelled.inputs)
    return found


def flat_shape(shape: tuple[int, ...], inputs: int | None) -> tuple[int, ...]:
    """Shape in a file of a parameter whose first `inputs` dims are the input."""
    if inputs is None:
        return shape
    return (math.prod(shape[inputs:]), math.prod(shape[:inputs]))[: 2 if inputs else 1]


def _stack(
    source: TensorSource, spell: Spelling, where: Place, shape: tuple[int, ...], index: Index
) -> np.ndarray:
    path, layers = where
    if layers is None:
        return _part(source, spell(path, None), shape, index)
    parts = [_part(source, spell(path, layer), shape[1:], index[1:]) for layer in layers[index[0]]]
    return np.stack(parts)


def _part(
    source: TensorSource, spelled: llama.Tensor, shape: tuple[int, ...], index: Index
) -> np.ndarray:
    """What `index` cuts out of a parameter of this shape: rows are read, columns cut off."""
    inputs = spelled.inputs
    if inputs is None:
        start, stop, _ = index[0].indices(shape[0])
        return source.read(spelled.name, start, stop)[(slice(None), *index[1:])]
    outputs = shape[inputs:]
    start, stop, _ = index[inputs].indices(outputs[0])
    unit = math.prod(outputs[1:])
    rows = source.read(spelled.name, start * unit, stop * unit)
    block = rows.T.reshape(*shape[:inputs], stop - start, *outputs[1:])
    return np.ascontiguousarray(block[(*index[:inputs], slice(None), *index[inputs + 1 :])])

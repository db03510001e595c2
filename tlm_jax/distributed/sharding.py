"""Where arrays live: logical axis names to mesh axes, through one dataclass."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from tlm_jax.config import UserError

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """The mesh axis (or axes) of each logical axis; None is not split."""

    batch: MeshAxes = ("data", "fsdp")
    looked_up: MeshAxes = "data"
    """Rows of embeddings while they are still split by `embed`."""
    sequence: MeshAxes = "sequence"
    vocab: MeshAxes = "tensor"
    embed: MeshAxes = "fsdp"
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    head_dim: MeshAxes = None
    mlp: MeshAxes = "tensor"
    norm: MeshAxes = None
    layers: MeshAxes = None

    def spec(self, logical_axes: tuple[str | None, ...]) -> PartitionSpec:
        """The partition of an array whose dims carry these logical names.

        A name without a rule, as a custom layer may have, is not split.

        Raises:
          ValueError: one mesh axis for two dims.
        """
        axes = [None if name is None else getattr(self, name, None) for name in logical_axes]
        flat = [a for axis in axes for a in (axis if isinstance(axis, tuple) else (axis,)) if a]
        if len(flat) != len(set(flat)):
            raise ValueError(f"logical axes {logical_axes} use a mesh axis twice: {flat}")
        return PartitionSpec(*axes)


RULES = ShardingRules()


def param_shardings(
    shapes: Any, logical_axes: Any, mesh: Mesh | AbstractMesh, rules: ShardingRules = RULES
) -> Any:
    """A `NamedSharding` for each parameter.

    Args:
      shapes: pytree of shapes (`Skeleton.shapes`).
      logical_axes: names of their dims (`Skeleton.logical_axes`).
      mesh: the device mesh.
      rules: logical to mesh axes.

    Raises:
      UserError: a dim does not divide over its mesh axis.
    """

    def sharding(path: Any, shape: jax.ShapeDtypeStruct, axes: tuple[str | None, ...]) -> Any:
        spec = rules.spec(axes)
        for size, name, axis in zip(shape.shape, axes, spec, strict=True):
            parts = mesh_size(mesh, axis)
            if size % parts:
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                raise UserError(
                    f"{where}: {name} is {size} and does not divide over {parts} devices of mesh "
                    f"axis {axis}; use a multiple of {parts} (for MLP widths: "
                    "model.taper.multiple_of) or a smaller mesh axis"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, shapes, logical_axes)


def optimizer_shardings(tx: optax.GradientTransformation, shapes: Any, params: Any) -> Any:
    """Shardings of the optimizer's state: moments are placed like their parameters.

    What has another shape than its parameter (Adafactor's rows and columns) is on every device.
    """
    mesh = jax.tree.leaves(params)[0].mesh
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(leaf: Any, sharding: NamedSharding, parameter: Any) -> Any:
        if _is_masked(leaf):  # a part of an optimizer that is for other parameters only
            return leaf
        return sharding if leaf.shape == parameter.shape else replicated

    return optax.tree_utils.tree_map_params(
        tx,
        place,
        jax.eval_shape(tx.init, shapes),
        params,
        shapes,
        transform_non_params=lambda _: replicated,
        is_leaf=_is_masked,
    )


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def batch_sharding(mesh: Mesh, rules: ShardingRules = RULES) -> NamedSharding:
    """Rows over the data and fsdp axes; each row whole."""
    return NamedSharding(mesh, rules.spec(("batch",)))


def token_sharding(mesh: Mesh, rules: ShardingRules = RULES) -> NamedSharding:
    """Rows over the data and fsdp axes, the tokens of a row over the sequence axis."""
    return NamedSharding(mesh, rules.spec(("batch", "sequence")))


def rows_by_process(mesh: Mesh, batch_size: int) -> list[set[int]]:
    """The rows of a batch that the devices of each process need; the same on all processes."""
    where: dict[Any, Any] = dict(batch_sharding(mesh).devices_indices_map((batch_size,)))
    rows: list[set[int]] = [set() for _ in range(1 + max(d.process_index for d in where))]
    for device, (part,) in where.items():
        rows[device.process_index].update(range(*part.indices(batch_size)))
    return rows


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays of a batch (B, L), of which every process holds the rows it needs.

    Those are `rows_by_process`. Each process copies what its devices need, so that batches depend
    neither on the number of processes nor on the mesh.
    """
    where = token_sharding(mesh)
    return {
        name: jax.make_array_from_callback(a.shape, where, a.__getitem__)
        for name, a in batch.items()
    }


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Constrains an activation on the current mesh; a dim that does not divide is not split.

    Without it GSPMD may choose to split the model's width, or to add up partial products where
    weights should be gathered.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, fitting_spec(x.shape, logical_axes))


def fitting_spec(shape: tuple[int, ...], logical_axes: tuple[str | None, ...]) -> PartitionSpec:
    """The partition on the current mesh; a dim that does not divide is not split."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = [
        axis if size % mesh_size(mesh, axis) == 0 else None
        for size, axis in zip(shape, RULES.spec(logical_axes), strict=True)
    ]
    return PartitionSpec(*axes)


def sequence_shards() -> int:
    """Parts that the current mesh divides a row into."""
    return mesh_size(jax.sharding.get_abstract_mesh(), RULES.sequence)


def layer_shards() -> int:
    """Parts that the current mesh divides a layer into: those of its tokens times of its units.

    Rows and the `embed` dim do not count: over the latter, weights are gathered before their use.
    """
    return sequence_shards() * mesh_size(jax.sharding.get_abstract_mesh(), RULES.mlp)


def mesh_size(mesh: Mesh | AbstractMesh, axes: MeshAxes) -> int:
    """Devices along one or several axes; 1 for None."""
    names = axes if isinstance(axes, tuple) else (axes,)
    return math.prod(mesh.shape.get(name, 1) for name in names if name)

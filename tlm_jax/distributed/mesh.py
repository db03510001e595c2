"""Device meshes: axes data, fsdp and tensor, all in GSPMD's Auto mode.

Auto, because a user's own layer must work without sharding annotations.
"""

import contextlib
import math
import os

import jax
from jax.sharding import AxisType, Mesh

from tlm_jax.config import MeshConfig, RunConfig, UserError

AXES = ("data", "fsdp", "tensor")


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """Sizes of (data, fsdp, tensor), with -1 replaced by what is left.

    Raises:
      UserError: the sizes do not multiply to `num_devices`.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    if -1 in sizes:
        fixed = math.prod(s for s in sizes if s != -1)
        if num_devices % fixed:
            raise UserError(
                f"mesh {dict(zip(AXES, sizes, strict=True))} needs a multiple of {fixed} devices, "
                f"and there are {num_devices}"
            )
        sizes[sizes.index(-1)] = num_devices // fixed
    if math.prod(sizes) != num_devices:
        raise UserError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} needs {math.prod(sizes)} devices, "
            f"and there are {num_devices}; set one size to -1"
        )
    data, fsdp, tensor = sizes
    return data, fsdp, tensor


def make_mesh(config: RunConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of a run over all devices (or those given).

    Raises:
      UserError: the mesh does not fit the devices, or the batch not the mesh.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config.mesh, len(devices))
    parts = config.training.grad_accumulation
    rows, batch_shards = config.data.batch_size // parts, shape[0] * shape[1]
    if rows % batch_shards:
        fits = -(-rows // batch_shards) * batch_shards * parts
        raise UserError(
            f"data.batch_size={config.data.batch_size} in {parts} part(s) does not divide over "
            f"{batch_shards} devices (mesh data={shape[0]} fsdp={shape[1]}); "
            f"use data.batch_size={fits}"
        )
    return _mesh(shape, devices)


def device_mesh(config: MeshConfig) -> Mesh:
    """A mesh over all devices, or as many as its sizes ask for; no batch need fit it.

    Raises:
      UserError: the mesh does not fit the devices.
    """
    sizes = (config.data, config.fsdp, config.tensor)
    devices = jax.devices() if -1 in sizes else jax.devices()[: math.prod(sizes)]
    return _mesh(mesh_shape(config, len(devices)), devices)


def one_device_a_core() -> None:
    """On a CPU, makes a device of each core (of the first 4), before anything asks for devices.

    Rows that are shared out over them run side by side from beginning to end: a quarter faster
    than one device that shares out each operation. JAX_NUM_CPU_DEVICES says otherwise.
    """
    if "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    with contextlib.suppress(RuntimeError):  # devices that were asked for already stay
        jax.config.update("jax_num_cpu_devices", min(4, os.cpu_count() or 1))


def single_device_mesh() -> Mesh:
    """The first device alone."""
    return _mesh((1, 1, 1), jax.devices()[:1])


def _mesh(shape: tuple[int, int, int], devices: list[jax.Device]) -> Mesh:
    # make_mesh would give Explicit axes by default.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)

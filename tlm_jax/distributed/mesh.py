"""Device meshes: axes data, fsdp, sequence and tensor, all in GSPMD's Auto mode.

Auto, because a user's own layer must work without sharding annotations.
"""

import contextlib
import dataclasses
import math
import os

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from tlm_jax.config import MeshConfig, ModelConfig, RunConfig, UserError
from tlm_jax.validation import round_up

AXES = tuple(MeshConfig().sizes)


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Sizes of the axes, with -1 replaced by what is left.

    Raises:
      UserError: the sizes do not multiply to `num_devices`.
    """
    sizes = config.sizes
    wanted = " ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "data=1"
    fixed = math.prod(s for s in sizes.values() if s != -1)
    if num_devices % fixed or (-1 not in sizes.values() and fixed != num_devices):
        rule = "a multiple of " if -1 in sizes.values() else ""
        raise UserError(
            f"mesh {wanted} needs {rule}{fixed} devices, and there are {num_devices}; "
            + ("use smaller sizes" if rule else "set one size to -1")
        )
    return tuple(num_devices // fixed if s == -1 else s for s in sizes.values())


def make_mesh(config: RunConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of a run over all devices (or those given).

    Raises:
      UserError: the mesh does not fit the devices, or the batch or the model not the mesh.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config.mesh, len(devices))
    sizes = dict(zip(AXES, shape, strict=True))
    parts = config.training.grad_accumulation
    rows, batch_shards = config.data.batch_size // parts, sizes["data"] * sizes["fsdp"]
    if rows % batch_shards:
        fits = round_up(rows, batch_shards) * parts
        raise UserError(
            f"data.batch_size={config.data.batch_size} in {parts} part(s) does not divide over "
            f"{batch_shards} devices (mesh data={sizes['data']} fsdp={sizes['fsdp']}); "
            f"use data.batch_size={fits}"
        )
    _check_sequence(config, sizes["sequence"])
    _check_widths(config.model, sizes["tensor"])
    return _mesh(shape, devices)


def _check_widths(model: ModelConfig, parts: int) -> None:
    """MLP widths over the tensor axis, segment by segment, with a schedule that fits."""
    for index, segment in enumerate(model.segments):
        uneven = [w for spec in segment.pattern for w in spec.mlp_widths if w % parts]
        if not uneven:
            continue
        levels = len(model.mlp.periods)
        multiple = math.lcm(model.taper.multiple_of, parts * levels)
        taper = dataclasses.replace(model.taper, multiple_of=multiple)
        use = f"use --model.taper.multiple_of {multiple}"
        try:
            fits = dataclasses.replace(model, taper=taper)
        except ValueError as error:  # it says which mean width would do
            use += f" ({error})"
        else:
            if any(w % (parts * levels) for w in fits.mlp_widths):
                use = f"use --model.mlp_width {round_up(model.mlp_width, parts * levels)}"
        raise UserError(
            f"segment {index} (from layer {segment.start}): MLP width {uneven[0]} does not divide "
            f"over mesh tensor={parts}; {use}, or a smaller mesh.tensor"
        )


def _check_sequence(config: RunConfig, shards: int) -> None:
    if shards == 1:
        return
    model = config.model
    whole = [m for m in model.mixers if not m.splits_sequence]
    if whole or model.mlp.online_chunks:
        what = whole[0].describe(model.d_model) if whole else "mlp.online_chunks"
        raise UserError(
            f"mesh sequence={shards}: {what} reads a row from its beginning to its end and cannot "
            "split it; use the axes data, fsdp and tensor"
        )
    for name, size in (("data.seq_len", config.data.seq_len), ("training.loss_chunk", 0)):
        size = size or min(config.training.loss_chunk, config.data.seq_len)
        if size % shards:
            raise UserError(
                f"{name}={size} does not divide over mesh sequence={shards}; "
                f"use {round_up(size, shards)}"
            )


def device_mesh(config: MeshConfig) -> Mesh:
    """A mesh over all devices, or as many as its sizes ask for; it need not fit a batch.

    Raises:
      UserError: the mesh does not fit the devices.
    """
    sizes = config.sizes.values()
    devices = jax.devices() if -1 in sizes else jax.devices()[: math.prod(sizes)]
    return _mesh(mesh_shape(config, len(devices)), devices)


def one_device_a_core() -> None:
    """On a CPU, makes one device per core (of the first 4), before anything asks for devices.

    Rows that are shared out over them run side by side from beginning to end: a quarter faster
    than one device that shares out each operation. JAX_NUM_CPU_DEVICES says otherwise.
    """
    if "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    with contextlib.suppress(RuntimeError):  # devices that were asked for already stay
        jax.config.update("jax_num_cpu_devices", min(4, os.cpu_count() or 1))


def single_device_mesh() -> Mesh:
    """The first device alone."""
    return _mesh((1,) * len(AXES), jax.devices()[:1])


def _mesh(shape: tuple[int, ...], devices: list[jax.Device]) -> Mesh:
    auto = (AxisType.Auto,) * len(AXES)  # make_mesh would give Explicit axes by default
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)
    return Mesh(_over_slices(shape, devices, slices), AXES, axis_types=auto)


def _over_slices(shape: tuple[int, ...], devices: list[jax.Device], slices: int) -> np.ndarray:
    """Devices of several TPU slices: only the data axis crosses the slow network between them.

    Raises:
      UserError: the data axis does not divide over the slices.
    """
    data, *inner = shape
    if data % slices:
        raise UserError(
            f"mesh data={data} does not divide over {slices} slices, and no other axis may cross "
            f"them; use data={slices} or a multiple, with {len(devices) // slices} "
            "devices per slice"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *inner), (slices, *(1 for _ in inner)), devices
    )

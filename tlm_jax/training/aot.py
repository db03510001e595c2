"""Ahead-of-time compilation: the real train and evaluation steps for devices that this machine does
not have."""

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from tlm_jax import costs, ops
from tlm_jax.config import RunConfig
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.distributed.collectives import Collectives, collectives
from tlm_jax.distributed.products import product_flops
from tlm_jax.evaluation import perplexity
from tlm_jax.models import Skeleton, skeleton
from tlm_jax.models.settings import attention_kernel
from tlm_jax.training import distillation, step
from tlm_jax.training.updates import About, make_optimizer
from tlm_jax.validation import largest

STEPS = ("train", "evaluation")
_GIB = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2**10}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a program needs on a device."""

    arguments: int
    """State and batch."""
    outputs: int
    """Results that do not take the place of arguments."""
    temporary: int
    """Activations, gradients and whatever else lives while it runs."""
    code: int
    peak: int = 0
    """Arguments, and the most that lives beside them at one moment; 0 where the compiler does not
    say. Temporaries can be more: the TPU compiler counts in them what takes each other's place."""

    @property
    def total(self) -> int:
        """All of it, without the peak."""
        return self.arguments + self.outputs + self.temporary + self.code

    @property
    def needed(self) -> int:
        """What has to be free on the device."""
        return self.peak + self.code if self.peak else self.total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler reports about a step."""

    name: str
    batch_size: int
    seconds: float
    """To trace, lower and compile."""
    memory: Memory | None
    """None when the program does not fit."""
    limit: int
    """Bytes that a program may use on a device."""
    refusal: str
    """The compiler's message about a program that does not fit, or nothing."""
    flops: float
    """Of matrix products on a device, in one step, as `costs` counts them."""
    products: float
    """The same in the compiled program, loops as often as they run: with what is recomputed,
    and what several devices compute alike; without kernels that it calls (Pallas)."""
    share: float
    """The products of the program before it was divided over the devices, by their number."""
    counted: float
    """FLOPs of all operations on a device by the compiler's count: loops once."""
    accessed: float
    """Bytes that operations on a device read and write, by the compiler's count: loops once."""
    collectives: tuple[Collectives, ...]

    @property
    def fits(self) -> bool:
        """Whether it can run."""
        return self.memory is not None and self.memory.needed <= self.limit


def for_devices(config: RunConfig) -> RunConfig:
    """The config with what `auto` means on a TPU, whatever this machine is."""
    model, dtype = config.model, config.model.compute_dtype
    dtype = "bfloat16" if dtype == "auto" else dtype
    parts = max(config.mesh.sequence, 1)
    length = config.data.seq_len // parts
    kernel = attention_kernel(model, length=length, parts=parts, target="tpu", dtype=dtype)
    settings: dict[str, Any] = {
        "compute_dtype": dtype,
        "attention_kernel": kernel or "xla",
        "scan_layers": model.scan_layers is not False,
    }
    return dataclasses.replace(config, model=dataclasses.replace(model, **settings))


def with_batch(config: RunConfig, batch_size: int) -> RunConfig:
    """The config with another batch."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=batch_size))


def compile_step(name: str, config: RunConfig, devices: list[Any], limit: int) -> Compiled:
    """Compiles the `train` or `evaluation` step of a run for devices.

    Args:
      name: one of `STEPS`.
      config: the run, with nothing left to `auto` (see `for_devices`).
      devices: real ones, or those of `distributed.topology`.
      limit: bytes that a program may use on each.

    Raises:
      UserError: config, mesh and devices do not fit each other.
    """
    mesh = mesh_lib.make_mesh(config, devices)
    model = skeleton(config.model)
    begin = time.perf_counter()
    memory, refusal, text = None, "", ""
    analysis: dict[str, float] = {}
    with ops.tracing_for(devices[0].platform):
        lowered = _LOWER[name](config, model, mesh)
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refusal = _refusal(error)
    else:
        memory = _memory(program.memory_analysis(), devices[0].platform)
        analysis, text = program.cost_analysis() or {}, program.as_text() or ""
    per_token = costs.model_costs(config.model, config.data.seq_len)
    flops = per_token.training_flops if name == "train" else per_token.forward_flops
    return Compiled(
        name=name,
        batch_size=config.data.batch_size,
        seconds=time.perf_counter() - begin,
        memory=memory,
        limit=limit,
        refusal=refusal,
        flops=flops * config.data.batch_size * config.data.seq_len / len(devices),
        products=product_flops(text),
        share=product_flops(lowered.as_text("hlo")) / len(devices),
        counted=analysis.get("flops", 0.0),
        accessed=analysis.get("bytes accessed", 0.0),
        collectives=collectives(text),
    )


def largest_batch(
    config: RunConfig, devices: list[Any], limit: int, *, tried: Callable[[Compiled], None]
) -> int | None:
    """The largest batch whose train step fits, in whole rows per device; None if none does.

    Doubles from one row for each part of the batch until a batch does not fit, then bisects.

    Args:
      config: the run; its batch size does not matter.
      devices: to compile for.
      limit: bytes that a program may use on each.
      tried: told of each attempt.
    """
    sizes = dict(zip(mesh_lib.AXES, mesh_lib.mesh_shape(config.mesh, len(devices)), strict=True))
    unit = sizes["data"] * sizes["fsdp"] * config.training.grad_accumulation

    def fits(rows: int) -> bool:
        result = compile_step("train", with_batch(config, rows * unit), devices, limit)
        tried(result)
        return result.fits

    return largest(fits) * unit or None


def _lower_train(config: RunConfig, model: Skeleton, mesh: Mesh) -> jax.stages.Lowered:
    tx = make_optimizer(
        config.optimizer, config.training.num_steps, About.of(model), config.model.mlp
    )
    teacher = distillation.find(config)
    return step.lower_train_step(
        config, model, tx, mesh, teacher=None if teacher is None else teacher.skeleton
    )


def _lower_evaluation(config: RunConfig, model: Skeleton, mesh: Mesh) -> jax.stages.Lowered:
    rows = config.data.batch_size // config.training.grad_accumulation
    score_step = perplexity.make_score_step(model, mesh, chunk=config.training.loss_chunk)
    params = step.abstract_params(model, mesh)
    with jax.set_mesh(mesh):
        return score_step.lower(params, step.abstract_batch(rows, config.data.seq_len, mesh))


_LOWER = {"train": _lower_train, "evaluation": _lower_evaluation}


def _memory(analysis: Any, platform: str) -> Memory:
    return Memory(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        temporary=analysis.temp_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
        peak=analysis.peak_memory_in_bytes if platform == "tpu" else 0,
    )


def _refusal(error: Exception) -> str:
    """The compiler's words on a program that does not fit.

    Raises:
      Exception: the error itself, where it is another one.
    """
    text = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        raise error
    needs = r"Used ([\d.]+)([KMGT]) of|temporaries \(([\d.]+)([KMGT])\)"
    if found := re.search(needs, text):
        used, unit = found.groups()[:2] if found[1] else found.groups()[2:]
        return f"{float(used) * _GIB[unit]:.2f} GiB"
    return text[:160]

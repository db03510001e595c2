"""What XLA makes of the steps of `benchmarks.gpu` for a GPU that is not there: time and memory.

    X/bin/python -m benchmarks.gpu_programs [--only NAME]

X has jax[cuda13], and needs no GPU: XLA compiles for a described one (`TARGET`). Each step is the
program that training would choose for its batch. Matrix products are not autotuned, so their
algorithms can differ from those that a card would choose. Writes a table to docs/gpu.md.
"""

import argparse
import os
import time
from typing import Any

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # which needs a driver
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"

import jax
from jax.experimental import topologies

from benchmarks import gpu, report
from benchmarks.train_worker import random_batch
from tlm_jax import ops
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.models import skeleton
from tlm_jax.ops import rows
from tlm_jax.training import step
from tlm_jax.training.updates import About, make_optimizer

TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""
"""An H200 as XLA's GpuTargetConfigProto: datasheet, and CUDA's limits of compute capability 9."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="arms whose name has this")
    options = parser.parse_args()
    pretend_hopper()
    devices = topologies.get_topology_desc("", "cuda", target_config=TARGET, topology="1x1x1")
    table = []
    for name, arm in gpu.steps(gpu.base_config(small=False)).items():
        if arm.torch is not None or options.only not in name:
            continue
        with ops.tracing_for("gpu"):
            program, seconds = compiled(arm, devices.devices)
        memory: Any = program.memory_analysis()
        sizes = [memory.temp_size_in_bytes, memory.argument_size_in_bytes]
        table.append([name, f"{seconds:.0f}", *(f"{size / 2**30:.1f}" for size in sizes)])
        print(table[-1], flush=True)
    header = ["model", "compile s", "temporaries GiB", "parameters and moments GiB"]
    said = f"Compiled for an H200 on {report.machine()}, without one."
    report.publish("gpu-programs", f"{report.table(header, table)}\n\n{said}", gpu.PAGE)


def pretend_hopper() -> None:
    """JAX asks the first device whether cuDNN can do packed rows; here it is a CPU."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    fused.check_cudnn_version = lambda: 91200
    fused.check_compute_capability = lambda capability: True


def compiled(arm: gpu.Step, devices: list[jax.Device]) -> tuple[jax.stages.Compiled, float]:
    """(train step of an arm, seconds)."""
    config = arm.config
    model = skeleton(config.model)
    num_steps = config.training.num_steps
    tx = make_optimizer(config.optimizer, num_steps, About.of(model), config.model.mlp)
    mesh = mesh_lib.make_mesh(config, devices)
    kind = rows.kind_on_host(random_batch(config, arm.documents)["document_ids"])
    begin = time.perf_counter()
    program = step.lower_train_step(config, model, tx, mesh, kind=kind).compile()
    return program, time.perf_counter() - begin


if __name__ == "__main__":
    main()

"""What the accelerator at hand computes, against float32 on this machine's CPU.

    python -m benchmarks.numerics [--results docs/results/h100_numerics.json]

1. Attention's kernels, with documents and grouped heads: output and gradients against plain
   float32 products on the CPU, relative errors.
2. Every architecture: loss and gradients of a small tapered model, in float32 on both.

With --results the table of docs/gpu.md is written too. Exits with status 1 when an error is
above its bound.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from tlm_jax import ops
from tlm_jax.architectures import ARCHITECTURES, with_architecture
from tlm_jax.config import AttentionConfig, DataConfig, ModelConfig, RunConfig
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.models import skeleton
from tlm_jax.models.loss import training_loss

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "gpu.md"
BOUNDS = {"bfloat16": 2e-2, "float32": 1e-4}
"""Relative errors allowed: bfloat16 has 8 bits; float32 in another order of sums."""


def error(found: Any, expected: Any) -> float:
    """Norm of the difference over the norm, all leaves together."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    far = [np.asarray(a, np.float64) - np.asarray(b, np.float64) for a, b in pairs]
    apart = sum(float(np.sum(d**2)) for d in far)
    return (apart / sum(float(np.sum(np.asarray(b, np.float64) ** 2)) for _, b in pairs)) ** 0.5


def attention(kernel: str, dtype: str) -> dict[str, Any]:
    """One kernel on packed documents, 8 query heads on 2 of keys."""
    rng = np.random.default_rng(0)
    B, L, H, N, K = 4, 1024, 8, 2, 64
    shapes = ((B, L, H, K), (B, L, N, K), (B, L, N, K), (B, L, H, K))
    q, k, v, weights = (rng.standard_normal(s, np.float32) for s in shapes)
    ids = np.cumsum(rng.random((B, L)) < 0.01, axis=1, dtype=np.int32)

    def run(kernel: str, dtype: str, device: Any) -> Any:
        def loss(q: Any, k: Any, v: Any) -> Any:
            q, k, v = (a.astype(dtype) for a in (q, k, v))
            y = ops.self_attention(q, k, v, on[4], kernel=kernel)
            return jnp.sum(y.astype(jnp.float32) * on[3]), y

        on = jax.device_put((q, k, v, weights, ids), device)
        step: Callable[..., Any] = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
        with jax.default_matmul_precision("highest"), jax.default_device(device):
            (_, y), gradients = step(*on[:3])
        return y, gradients

    (y, gradients), (y_cpu, gradients_cpu) = (
        run(kernel, dtype, jax.devices()[0]),
        run("xla", "float32", jax.devices("cpu")[0]),
    )
    return {
        "what": f"attention, {kernel}",
        "dtype": dtype,
        "output": error(y, y_cpu),
        "gradients": error(gradients, gradients_cpu),
    }


def model(architecture: str, dtype: str) -> dict[str, Any]:
    """Loss and gradients of a small tapered model."""
    config = RunConfig(
        model=ModelConfig(vocab_size=512, num_layers=4, d_model=128, mlp_width=384,
                          mixer=AttentionConfig(num_heads=4)),
        data=DataConfig(batch_size=4, seq_len=256),
    )  # fmt: skip
    config = with_architecture(config, architecture)
    rng = np.random.default_rng(0)
    shape = (4, 256)
    ids = rng.integers(0, 512, shape, dtype=np.int32)
    documents = 1 + np.cumsum(rng.random(shape) < 0.01, axis=1, dtype=np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch = {
        "inputs": ids,
        "targets": np.roll(ids, -1, 1),
        "document_ids": documents,
        "positions": positions,
    }

    cpu = jax.devices("cpu")[0]
    with jax.set_mesh(mesh_lib.make_mesh(config, [cpu])):
        initial = skeleton(config.model).init(jax.random.key(0))
        parameters = jax.tree.map(np.asarray, initial)

    def run(dtype: Any, device: Any) -> Any:
        built = skeleton(dataclasses.replace(config.model, compute_dtype=dtype))
        mesh = mesh_lib.make_mesh(config, [device])

        def loss(params: Any, batch: Any) -> Any:
            tokens = jnp.asarray(float(ids.size))
            return training_loss(built, params, batch, tokens, chunk=128, z_loss=0.0)[0]

        with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
            on = jax.device_put((parameters, batch), jax.sharding.NamedSharding(mesh, jax.P()))
            return jax.jit(jax.value_and_grad(loss))(*on)

    (out, gradients), (out_cpu, gradients_cpu) = (
        run(dtype, jax.devices()[0]),
        run("float32", cpu),
    )
    return {
        "what": f"model, {architecture}",
        "dtype": dtype,
        "output": error(out, out_cpu),
        "gradients": error(gradients, gradients_cpu),
    }


def publish(record: dict[str, Any]) -> None:
    """The table of docs/gpu.md."""
    rows = [
        [row["what"], row["dtype"], f"{row['output']:.1e}", f"{row['gradients']:.1e}"]
        for row in record["rows"]
    ]
    table = report.table(["what", "dtype", "output or loss", "gradients"], rows)
    report.publish("gpu-numerics", f"{table}\n\n{record['machine']}.", PAGE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=pathlib.Path)
    options = parser.parse_args()
    device = jax.devices()[0]
    checks: list[tuple[Any, str, str]] = [
        (attention, "xla", "float32"),
        (attention, "xla", "bfloat16"),
    ]
    if device.platform == "gpu":
        checks.append((attention, "cudnn", "bfloat16"))
    if device.platform == "tpu":
        checks.append((attention, "splash", "bfloat16"))
    checks += [(model, name, "float32") for name in ARCHITECTURES]
    rows, bad = [], False
    for check, what, dtype in checks:
        row = check(what, dtype)
        rows.append(row)
        bad |= not max(row["output"], row["gradients"]) < BOUNDS[dtype]
        print(row, flush=True)
    record = {"rows": rows, "machine": report.software(), "bounds": BOUNDS}
    if options.results:
        options.results.write_text(json.dumps(record, indent=1) + "\n")
        publish(record)
    sys.exit(bad)


if __name__ == "__main__":
    main()

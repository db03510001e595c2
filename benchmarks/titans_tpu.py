"""Where the time of a Titans layer goes on a TPU, by the compiler's own estimate, without a TPU.

    python -m benchmarks.titans_tpu [--arms "Titans, chunk 64" ...] [--programs FOLDER]

Compiles forward and backward of a memory layer (projections, gates, memory; all gradients) at the
440M's shape, for one chip of v5e, and adds up the cycles that the compiler writes next to each
operation, those in loops as often as they run. Rows are one document each. The table goes to
docs/speed-titans.md. A program takes minutes to compile; `--programs` keeps compiled programs.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import re
import tempfile
from typing import Any

from tlm_jax.distributed import topology
from tlm_jax.distributed.hlo import walk
from tlm_jax.distributed.products import product_flops
from tlm_jax.mixers import TitansConfig

ROWS, LENGTH, D_MODEL = 8, 4096, 1024
HERTZ = 197e12 / (4 * 128 * 128 * 2)
"""A v5e's clock: its peak over what its four 128 x 128 units do in a cycle."""
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NAME = re.compile(r'op_name="([^"]*)"')
KINDS = {
    "products": ("dot_general",),
    "kept and read again": ("dynamic_update_slice", "dynamic_slice", "squeeze", "concatenate"),
    "copies": ("copy",),
}
"""Groups of operations by the end of their names in the traced program, and `copy` by its own."""


def plain(chunk: int, every: int, **changes: Any) -> TitansConfig:
    """The memory of tlm_440m.py:titans."""
    config = TitansConfig(variant="lmm", num_heads=16, memory_width=304, chunk=chunk)
    return dataclasses.replace(config, chunks_per_checkpoint=every, **changes)


def tnt(chunk: int, every: int, **changes: Any) -> TitansConfig:
    """The memories of tlm_440m.py:tnt."""
    scales: dict[str, Any] = {"chunk": 1024, "local_chunks": (chunk,), "shard": 1024}
    scales["memory_width"] = 160
    return dataclasses.replace(plain(chunk, every), **(scales | changes))


ARMS = {
    "Titans, chunk 16": plain(16, 16),
    "Titans, chunk 64": plain(64, 8),
    "Titans, chunk 256": plain(256, 4),
    "TNT, local chunk 16": tnt(16, 8),
    "TNT, local chunk 64": tnt(64, 4),
    "TNT, local chunk 256": tnt(256, 2),
    "Titans, chunk 64, precision default": plain(64, 8, precision="default"),
    "TNT, local chunk 64, precision default": tnt(64, 4, precision="default"),
}


def compile_layer(config: TitansConfig) -> tuple[str, dict[str, float]]:
    """The program's text, and its temporaries in bytes with the compiler's count of bytes."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from tlm_jax import ops
    from tlm_jax.models import registry, titans

    device = topology.devices(topology.parse("v5e:2x2"))[0]
    here = jax.sharding.SingleDeviceSharding(device)
    context = registry.LayerContext(d_model=D_MODEL, norm_eps=1e-6, std=None, out_scale=1.0)
    layer = nnx.eval_shape(lambda: titans.Titans(config, context, rngs=nnx.Rngs(params=0)))
    graph, params = nnx.split(layer, nnx.Param)

    def shape(like: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=here)

    def run(params: Any, x_BLD: jax.Array, gradient_BLHK: jax.Array) -> Any:
        def reads(params: Any, x_BLD: jax.Array) -> jax.Array:
            built = nnx.merge(graph, params)
            ids_BL = jnp.ones(x_BLD.shape[:2], jnp.int32)
            (q, k, v), _ = built.memory.project(x_BLD, ids_BL, None)
            y, _ = built.memory.learn(q, k, v, built.memory.gate(x_BLD), None, None)
            for local in built.local.values():
                y = y + local.learn(q, k, v, local.gate(x_BLD), None, None)[0]
            return y

        y, backward = jax.vjp(reads, params, x_BLD)
        return y, backward(gradient_BLHK)

    x = jax.ShapeDtypeStruct((ROWS, LENGTH, D_MODEL), jnp.bfloat16)
    heads = jax.ShapeDtypeStruct((ROWS, LENGTH, *config.heads(D_MODEL)), jnp.bfloat16)
    with ops.tracing_for("tpu"):
        lowered = jax.jit(run).lower(jax.tree.map(shape, params), shape(x), shape(heads))
    program = lowered.compile()
    memory: Any = program.memory_analysis()
    analysis = program.cost_analysis() or {}
    said = {
        "temporary": float(memory.temp_size_in_bytes),
        "accessed": float(analysis.get("bytes accessed", 0.0)),
    }
    return program.as_text() or "", said


def cycles(hlo: str) -> tuple[dict[str, int], int]:
    """Cycles by group of operations, and how many operations run."""
    found: dict[str, int] = collections.Counter()
    operations = 0
    for lines, times in walk(hlo):
        for line in lines:
            estimate, name = _CYCLES.search(line), _NAME.search(line)
            if estimate is None:
                continue
            end = name[1].split("/")[-1] if name else ""
            end = "copy" if " copy(" in line else end
            kind = next((kind for kind, ends in KINDS.items() if end in ends), "other")
            found[kind] += int(estimate[1]) * times
            operations += times
    return found, operations


def steps(config: TitansConfig) -> int:
    """Chunks that are computed one after the other."""
    return LENGTH // config.chunk + sum(config.shard // chunk for chunk in config.local_chunks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--programs", type=pathlib.Path, help="a folder for compiled programs")
    options = parser.parse_args()
    topology.prepare_environment()
    from benchmarks import report

    folder = options.programs or pathlib.Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in options.arms:
        config = ARMS[name]
        stem = folder / re.sub(r"\W+", "-", name)
        if not stem.with_suffix(".json").exists():
            text, said = compile_layer(config)
            stem.with_suffix(".hlo").write_text(text)
            stem.with_suffix(".json").write_text(json.dumps(said))
        text, said = (
            stem.with_suffix(".hlo").read_text(),
            json.loads(stem.with_suffix(".json").read_text()),
        )
        kinds, operations = cycles(text)
        total = sum(kinds.values())
        row = [name, str(steps(config)), f"{operations:,}", f"{product_flops(text) / 1e12:.2f}"]
        row += [f"{said['accessed'] / 2**30:.1f}", f"{said['temporary'] / 2**30:.2f}"]
        row += [f"{total / HERTZ * 1e3:.0f}"]
        rows.append(row + [f"{kinds.get(k, 0) / total:.0%}" for k in (*KINDS, "other")])
        print(rows[-1], flush=True)
    header = ["layer", "chunks in turn", "operations", "TFLOPs", "GiB accessed, loops once"]
    header += ["GiB temporary", "ms by the compiler", *KINDS, "other"]
    report.publish(
        "titans-tpu",
        f"{report.table(header, rows)}\n\nForward and backward over {(ROWS, LENGTH, D_MODEL)}, 16 "
        "heads of 64, memory width 304 (Titans) or twice 160 (TNT), one chip of v5e.",
        report.SPEED_TITANS,
    )


if __name__ == "__main__":
    main()

"""A neural memory layer, forward and backward: ours, its growth with length, and titans-pytorch.

    python -m benchmarks.neural_memory [--torch_python X/bin/python] [--repetitions 15]

The comparison needs an environment X for PyTorch, apart from this one:

    python -m venv X && X/bin/pip install torch==2.13.0 titans-pytorch==0.5.5

(torch's builds without CUDA are at --extra-index-url https://download.pytorch.org/whl/cpu). It is
left as it was without `--torch_python`.

A layer is all that stands between a normalised input and the residual stream: projections,
gates, memory, output. Both are float32 on all cores and give gradients of every parameter and
of the input. Each arm runs in a process of its own and they take turns; medians and the
processes' peaks are written to docs/speed-titans.md.
"""

import argparse
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import race

# An arm's Python has jax or torch, never both: each is imported where it is used.

D_MODEL, HEADS, CHUNK, DEPTH, WIDTH = 256, 4, 64, 2, 4
"""WIDTH: hidden width of the memory over the head dim."""
BATCH, LENGTH = 4, 1024
SHARD = 256
"""Of TNT's local memories, and chunk of its global one: a quarter of the length, as in `:tnt`."""
LENGTHS = (512, 1024, 2048, 4096, 8192)


def our_layer(
    length: int,
    chunks_per_checkpoint: int = 1,
    devices: int = 1,
    *,
    chunk: int = CHUNK,
    tnt: bool = False,
) -> Callable[[], Any]:
    """One forward and backward pass of our layer, memory alone (Titans, variant LMM).

    With several devices (of the CPU) each has a share of the rows. With `tnt` a global memory and
    a local one take the place of one twice as wide.
    """
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    import jax.numpy as jnp
    from flax import nnx

    from tlm_jax.config import MeshConfig
    from tlm_jax.distributed.mesh import device_mesh
    from tlm_jax.distributed.sharding import batch_sharding
    from tlm_jax.mixers import TitansConfig
    from tlm_jax.models import registry, titans  # noqa: F401 (registers itself)

    config = TitansConfig(
        variant="lmm",
        num_heads=HEADS,
        memory_depth=DEPTH,
        memory_width=WIDTH * D_MODEL // HEADS // (1 + tnt),
        chunk=SHARD if tnt else chunk,
        local_chunks=(chunk,) if tnt else (),
        shard=SHARD,
        chunks_per_checkpoint=chunks_per_checkpoint,
    )
    context = registry.LayerContext(d_model=D_MODEL, norm_eps=1e-6, std=None, out_scale=1.0)
    layer = registry.make_mixer(config, context, rngs=nnx.Rngs(params=0))
    graph, params = nnx.split(layer, nnx.Param)
    mesh = device_mesh(MeshConfig())
    jax.set_mesh(mesh)
    rows, everywhere = batch_sharding(mesh), jax.NamedSharding(mesh, jax.P())
    x, out_gradient = jax.random.normal(jax.random.key(0), (2, BATCH, length, D_MODEL))
    x, out_gradient, ids = jax.device_put(
        (x, out_gradient, jnp.ones((BATCH, length), jnp.int32)), rows
    )
    params = jax.device_put(params, everywhere)

    @functools.partial(jax.jit, out_shardings=(rows, (everywhere, rows)))
    def run(params: Any, x: jax.Array, ids: jax.Array, out_gradient: jax.Array) -> Any:
        def forward(params: Any, x: jax.Array) -> jax.Array:
            return nnx.merge(graph, params)(x, jnp.arange(length) * ids, ids, None)[0]

        y, backward = jax.vjp(forward, params, x)
        return y, backward(out_gradient)

    return lambda: jax.block_until_ready(run(params, x, ids, out_gradient))


def their_layer(length: int, batch_size: int | None = None) -> Callable[[], Any]:
    """The same of titans-pytorch; `batch_size`: tokens whose gradients share weights."""
    import torch
    from titans_pytorch import MemoryMLP, NeuralMemory

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    layer = NeuralMemory(
        dim=D_MODEL,
        heads=HEADS,
        dim_head=D_MODEL // HEADS,
        chunk_size=CHUNK,
        batch_size=batch_size,
        model=MemoryMLP(D_MODEL // HEADS, depth=DEPTH, expansion_factor=WIDTH),
    )
    x, out_gradient = torch.randn(2, BATCH, length, D_MODEL)
    x.requires_grad_()

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x)[0].backward(out_gradient)

    return run


ARMS: dict[str, Callable[[int], Callable[[], Any]]] = {
    "tlm-jax": our_layer,
    "tlm-jax, chunks_per_checkpoint=4": functools.partial(our_layer, chunks_per_checkpoint=4),
    "tlm-jax, a device for each core": functools.partial(our_layer, devices=os.cpu_count() or 1),
    "Titans, chunk 64": our_layer,
    "Titans, chunk 16": functools.partial(our_layer, chunk=16),
    "TNT, local chunk 64": functools.partial(our_layer, tnt=True),
    "TNT, local chunk 16": functools.partial(our_layer, chunk=16, tnt=True),
    "titans-pytorch, batch_size=64": functools.partial(their_layer, batch_size=CHUNK),
    "titans-pytorch, batch_size=None": their_layer,
}


def serve(run: Callable[[], Any]) -> None:
    """An arm's part in a race; its peak is that beyond its memory before the first pass."""
    before = race.resident_mib("VmRSS")
    for _ in range(2):
        run()
    race.answer(run, start={}, end=lambda: {"peak_mib": race.resident_mib() - before})


def entrant(python: str, arm: str, length: int) -> race.Entrant:
    """An arm's process."""
    module = ["-m", "benchmarks.neural_memory"]
    return race.Entrant(command=[python, *module, "--arm", arm, "--length", str(length)])


def compare(torch_python: str, repetitions: int) -> None:
    """Publishes the table of ours against titans-pytorch."""
    from benchmarks import report

    arms = [arm for arm in ARMS if not arm.startswith(("Titans", "TNT"))]
    pythons = {arm: torch_python if "pytorch" in arm else sys.executable for arm in arms}
    results = race.run(
        {arm: entrant(python, arm, LENGTH) for arm, python in pythons.items()}, repetitions
    )
    ours = results["tlm-jax"]
    rows = [
        [
            arm,
            f"{one.median * 1e3:.0f}",
            one.middle_half,
            f"{race.ratio(one, ours):.2f}",
            f"{one.said['peak_mib']:.0f}",
        ]
        for arm, one in results.items()
    ]
    versions = subprocess.check_output([torch_python, "-c", VERSIONS], text=True).strip()
    report.publish(
        "neural-memory",
        f"{report.table(['layer', 'ms', 'middle half', 'over ours', 'peak MiB'], rows)}\n\n"
        f"Medians of {repetitions} alternating passes over {(BATCH, LENGTH, D_MODEL)}, {HEADS} "
        f"heads, chunk {CHUNK}, depth {DEPTH}; ratios are medians over pairs. {versions}; "
        f"{report.software()}.",
        report.SPEED_TITANS,
    )


VERSIONS = """
import importlib.metadata
named = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "titans-pytorch")]
print(", ".join(named))
"""


def grow(repetitions: int) -> None:
    """Publishes the table of our layer at several lengths."""
    from benchmarks import report

    results = race.run(
        {str(length): entrant(sys.executable, "tlm-jax", length) for length in LENGTHS},
        repetitions,
    )
    shortest = results[str(LENGTHS[0])]
    rows = []
    for name, one in results.items():
        length = int(name)
        each = f"{one.median / (BATCH * length) * 1e6:.1f}"
        growth = f"{race.ratio(one, shortest) * LENGTHS[0] / length:.2f}"
        peak = f"{one.said['peak_mib']:.0f}"
        rows.append([name, f"{one.median * 1e3:.0f}", each, growth, peak])
    header = ["length", "ms", "us a token", f"over length {LENGTHS[0]}", "peak MiB"]
    report.publish(
        "neural-memory-length",
        f"{report.table(header, rows)}\n\nMedians of {repetitions} alternating passes, batch "
        f"{BATCH}, chunks_per_checkpoint=1; {report.machine()}.",
        report.SPEED_TITANS,
    )


def scales(repetitions: int) -> None:
    """Publishes the table of one memory against a global and a local one."""
    from benchmarks import report

    arms = [arm for arm in ARMS if arm.startswith(("Titans", "TNT"))]
    results = race.run({arm: entrant(sys.executable, arm, LENGTH) for arm in arms}, repetitions)
    rows = [
        [
            arm,
            f"{one.median * 1e3:.0f}",
            one.middle_half,
            f"{race.ratio(one, results[arms[0]]):.2f}",
            f"{one.said['peak_mib']:.0f}",
        ]
        for arm, one in results.items()
    ]
    header = ["layer", "ms", "middle half", f"over {arms[0]}", "peak MiB"]
    report.publish(
        "neural-memory-scales",
        f"{report.table(header, rows)}\n\nMedians of {repetitions} alternating passes over "
        f"{(BATCH, LENGTH, D_MODEL)}, {HEADS} heads; TNT's two memories are half as wide, its "
        f"shard and global chunk {SHARD} tokens; {report.machine()}.",
        report.SPEED_TITANS,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch_python", help="a Python with torch and titans-pytorch")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--only", choices=("length", "scales"), help="a single table")
    parser.add_argument("--arm", choices=ARMS, help="run as one of the processes")
    parser.add_argument("--length", type=int, default=LENGTH)
    options = parser.parse_args()
    if options.arm:
        serve(ARMS[options.arm](options.length))
        return
    if options.torch_python and options.only is None:
        compare(options.torch_python, options.repetitions)
    if options.only != "scales":
        grow(options.repetitions)
    if options.only != "length":
        scales(options.repetitions)


if __name__ == "__main__":
    main()

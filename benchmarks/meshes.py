"""What each mesh axis makes of a train step, on 8 simulated devices, by the compiler.

    python -m benchmarks.meshes

Small models of the four architectures, their layers unrolled so that the compiler's count of FLOPs
is whole, on 8 devices along each axis and along three at once: FLOPs per device over an eighth of
what one device needs for all, bytes that collectives give on a device, temporaries over one
device's, and what the partitioner complains of. tests/distributed/test_mesh_costs.py holds them to
their bounds. The table of docs/notes/mesh-costs.md has beside them what the commit before was
measured at (docs/results/meshes.json).
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator

import jax

from tlm_jax.config import (
    AttentionConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    TaperConfig,
    TrainingConfig,
)
from tlm_jax.mixers import GatedAttentionConfig, MixerConfig, TitansConfig
from tlm_jax.mlp import MLPConfig
from tlm_jax.training import aot

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "notes" / "mesh-costs.md"
RESULTS = ROOT / "docs" / "results" / "meshes.json"
DEVICES = 8
TAPER, LAYER = (320, 192), (256,)
MODELS: dict[str, tuple[MixerConfig, MLPConfig, tuple[int, ...]]] = {
    "transformer": (AttentionConfig(num_heads=8), MLPConfig(), TAPER),
    "gated_attention": (GatedAttentionConfig(num_heads=8), MLPConfig(), TAPER),
    "hope_attention": (AttentionConfig(num_heads=8), MLPConfig(periods=(1, 4)), TAPER),
    # Long to compile: one layer.
    "titans": (TitansConfig(num_heads=8, memory_width=16), MLPConfig(), LAYER),
}
"""Mixer, MLP and the width of each layer."""
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "sequence": MeshConfig(data=1, sequence=8),
    "tensor": MeshConfig(data=1, tensor=8),
    "fsdp, sequence, tensor": MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
    "data, fsdp, tensor": MeshConfig(data=2, fsdp=2, tensor=2),
}
CELLS = [
    (model, mesh)
    for model, (mixer, _, _) in MODELS.items()
    for mesh, sizes in MESHES.items()
    if sizes.sequence == 1 or mixer.splits_sequence
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a train step needs of one device."""

    flops: float
    """By the compiler's count."""
    temporary: int
    """Bytes."""
    collectives: dict[str, int]
    """Bytes of their results, by kind."""
    complaints: str
    """What the compiler said while it worked."""


def run_config(model: str, mesh: MeshConfig) -> RunConfig:
    """1,024 tokens, and parameters enough that products are nearly all of the FLOPs."""
    mixer, mlp, widths = MODELS[model]
    return RunConfig(
        model=ModelConfig(
            vocab_size=256,
            num_layers=len(widths),
            d_model=128,
            mlp_width=256,
            taper=TaperConfig(schedule="explicit", widths=widths),
            mixer=mixer,
            mlp=mlp,
            compute_dtype="float32",
            scan_layers=False,
        ),
        data=DataConfig(seq_len=128, batch_size=8),
        training=TrainingConfig(loss_chunk=128),
        mesh=mesh,
    )


def cost(model: str, mesh: str | None) -> Cost:
    """Of a train step on a mesh; None is one device."""
    sizes = MeshConfig(data=1) if mesh is None else MESHES[mesh]
    devices = jax.devices()[: 1 if mesh is None else DEVICES]
    with stderr() as said:
        found = aot.compile_step("train", run_config(model, sizes), devices, 2**40)
    assert found.memory is not None
    return Cost(
        flops=found.counted,
        temporary=found.memory.temporary,
        collectives={c.kind: c.bytes for c in found.collectives},
        complaints="".join(said),
    )


@contextlib.contextmanager
def stderr() -> Iterator[list[str]]:
    """Catches what is written to the process's standard error, by C++ too; whole at the end."""
    said: list[str] = []
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))


def summary(model: str, mesh: str, one: Cost) -> dict[str, object]:
    """A cell of the table."""
    found = cost(model, mesh)
    return {
        "flops": round(DEVICES * found.flops / one.flops, 3),
        "collectives": found.collectives,
        "temporary": round(found.temporary / one.temporary, 3),
        "warnings": found.complaints.count("[SPMD]"),
    }


def main() -> None:
    from benchmarks import report

    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_disable_most_optimizations", True)  # of LLVM; compiles 3 times as fast
    results = json.loads(RESULTS.read_text())
    ones = {model: cost(model, None) for model in MODELS}
    results["after"] = {f"{a} / {mesh}": summary(a, mesh, ones[a]) for a, mesh in CELLS}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    header = [
        "architecture",
        "axes",
        "FLOPs over 1/8",
        "collectives, KiB",
        "temporaries over one's",
    ]
    rows = []
    for model, mesh in CELLS:
        pair = [results[when][f"{model} / {mesh}"] for when in ("before", "after")]
        sent = [f"{sum(cell['collectives'].values()) / 1024:,.0f}" for cell in pair]
        rows.append(
            [
                model,
                mesh,
                " to ".join(f"{cell['flops']:.2f}" for cell in pair),
                " to ".join(sent),
                " to ".join(f"{cell['temporary']:.2f}" for cell in pair),
                " to ".join(str(cell["warnings"]) for cell in pair),
            ]
        )
    report.publish("meshes", report.table([*header, "warnings"], rows), PAGE)
    print(report.machine())


if __name__ == "__main__":
    main()

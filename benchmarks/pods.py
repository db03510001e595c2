"""What the configs of 440M, 760M and 1.3B need on TPU slices, by the TPU compiler.

    python -m benchmarks.pods [--only 440m:titans]

Needs the extra `tpu`, and no TPU. Each cell (a size, an architecture, a topology, a number of
segments) compiles the train step with the config's own batch, split over fsdp, in as few parts as
fit. Cells are kept in docs/results/pods.jsonl as they come and not compiled twice; the tables go to
docs/notes/tpu-compile.md:

1. every size and architecture on every topology, the taper as the best stair of 2 segments;
2. the Transformer with more and fewer segments, down to its uniform twin and up to the exact taper:
   memory, which hardly changes, and compile time, which does.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import pathlib
from typing import Any

from tlm_jax.distributed import topology

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "notes" / "tpu-compile.md"
CELLS = ROOT / "docs" / "results" / "pods.jsonl"
SIZES = ("440m", "760m", "1_3b")
TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v5p:4x4x4")
STAIRS = 2
UNIFORM, EXACT = 1, None
GROWTH = {
    ("440m", "transformer", "v5e:4x4"): (UNIFORM, STAIRS, 4, 8, EXACT),
    ("1_3b", "transformer", "v5e:4x4"): (UNIFORM, STAIRS, 4),
    ("1_3b", "transformer", "v5e:16x16"): (UNIFORM, STAIRS, 4, EXACT),
}
"""Numbers of segments of the second table."""

Cell = tuple[str, str, str, int | None]


def cells() -> list[Cell]:
    """All of them: the first table's, then what the second needs besides."""
    from tlm_jax.architectures import ARCHITECTURES

    first = [(*c, STAIRS) for c in itertools.product(SIZES, ARCHITECTURES, TOPOLOGIES)]
    second = [(*where, n) for where, numbers in GROWTH.items() for n in numbers]
    return list(dict.fromkeys([*first, *second]))


def cell_config(size: str, architecture: str, chips: int, num_segments: int | None) -> Any:
    """The run of a cell: fsdp over as many chips as the batch has rows, tensor over the rest."""
    from tlm_jax.config import MeshConfig
    from tlm_jax.config_io import load_config
    from tlm_jax.training import aot

    config = load_config(f"{ROOT}/configs/tlm_{size}.py:{architecture}")
    taper = dataclasses.replace(config.model.taper, num_segments=num_segments)
    model = dataclasses.replace(config.model, taper=taper)
    fsdp = min(chips, config.data.batch_size)
    mesh = MeshConfig(data=1, fsdp=fsdp, tensor=chips // fsdp)
    return aot.for_devices(dataclasses.replace(config, model=model, mesh=mesh))


def measure(cell: Cell) -> dict[str, Any]:
    """Compiles a cell, with the batch in as many parts as it takes to fit."""
    from tlm_jax.training import aot

    size, architecture, name, num_segments = cell
    slice_ = topology.parse(name)
    devices = topology.devices(slice_)
    config = cell_config(size, architecture, len(devices), num_segments)
    rows = config.data.batch_size // config.mesh.fsdp
    for parts in (p for p in range(1, rows + 1) if rows % p == 0):
        training = dataclasses.replace(config.training, grad_accumulation=parts)
        run = dataclasses.replace(config, training=training)
        result = aot.compile_step("train", run, devices, topology.memory_limit(slice_.chip))
        if result.fits:
            break
    memory = result.memory
    return {
        "size": size,
        "architecture": architecture,
        "topology": name,
        "num_segments": num_segments,
        "segments": len(run.model.segments),
        "mesh": {axis: n for axis, n in run.mesh.sizes.items() if n > 1},
        "batch_size": run.data.batch_size,
        "grad_accumulation": parts,
        "remat": run.model.remat,
        "fits": result.fits,
        "refusal": result.refusal,
        "gib": None if memory is None else round(memory.total / 2**30, 3),
        "arguments_gib": None if memory is None else round(memory.arguments / 2**30, 3),
        "limit_gib": round(result.limit / 2**30, 2),
        "tflops": round(result.flops / 1e12, 1),
        "collectives": {c.kind: [c.count, round(c.bytes / 2**30, 2)] for c in result.collectives},
        "seconds": round(result.seconds, 1),
        "jax": importlib.metadata.version("jax"),
        "libtpu": importlib.metadata.version("libtpu"),
    }


def known() -> dict[Cell, dict[str, Any]]:
    """Cells that were compiled before, in the order of `cells`."""
    lines = CELLS.read_text().splitlines() if CELLS.exists() else []
    found = {
        (c["size"], c["architecture"], c["topology"], c["num_segments"]): c
        for c in map(json.loads, lines)
    }
    return {cell: found[cell] for cell in cells() if cell in found}


def mark(c: dict[str, Any]) -> str:
    """A dagger for a cell of before the loss made its gradient in one pass."""
    return " †" if c.get("older") else ""


def memory(c: dict[str, Any]) -> str:
    """GiB per chip of what there is, or what the compiler said."""
    return f"{c['gib']:.2f} of {c['limit_gib']:.2f}" if c["fits"] else f"no: {c['refusal']}"


def collectives(c: dict[str, Any]) -> str:
    """Kinds, how often, and bytes."""
    return ", ".join(f"{kind} {n} ({gib} GiB)" for kind, (n, gib) in c["collectives"].items())


def name(cell: Cell) -> str:
    """Size and architecture."""
    return f"{cell[0].replace('_', '.')} {cell[1]}"


def publish() -> None:
    """Writes both tables."""
    from benchmarks import report

    done = known()
    rows = [
        [
            name(cell) + mark(c),
            cell[2],
            " ".join(f"{axis}={n}" for axis, n in c["mesh"].items()),
            f"{c['batch_size']} / {c['grad_accumulation']}",
            c["remat"],
            memory(c),
            f"{c['arguments_gib'] or 0:.2f}",
            f"{c['tflops']:.1f}",
            collectives(c),
        ]
        for cell, c in done.items()
        if cell[3] == STAIRS
    ]
    header = ["run", "topology", "mesh", "batch / parts", "remat", "GiB per chip", "of it state"]
    header += ["TFLOPs per chip", "collectives"]
    report.publish("compile", report.table(header, rows), PAGE)
    rows = []
    for where, numbers in GROWTH.items():
        twin = done.get((*where, UNIFORM))
        if twin is None:
            continue
        for c in (done[(*where, n)] for n in numbers if (*where, n) in done):
            rows.append(
                [
                    name((*where, STAIRS)) + mark(c),
                    where[2],
                    "uniform" if c["num_segments"] == UNIFORM else str(c["segments"]),
                    f"{c['gib']:.3f}",
                    f"{c['gib'] / twin['gib']:.3f}",
                    collectives(c),
                    f"{c['seconds']:.0f}",
                    f"{c['seconds'] / twin['seconds']:.2f}",
                ]
            )
    header = ["run", "topology", "segments", "GiB per chip", "over uniform", "collectives"]
    header += ["compile s", "over uniform"]
    report.publish("segments", report.table(header, rows), PAGE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cells whose SIZE:ARCHITECTURE@TOPOLOGY/SEGMENTS"
                        " has this")  # fmt: skip
    options = parser.parse_args()
    topology.prepare_environment()
    done = known()
    for cell in cells():
        if (cell in done and not mark(done[cell])) or options.only not in "{}:{}@{}/{}".format(
            *cell
        ):
            continue
        found = measure(cell)
        with CELLS.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(found, flush=True)
    publish()


if __name__ == "__main__":
    main()

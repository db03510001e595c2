"""What the configs of 440M, 760M and 1.3B need on TPU slices, by the TPU compiler.

    python -m benchmarks.pods [--only 440m:titans] [--num_segments 4]

Needs the extra `tpu`, and no TPU. Each cell (a size, an architecture, a topology) compiles the
train step with the config's own batch, split over fsdp, in as few parts as fit. Cells are kept in
docs/results/pods.jsonl as they come and not compiled twice; the table goes to docs/pods.md. The
taper is the best stair of `num_segments`: compile time grows with their number, memory hardly
changes.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import pathlib

from tlm_jax.distributed import topology

ROOT = pathlib.Path(__file__).parents[1]
CELLS = ROOT / "docs" / "results" / "pods.jsonl"
SIZES = ("440m", "760m", "1_3b")
TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v5p:4x4x4")


def cell_config(size: str, architecture: str, chips: int, num_segments: int):  # type: ignore[no-untyped-def]
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


def measure(size: str, architecture: str, name: str, num_segments: int) -> dict[str, object]:
    """Compiles a cell, with the batch in as many parts as it takes to fit."""
    from tlm_jax.training import aot

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
        "mesh": {axis: n for axis, n in run.mesh.sizes.items() if n > 1},
        "batch_size": run.data.batch_size,
        "grad_accumulation": parts,
        "remat": run.model.remat,
        "fits": result.fits,
        "refusal": result.refusal,
        "gib": None if memory is None else round(memory.total / 2**30, 2),
        "arguments_gib": None if memory is None else round(memory.arguments / 2**30, 2),
        "limit_gib": round(result.limit / 2**30, 2),
        "tflops": round(result.flops / 1e12, 1),
        "collectives": {c.kind: [c.count, round(c.bytes / 2**30, 2)] for c in result.collectives},
        "seconds": round(result.seconds, 1),
        "jax": importlib.metadata.version("jax"),
        "libtpu": importlib.metadata.version("libtpu"),
    }


def known() -> list[dict]:
    """Cells that were compiled before."""
    return [json.loads(line) for line in CELLS.read_text().splitlines()] if CELLS.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", default="", help="cells whose SIZE:ARCHITECTURE@TOPOLOGY has this"
    )
    parser.add_argument("--num_segments", type=int, default=4)
    options = parser.parse_args()
    topology.prepare_environment()
    from benchmarks import report
    from tlm_jax.architectures import ARCHITECTURES

    done = {(c["size"], c["architecture"], c["topology"]) for c in known()}
    for cell in itertools.product(SIZES, ARCHITECTURES, TOPOLOGIES):
        if cell in done or options.only not in "{}:{}@{}".format(*cell):
            continue
        found = measure(*cell, options.num_segments)
        with CELLS.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(found, flush=True)
    rows = [
        [
            f"{c['size'].replace('_', '.')} {c['architecture']}",
            c["topology"],
            " ".join(f"{axis}={n}" for axis, n in c["mesh"].items()),
            f"{c['batch_size']} / {c['grad_accumulation']}",
            c["remat"],
            f"{c['gib']:.2f} of {c['limit_gib']:.2f}" if c["fits"] else f"no: {c['refusal']}",
            f"{c['arguments_gib'] or 0:.2f}",
            f"{c['tflops']:.1f}",
            ", ".join(f"{k} {n} ({gib} GiB)" for k, (n, gib) in c["collectives"].items()),
            f"{c['seconds']:.0f}",
        ]
        for c in known()
    ]
    header = [
        "run",
        "topology",
        "mesh",
        "batch / parts",
        "remat",
        "GiB a chip",
        "of it state",
        "TFLOPs a chip",
        "collectives",
        "compile s",
    ]
    report.publish("compile", report.table(header, rows), ROOT / "docs" / "pods.md")


if __name__ == "__main__":
    main()

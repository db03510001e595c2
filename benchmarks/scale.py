"""The table of `tlm plan --scale`, and what the TPU compiler says of some of its cells.

    python -m benchmarks.scale compile [--only 1_3b@v5e]   # needs the extra tpu, and no TPU
    python -m benchmarks.scale publish                     # both tables, in docs/pods.md

Each cell compiles the train step of a size on a slice, with the mesh and batch of `analysis.scale`,
the taper in two stairs of multiples of 128. What the compiler says is kept in
docs/results/scale.jsonl and not compiled twice. Collectives of benchmarks/pods.py's cells are
compared too, where none is a collective-permute (which were miscounted when those were made).
"""

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
from typing import Any

from tlm_jax import config_io
from tlm_jax.analysis import scale
from tlm_jax.distributed import topology

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "pods.md"
CELLS = ROOT / "docs" / "results" / "scale.jsonl"
SIZES = ("440m", "760m", "1_3b", "7b")
COMPILED = (
    ("440m", "v5e:4x4"),
    ("440m", "v5e:16x16"),
    ("440m", "v5p:4x4x4"),
    ("1_3b", "v5e:16x16"),
    ("760m", "v5p:4x4x4"),
    ("1_3b", "v5p:4x4x4"),
    ("7b", "v5p:4x4x4"),
    ("7b", "v5p:8x8x16"),
)


def cell(size: str, name: str) -> scale.Scale:
    """A size on a slice."""
    config = config_io.load_config(ROOT / "configs" / f"tlm_{size}.py")
    taper = dataclasses.replace(config.model.taper, num_segments=2, multiple_of=128)
    model = dataclasses.replace(config.model, taper=taper)
    return scale.scale(dataclasses.replace(config, model=model), name)


def known() -> dict[tuple[str, str], dict[str, Any]]:
    """Cells that were compiled."""
    lines = CELLS.read_text().splitlines() if CELLS.exists() else []
    return {(c["size"], c["topology"]): c for c in map(json.loads, lines)}


def earlier() -> dict[tuple[str, str, str, int], tuple[float, float]]:
    """Bytes of collectives by formula and by the compiler, of cells that benchmarks/pods.py
    compiled: by size, architecture, slice and parts of the batch."""
    found: dict[tuple[str, str, str, int], tuple[float, float]] = {}
    for c in map(json.loads, (ROOT / "docs" / "results" / "pods.jsonl").read_text().splitlines()):
        moved = c["collectives"].get("collective-permute", [0, 0])[1]
        if c.get("older") or not c["fits"] or moved or c["num_segments"] != 2:
            continue
        config = config_io.load_config(f"{ROOT}/configs/tlm_{c['size']}.py:{c['architecture']}")
        training = dataclasses.replace(config.training, grad_accumulation=c["grad_accumulation"])
        run = scale.scale(dataclasses.replace(config, training=training), c["topology"])
        name = (c["size"], c["architecture"], c["topology"], c["grad_accumulation"])
        compiled = sum(gib for _, gib in c["collectives"].values()) * 2**30
        found[name] = sum(run.communication().values()), compiled
    return found


def measure(size: str, name: str) -> dict[str, Any]:
    """Compiles a cell."""
    from tlm_jax.training import aot

    found = cell(size, name)
    limit = topology.memory_limit(found.slice.chip)
    config = aot.for_devices(found.config)
    result = aot.compile_step("train", config, topology.devices(found.slice), limit)
    return {
        "size": size,
        "topology": name,
        "needed": None if result.memory is None else result.memory.needed,
        "refusal": result.refusal,
        "collectives": {c.kind: [c.count, c.bytes] for c in result.collectives},
        "products": result.products,
        "share": result.share,
        "seconds": round(result.seconds, 1),
        "jax": importlib.metadata.version("jax"),
        "libtpu": importlib.metadata.version("libtpu"),
    }


def publish() -> None:
    """Writes both tables."""
    from benchmarks import report

    rows = [
        [size.replace("_", ".").upper(), *scale.row(cell(size, name))]
        for size in SIZES
        for name in scale.SLICES
    ]
    report.publish("scale", report.table(["run", *scale.HEADER], rows), PAGE)
    rows = []
    done = known()
    for key in (key for key in COMPILED if key in done):
        found, needed = cell(*key), done[key]["needed"]
        memory, formula = found.memory(), float(sum(found.communication().values()))
        compiled = float(sum(size for _, size in done[key]["collectives"].values()))
        rows.append(
            [
                key[0].replace("_", ".").upper(),
                key[1],
                f"{memory / 2**30:.2f}",
                f"{needed / 2**30:.2f}",
                f"{memory / needed:.2f}",
                f"{formula / 2**30:.2f}",
                f"{compiled / 2**30:.2f}",
                f"{formula / compiled:.2f}",
                ", ".join(
                    f"{kind} {n:,} ({size / 2**30:.2f})"
                    for kind, (n, size) in done[key]["collectives"].items()
                    if size > 2**20
                ),
            ]
        )
    for (size, architecture, name, parts), (formula, compiled) in earlier().items():
        rows.append(
            [
                f"{size.replace('_', '.').upper()} {architecture}"
                + (f", {parts} parts" if parts > 1 else ""),
                name,
                *[""] * 3,
                f"{formula / 2**30:.2f}",
                f"{compiled / 2**30:.2f}",
                f"{formula / compiled:.2f}",
                "",
            ]
        )
    header = ["run", "slice", "memory, formula", "compiler", "ratio"]
    header += ["collectives, formula", "compiler", "ratio", "the compiler's, by kind"]
    report.publish("scale compiled", report.table(header, rows), PAGE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("compile", "publish"))
    parser.add_argument("--only", default="", help="cells whose SIZE@SLICE has this")
    options = parser.parse_args()
    if options.action == "publish":
        publish()
        return
    topology.prepare_environment()
    for size, name in COMPILED:
        if (size, name) not in known() and options.only in f"{size}@{name}":
            found = measure(size, name)
            with CELLS.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(found, flush=True)


if __name__ == "__main__":
    main()

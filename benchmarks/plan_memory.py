"""What `tlm plan` says of memory against what the compilers allocate.

    python -m benchmarks.plan_memory cpu      # small models, one device and eight simulated ones
    python -m benchmarks.plan_memory tpu      # 440M and 1.3B for v5e:4x4; needs the extra tpu
    python -m benchmarks.plan_memory publish  # the table, from what was compiled

The table goes to docs/notes/plan-memory.md. Each cell compiles a train step. What the compiler says
is kept in docs/results/plan_memory.jsonl and not compiled twice; the plan is made anew each time
the table is.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
from typing import Any, Literal

from tlm_jax.distributed import topology

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "notes" / "plan-memory.md"
CELLS = ROOT / "docs" / "results" / "plan_memory.jsonl"
DEVICES = 8
TOPOLOGY = "v5e:4x4"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A train step to be compiled."""

    config: str
    """Of configs/, such as tiny:titans."""
    where: str
    """cpu, cpu x 8 (fsdp), or a TPU slice."""
    segments: int | None = None
    """Stairs; None is the exact taper, 1 uniform."""
    remat: Literal["none", "dots", "attention", "full"] = "full"
    parts: int = 1

    @property
    def name(self) -> str:
        """As it is written in the file of results."""
        words = dataclasses.asdict(self).values()
        return " / ".join(str(word) for word in words)


def cells() -> list[Cell]:
    """All of them."""
    names = ("transformer", "gated_attention", "hope_attention", "titans")
    found = [
        Cell(config=f"tiny:{name}", where="cpu", remat=remat)
        for name in names
        for remat in ("none", "full")
    ]
    found += [Cell(config=f"tiny:{name}", where=f"cpu x {DEVICES}", segments=2) for name in names]
    found += [
        Cell(config="tiny:transformer", where="cpu", segments=1, remat="none"),
        Cell(config="tiny:transformer", where="cpu", segments=1, remat="dots"),
        Cell(config="tiny:transformer", where="cpu", segments=2, remat="attention", parts=2),
        Cell(config="tlm_440m:transformer", where=TOPOLOGY, segments=4),
        Cell(config="tlm_1_3b:transformer", where=TOPOLOGY, segments=2, parts=4),
        Cell(config="tlm_440m:gated_attention", where=TOPOLOGY, segments=2),
        Cell(config="tlm_440m:hope_attention", where=TOPOLOGY, segments=2),
        Cell(config="tlm_1_3b:transformer", where=TOPOLOGY, segments=2),
        Cell(config="tlm_440m:transformer", where=TOPOLOGY, segments=1),
        Cell(config="tlm_440m:transformer", where=TOPOLOGY, segments=1, remat="attention"),
        Cell(config="tlm_440m:transformer", where=TOPOLOGY, segments=2, remat="dots", parts=2),
        Cell(config="tlm_1_3b:transformer", where=TOPOLOGY),
        Cell(config="tlm_1_3b:gated_attention", where=TOPOLOGY, segments=2),
        Cell(config="tlm_1_3b:hope_attention", where=TOPOLOGY, segments=2),
        Cell(config="tlm_440m:titans", where=TOPOLOGY, segments=2),
        Cell(config="tlm_1_3b:titans", where=TOPOLOGY, segments=2, parts=2),
    ]
    return found


def cell_config(cell: Cell) -> Any:
    """The run of a cell, split over fsdp."""
    from tlm_jax.config import MeshConfig
    from tlm_jax.config_io import load_config

    file, architecture = cell.config.split(":")
    config = load_config(f"{ROOT}/configs/{file}.py:{architecture}")
    taper = dataclasses.replace(config.model.taper, num_segments=cell.segments)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, taper=taper, remat=cell.remat),
        training=dataclasses.replace(config.training, grad_accumulation=cell.parts),
        mesh=MeshConfig(data=1, fsdp=num_devices(cell)),
    )


def num_devices(cell: Cell) -> int:
    """Of the cell's mesh."""
    if cell.where == "cpu":
        return 1
    return DEVICES if cell.where.startswith("cpu") else 16


def measure(cell: Cell) -> dict[str, Any]:
    """What the compiler says."""
    import jax

    from tlm_jax.training import aot

    config = cell_config(cell)
    if cell.where.startswith("cpu"):
        devices, limit = jax.devices()[: num_devices(cell)], 2**60
    else:
        slice_ = topology.parse(cell.where)
        devices, limit = topology.devices(slice_), topology.memory_limit(slice_.chip)
        config = aot.for_devices(config)
    result = aot.compile_step("train", config, devices, limit)
    return {
        "cell": cell.name,
        "memory": None if result.memory is None else dataclasses.asdict(result.memory),
        "refusal": result.refusal,
        "seconds": round(result.seconds, 1),
        "jax": importlib.metadata.version("jax"),
    }


def known() -> dict[str, dict[str, Any]]:
    """What was compiled before, by the name of its cell."""
    lines = CELLS.read_text().splitlines() if CELLS.exists() else []
    return {found["cell"]: found for found in map(json.loads, lines)}


def compared(cell: Cell, found: dict[str, Any]) -> dict[str, Any]:
    """Bytes by plan and by compiler, and the part of the plan that is estimated."""
    from tlm_jax.training import aot, memory

    target = target_of(cell)
    planned = memory.step_memory(cell_config(cell), devices=num_devices(cell), target=target)
    needed = aot.Memory(**found["memory"]).needed
    exact = planned.parameters + planned.optimizer + planned.batch
    return {"plan": planned.total, "exact": exact, "compiler": needed, "moment": planned.moment}


def target_of(cell: Cell) -> str:
    """What its memory is estimated for."""
    return "cpu" if cell.where.startswith("cpu") else "tpu"


def publish() -> None:
    """Compares all that was compiled, and writes the table."""
    from benchmarks import report

    done, rows = known(), []
    for cell in cells():
        if cell.name not in done:
            continue
        found = done[cell.name] | {"target": target_of(cell)}
        done[cell.name] = found = found | compared(cell, found)
        taper = {None: "exact", 1: "uniform"}.get(cell.segments, f"{cell.segments} stairs")
        gib = [f"{found[name] / 2**30:.3f}" for name in ("exact", "plan", "compiler")]
        rows.append(
            [
                cell.config.replace("tlm_", "").replace("_3b", ".3b").replace(":", " "),
                cell.where + (", fsdp" if num_devices(cell) > 1 else ""),
                taper,
                cell.remat,
                str(cell.parts),
                *gib,
                f"{found['plan'] / found['compiler']:.2f}",
            ]
        )
    CELLS.write_text("".join(json.dumps(found) + "\n" for found in done.values()))
    header = ["config", "for", "taper", "remat", "parts", "exact part, GiB", "plan, GiB"]
    header += ["compiler, GiB", "plan / compiler"]
    report.publish("plan-memory", report.table(header, rows), PAGE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("cpu", "tpu", "publish"))
    what = parser.parse_args().what
    if what == "tpu":
        topology.prepare_environment()
    else:
        import jax

        jax.config.update("jax_num_cpu_devices", DEVICES)
        jax.config.update("jax_disable_most_optimizations", True)  # of LLVM; compiles sooner
    done = known()
    for cell in cells():
        if (
            cell.name in done
            or cell.where.startswith("cpu") != (what == "cpu")
            or what == "publish"
        ):
            continue
        found = measure(cell)
        with CELLS.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(found, flush=True)
    if what == "publish":
        publish()


if __name__ == "__main__":
    main()

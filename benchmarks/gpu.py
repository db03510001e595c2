"""configs/tlm_440m.py on one GPU: steps, kernels, memory policies, torch, decoding, evaluation.

    python -m benchmarks.gpu [--minutes 25] [--torch_python X/bin/python] [--results FILE.json]
    python -m benchmarks.gpu --small --results FILE.json        # every arm in miniature, on a CPU

Train steps are taken by processes that compile at the same time and are then timed one after the
other, a group at a time; decoding and evaluation come after the first group. Figures are written to
the file as each arm ends, so that the same command continues after an interruption; arms are in
order of importance, and none begins after `--minutes`. An arm that broke is recorded as such, and
tried again. X is an interpreter with torch and transformers; without it their arms are left out.
The table goes to docs/gpu.md (not with --small).

The first arm measures an 8,192 x 8,192 x 8,192 product in bfloat16. Shares are of that and of the
datasheet's dense bfloat16 rate, with FLOPs that leave out masked attention and what is computed
again.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import race, report
from benchmarks.step_time import ROOT, UNIFORM, Folder, stairs, with_taper, worker
from tlm_jax import config_io, costs, files
from tlm_jax.architectures import with_architecture
from tlm_jax.config import AttentionConfig, RunConfig
from tlm_jax.data.tokenizers import load_tokenizer
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.evaluation.generation import Generator
from tlm_jax.evaluation.requests import Request
from tlm_jax.evaluation.scoring import Scorer
from tlm_jax.models import skeleton

RESULTS = ROOT / "docs" / "results" / "gpu.json"
PAGE = ROOT / "docs" / "gpu.md"
DATASHEET = {"H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense bfloat16 TFLOP/s by part of the device's name, special names first."""
ROWS = 8
"""Of 4,096 tokens in a step, unless an arm says otherwise."""
VARIABLES = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # processes that wait leave the memory to others
    # As train steps are compiled (training/step.py); here for decoding and evaluation.
    "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false",
}
QUEUED = 3
"""Steps of a turn, which the device takes one after the other without waiting for the host."""
TOGETHER = 9
"""Processes that compile at the same time."""
_SECONDS = 600
"""Longest that an arm may take."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """Train steps of a config, ours or a uniform Llama of its shape in torch."""

    config: RunConfig
    documents: int = 1
    """In each row."""
    torch: tuple[str, ...] | None = None
    """Words for torch_worker.py; None is ours."""
    flags: str = ""
    """More of XLA's."""


def base_config(*, small: bool) -> RunConfig:
    """The 440M config with the rows of one GPU, or a miniature of it."""
    config = config_io.load_config(ROOT / "configs" / "tlm_440m.py")
    data = dataclasses.replace(config.data, batch_size=2 if small else ROWS)
    if small:
        data = dataclasses.replace(data, seq_len=128)
        model = dataclasses.replace(
            config.model,
            vocab_size=512,
            num_layers=4,
            d_model=64,
            mlp_width=256,
            mixer=AttentionConfig(num_heads=2),
        )
        config = dataclasses.replace(config, model=model)
    model = dataclasses.replace(config.model, remat="none")
    return dataclasses.replace(config, data=data, model=model)


def steps(base: RunConfig) -> dict[str, Step]:
    """The arms that train, the most important first."""
    two = stairs(base, 2)

    def change(rows: int, **model: Any) -> RunConfig:
        data = dataclasses.replace(two.data, batch_size=max(two.data.batch_size * rows // ROWS, 1))
        return dataclasses.replace(two, data=data, model=dataclasses.replace(two.model, **model))

    full = change(ROWS, remat="full")
    chunks = dataclasses.replace(two.training, loss_chunk=min(1024, two.data.seq_len))
    large_chunks = dataclasses.replace(two, training=chunks)
    rows = dataclasses.replace(two.data, batch_size=2 * two.data.batch_size)
    whole_tiles = dataclasses.replace(
        two.model.taper, multiple_of=128 if two.data.seq_len > 1024 else 32
    )
    arms = {
        "uniform": Step(config=with_taper(base, UNIFORM)),
        "2 stairs": Step(config=two),
        "4 stairs": Step(config=stairs(base, 4)),
        "exact taper": Step(config=base),
        "2 stairs, 16 rows": Step(config=dataclasses.replace(two, data=rows)),
        "2 stairs, 16 rows, loss in chunks of 1,024": Step(
            config=dataclasses.replace(large_chunks, data=rows)
        ),
        "2 stairs in multiples of 128": Step(config=with_taper(two, whole_tiles)),
        "2 stairs, 6 documents a row": Step(config=two, documents=6),
        "torch.compile": Step(config=base, torch=("--compile",)),
    }
    for name in ("gated_attention", "hope_attention", "titans"):
        arms[f"{name}, 2 stairs, remat full"] = Step(config=with_architecture(full, name))
    arms["torch"] = Step(config=base, torch=())
    arms["2 stairs, loss in chunks of 1,024"] = Step(config=large_chunks)
    arms["2 stairs, not autotuned"] = Step(config=two, flags="--xla_gpu_autotune_level=0")
    arms["2 stairs, in loops"] = Step(config=change(ROWS, scan_layers=True))
    arms["2 stairs, remat full"] = Step(config=full)
    arms["exact taper, remat full"] = Step(config=stairs(full, None))
    arms["2 stairs, remat full, 32 rows"] = Step(config=change(32, remat="full"))
    arms["2 stairs, remat dots"] = Step(config=change(ROWS, remat="dots"))
    arms["2 stairs, remat attention"] = Step(config=change(ROWS, remat="attention"))
    arms["2 stairs, 40 documents a row"] = Step(config=two, documents=40)
    chunked = change(ROWS, remat="full", attention_kernel="chunked")
    arms["2 stairs, remat full, chunked attention"] = Step(config=chunked)
    return arms


def entrant(step: Step, folder: Folder, python: str) -> race.Entrant:
    """The process that takes an arm's steps."""
    if step.torch is not None:
        return worker(python, "torch_worker.py", step.config, *step.torch)
    ours = folder.ours(
        step.config, **VARIABLES | {"XLA_FLAGS": f"{VARIABLES['XLA_FLAGS']} {step.flags}"}
    )
    return dataclasses.replace(ours, command=[*ours.command, str(step.documents)])


def figures(step: Step, found: race.Finish) -> dict[str, Any]:
    """What is recorded of an arm."""
    config, seconds = step.config, found.median
    tokens = config.data.batch_size * config.data.seq_len
    flops = costs.model_costs(config.model, config.data.seq_len).training_flops * tokens
    return {
        "ms": seconds * 1e3,
        "middle_half": found.middle_half,
        "tokens_per_second": tokens / seconds,
        "tflops": flops / seconds / 1e12,
        **found.said,
    }


def product(base: RunConfig) -> dict[str, Any]:
    """TFLOP/s of a large product of random bfloat16 numbers: ten at a time, the median of five."""
    size = 8192 if base.data.seq_len > 1024 else 256
    key = jax.random.key(0)
    a = jax.random.normal(key, (size, size), jnp.bfloat16)
    multiply = jax.jit(jnp.matmul)
    multiply(a, a).block_until_ready()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        products = [multiply(a, a) for _ in range(10)]
        jax.block_until_ready(products)
        times.append((time.perf_counter() - begin) / len(products))
    device = jax.devices()[0].device_kind
    tflops = 2 * size**3 / statistics.median(times) / 1e12
    return {"tflops": tflops, "device": device, "machine": report.software()}


def _random_model(base: RunConfig) -> tuple[Any, Any, Any]:
    """(structure, random parameters, mesh) of the model with two stairs."""
    model = skeleton(stairs(base, 2).model)
    mesh = mesh_lib.single_device_mesh()
    jax.set_mesh(mesh)
    return model, jax.jit(model.init)(jax.random.key(0)), mesh


def _prompts(base: RunConfig, rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, base.model.vocab_size, (rows, length), np.int32)


def decoding(base: RunConfig, *, rows: int) -> dict[str, Any]:
    """Greedy tokens per second after prompts of a quarter of the context, prompts included."""
    model, params, mesh = _random_model(base)
    length, new = base.data.seq_len // 4, min(base.data.seq_len // 4, 256)
    generator = Generator(model, params, load_tokenizer("bytes"), mesh, max_length=length + new)
    prompts = _prompts(base, rows, length).tolist()

    def once() -> float:
        begin = time.perf_counter()
        for piece in generator.pieces(prompts, length, new):
            np.asarray(piece)
        return time.perf_counter() - begin

    once()
    seconds = statistics.median(once() for _ in range(3))
    return {"tokens_per_second": rows * new / seconds, "ms": seconds * 1e3}


def evaluation(base: RunConfig) -> dict[str, Any]:
    """Requests for log-likelihoods per second: questions of 20 to 100 tokens, four answers each."""
    model, params, mesh = _random_model(base)
    scorer = Scorer(model, params, mesh, max_length=base.data.seq_len)
    rng = np.random.default_rng(0)
    requests = []
    for number, row in enumerate(_prompts(base, 8 if base.data.seq_len <= 1024 else 512, 100)):
        context = tuple(row[: rng.integers(20, 100)].tolist())
        for _ in range(4):
            answer = tuple(rng.integers(3, base.model.vocab_size, 10).tolist())
            requests.append(Request(context=context, continuation=answer, question=number))

    def once() -> float:
        begin = time.perf_counter()
        for _ in scorer.score(requests):
            pass
        return time.perf_counter() - begin

    once()
    seconds = once()
    return {"requests_per_second": len(requests) / seconds, "ms": seconds * 1e3}


FUNCTIONS: dict[str, Callable[[RunConfig], dict[str, Any]]] = {
    "product": product,
    "decoding, 1 row": functools.partial(decoding, rows=1),
    "decoding, 32 rows": functools.partial(decoding, rows=32),
    "evaluation": evaluation,
}
"""Arms that need no worker with turns."""


def in_a_process(name: str, *, small: bool) -> dict[str, Any]:
    """What a function of FUNCTIONS returns, run by another process."""
    words = ["--arm", name, *(["--small"] if small else [])]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *words],
        stdout=subprocess.PIPE,
        text=True,
        timeout=_SECONDS,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


Arm = tuple[str, dict[str, Any]]


def arms(options: argparse.Namespace) -> list[str]:
    """Names of all arms, in order of importance."""
    trained = [
        name
        for name, step in steps(base_config(small=options.small)).items()
        if step.torch is None or options.torch_python
    ]
    others = [name for name in FUNCTIONS if name != "product"]
    first, later = trained[:TOGETHER], trained[TOGETHER:]
    return [name for name in ("product", *first, *others, *later) if options.only in name]


def measure(todo: list[str], options: argparse.Namespace) -> Iterator[Arm]:
    """Yields each arm's name and figures, or its error, until the time is up."""
    end = time.monotonic() + 60 * options.minutes
    known = steps(base_config(small=options.small))
    groups: list[list[str]] = [[]]
    for name in todo:
        if name in known:
            if len(groups[-1]) == TOGETHER:
                groups.append([])
            groups[-1].append(name)
    others = [name for name in todo if name not in known and name != "product"]
    if "product" in todo:
        yield _tried("product", options)
    for number, group in enumerate(groups):
        with tempfile.TemporaryDirectory() as path:
            folder = Folder(path)
            entrants = {n: entrant(known[n], folder, options.torch_python) for n in group}
            ours = [name for name in group if known[name].torch is None]  # torch takes longer
            racing = race.one_by_one(entrants, options.turns, ready=ours, queued=QUEUED)
            with contextlib.closing(racing) as finishes:
                for name, found in finishes:
                    broke = {"error": "the worker broke; its message is above"}
                    yield name, broke if found is None else figures(known[name], found)
                    if time.monotonic() > end:
                        return
        for name in others if number == 0 else ():
            yield _tried(name, options)
            if time.monotonic() > end:
                return


def _tried(name: str, options: argparse.Namespace) -> Arm:
    try:
        return name, in_a_process(name, small=options.small)
    except Exception as error:
        return name, {"error": f"{type(error).__name__}: {error}"[:200]}


def publish(record: Mapping[str, Mapping[str, Any]]) -> None:
    """The table of docs/gpu.md."""
    ceiling = record["product"]["tflops"]
    device = record["product"]["device"]
    sheet = next((rate for part, rate in DATASHEET.items() if part in device), None)
    rows = []
    for name, one in record.items():
        if "tflops" not in one or name == "product":
            continue
        peak = one.get("device_peak_mib", 0) / 1024
        rows.append(
            [
                name,
                f"{one['compile_s']:.0f}",
                f"{one['ms']:.0f}",
                f"{one['tokens_per_second']:,.0f}",
                f"{one['tflops']:.0f}",
                f"{one['tflops'] / ceiling:.1%}",
                f"{one['tflops'] / sheet:.1%}" if sheet else "",
                f"{peak:.1f}" if peak else "",
            ]
        )
    header = ["model", "compile s", "ms per step", "tokens/s", "TFLOP/s", "of the product"]
    header += ["of the datasheet", "peak GiB"]
    lines = [report.table(header, rows), ""]
    for name, one in record.items():
        for what in ("tokens_per_second", "requests_per_second"):
            if name in FUNCTIONS and what in one:
                lines.append(f"- {name}: {one[what]:,.0f} {what.replace('_per_', ' per ')}")
        if "error" in one:
            lines.append(f"- {name}: broke ({one['error']})")
        if "note" in one:
            lines.append(f"- {name}: {one['note']}")
    lines += ["", f"The product: {ceiling:.0f} TFLOP/s. {record['product']['machine']}."]
    report.publish("gpu", "\n".join(lines), PAGE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--turns", type=int, default=8, help="of an arm, three steps each")
    parser.add_argument("--torch_python", default="", help="an interpreter with torch")
    parser.add_argument("--only", default="", help="arms whose name has this")
    parser.add_argument("--small", action="store_true", help="a miniature, for a CPU")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--arm", choices=FUNCTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(FUNCTIONS[options.arm](base_config(small=options.small))))
        return
    record: dict[str, dict[str, Any]] = {}
    if options.results.is_file():
        record = json.loads(options.results.read_text())["arms"]
    todo = [name for name in arms(options) if "error" in record.get(name, {"error": ""})]
    left = set(todo)
    for name, one in measure(todo, options):
        record[name] = one
        left.remove(name)
        short = {k: v for k, v in one.items() if isinstance(v, float | str)}
        print(f"{name}: {short}", flush=True)
        files.write_text(options.results, json.dumps({"arms": record}, indent=1) + "\n")
    if left:
        print(f"The time is up with {len(left)} arms left; the same command continues.")
    if not options.small and "tflops" in record.get("product", {}):
        publish(record)


if __name__ == "__main__":
    main()

"""Step times: tapers against their uniform twins, and against other frameworks' steps.

    python -m benchmarks.step_time tiny
    python -m benchmarks.step_time others [--torch_python X/bin/python]
        [--nanodo Y/bin/python CHECKOUT] [--maxtext_python Z/bin/python]

Both write their tables to docs/speed.md; `benchmarks.gpu` is the one for a GPU. X is an environment
with torch and transformers; the heads of nanodo_worker.py and maxtext_worker.py say how to make Y
and Z. MKL, which torch multiplies with, keeps its best kernels from processors that are not
Intel's; a preloaded function lifts that (this needs a C compiler). Each runs as its users would
run it: ours asks for large pages, as train.py does.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile
import time

import jax

from benchmarks import race, report
from tlm_jax import config_io, costs
from tlm_jax.architectures import ARCHITECTURES
from tlm_jax.cli import large_pages
from tlm_jax.config import AttentionConfig, DataConfig, ModelConfig, RunConfig, TaperConfig

ROOT = pathlib.Path(__file__).parents[1]
UNIFORM = TaperConfig(schedule="uniform", multiple_of=1)


def shape(
    num_layers: int, d_model: int, heads: int, width: int, vocab: int, rows: int, length: int
) -> RunConfig:
    """A tapered Transformer of a yardstick's shape."""
    return RunConfig(
        model=ModelConfig(
            vocab_size=vocab,
            num_layers=num_layers,
            d_model=d_model,
            mlp_width=width,
            mixer=AttentionConfig(num_heads=heads),
            remat="none",
        ),
        data=DataConfig(batch_size=rows, seq_len=length),
    )


SHAPES = (
    shape(12, 256, 4, 704, 4096, 8, 256),
    shape(12, 512, 8, 1408, 32_000, 4, 512),
)
"""Transformers that are timed against other frameworks."""
OURS = "tlm-jax, tapered"


def with_taper(config: RunConfig, taper: TaperConfig) -> RunConfig:
    """The config with another taper."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, taper=taper))


def stairs(config: RunConfig, number: int | None) -> RunConfig:
    """The config with its taper in so many segments."""
    return with_taper(config, dataclasses.replace(config.model.taper, num_segments=number))


def in_bfloat16(config: RunConfig) -> RunConfig:
    """The config with the layers' arithmetic in bfloat16."""
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, compute_dtype="bfloat16")
    )


class Folder:
    """Where the workers' configs lie."""

    def __init__(self, path: str) -> None:
        self.path = pathlib.Path(path)

    def ours(self, config: RunConfig, **env: str) -> race.Entrant:
        """A worker of ours."""
        file = self.path / f"{len(list(self.path.iterdir()))}.json"
        file.write_text(json.dumps(config_io.to_dict(config)))
        return race.Entrant(
            command=[sys.executable, "-m", "benchmarks.train_worker", str(file)],
            env={large_pages.VARIABLE: large_pages.VALUE} | env,  # as train.py sets it
        )


def flops_a_step(config: RunConfig) -> int:
    """Of matrix products, with attention over all keys, as a dense framework counts."""
    per_token = costs.model_costs(config.model, config.data.seq_len).training_flops_full
    return per_token * config.data.batch_size * config.data.seq_len


def tiny(options: argparse.Namespace, folder: Folder) -> None:
    """configs/tiny.py of each architecture, tapered and uniform."""
    rows = []
    for name in ARCHITECTURES:
        tapered = config_io.load_config(f"{ROOT}/configs/tiny.py:{name}")
        arms = {"tapered": tapered, "uniform": with_taper(tapered, UNIFORM)}
        found = race.run({arm: folder.ours(one) for arm, one in arms.items()}, options.steps)
        for arm, one in found.items():
            rows.append(
                [
                    f"{name}, {arm}",
                    f"{one.median * 1e3:.0f}",
                    one.middle_half,
                    f"{flops_a_step(arms[arm]) / one.median / 1e9:.0f}",
                    f"{one.said['compile_s']:.0f}",
                    f"{one.said['peak_mib']:,.0f}",
                    f"{race.ratio(found['tapered'], one):.3f}",
                ]
            )
    header = ["model", "ms per step", "middle half", "GFLOP/s", "compile s", "peak MiB"]
    report.publish(
        "step-time",
        f"{report.table([*header, 'tapered over it'], rows)}\n\nMedians of {options.steps} "
        f"alternating steps; ratios are medians over pairs. configs/tiny.py; {report.machine()}.",
    )


def others(options: argparse.Namespace, folder: Folder) -> None:
    """Our steps against those of other frameworks that are here, shape by shape."""
    unlocked = race.unlocked_mkl(folder.path)
    parts, versions = [], set()
    for config in SHAPES:
        # In two races, as memory may not hold all; ours takes part in both.
        torch, jax_ = {OURS: folder.ours(config)}, {OURS: folder.ours(config)}
        torch["tlm-jax, uniform"] = folder.ours(with_taper(config, UNIFORM))
        torch["tlm-jax, tapered, bfloat16"] = folder.ours(in_bfloat16(config))
        if python := options.torch_python:
            theirs = worker(python, "torch_worker.py", config)
            compiled = worker(python, "torch_worker.py", config, "--compile")
            torch["torch, as installed"] = theirs
            torch["torch, MKL unlocked"] = dataclasses.replace(theirs, env=unlocked)
            torch["torch.compile, MKL unlocked"] = dataclasses.replace(compiled, env=unlocked)
            half = worker(python, "torch_worker.py", config, "--bfloat16")
            torch["torch, bfloat16 (autocast)"] = half
            half = worker(python, "torch_worker.py", config, "--bfloat16", "--compile")
            torch["torch.compile, bfloat16 (autocast)"] = half
        if options.nanodo:
            python, checkout = options.nanodo
            jax_["NanoDO"] = worker(python, "nanodo_worker.py", config, checkout)
        if python := options.maxtext_python:
            jax_["MaxText"] = worker(python, "maxtext_worker.py", config)
            jax_["MaxText, unrolled"] = worker(python, "maxtext_worker.py", config, "--unrolled")
        rows = []
        for arms in (torch, jax_):
            found = race.run(arms, options.steps) if len(arms) > 1 else {}
            for arm, one in found.items():
                versions |= {one.said["versions"]} if "versions" in one.said else set()
                rows.append(
                    [
                        arm,
                        f"{one.median * 1e3:.0f}",
                        one.middle_half,
                        f"{race.ratio(one, found[OURS]):.2f}",
                        f"{flops_a_step(config) / one.median / 1e9:.0f}",
                        f"{one.said['peak_mib']:,.0f}",
                    ]
                )
        header = ["step", "ms", "middle half", "over ours, tapered", "GFLOP/s", "peak MiB"]
        parts.append(f"{describe(config)}:\n\n{report.table(header, rows)}")
    parts.append(
        f"Medians of {options.steps} alternating steps, a process each, in two races; ratios are "
        f"medians over pairs; FLOPs as ours would need, attention over all keys. A product of "
        f"2,048 x 2,048 reaches {ceiling():.0f} GFLOP/s here. {'; '.join(sorted(versions))}; "
        f"{report.machine()}."
    )
    report.publish("step-others", "\n\n".join(parts))


def worker(python: str, script: str, config: RunConfig, *words: str) -> race.Entrant:
    """One of another framework, for a model of the config's shape, uniform."""
    model, mixer = config.model, config.model.mixer
    assert isinstance(mixer, AttentionConfig)
    shape = {
        "num_layers": model.num_layers,
        "d_model": model.d_model,
        "num_heads": mixer.num_heads,
        "mlp_width": model.mlp_width,
        "vocab_size": model.vocab_size,
        "batch_size": config.data.batch_size,
        "seq_len": config.data.seq_len,
    }
    path = ROOT / "benchmarks" / script
    return race.Entrant(command=[python, str(path), json.dumps(shape), *words])


def ceiling() -> float:
    """GFLOP/s of a large float32 product in JAX, the best of five."""
    a = jax.random.normal(jax.random.key(0), (2048, 2048))
    product = jax.jit(jax.numpy.matmul)
    product(a, a).block_until_ready()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        product(a, a).block_until_ready()
        times.append(time.perf_counter() - begin)
    return 2 * 2048**3 / min(times) / 1e9


def describe(config: RunConfig) -> str:
    """Depth, widths, vocabulary and batch in words."""
    model, data = config.model, config.data
    return (
        f"{model.num_layers} layers x {model.d_model}, MLP {model.mlp_width:,}, vocabulary "
        f"{model.vocab_size:,}, batch {data.batch_size} x {data.seq_len}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    tables = {"tiny": tiny, "others": others}
    parser.add_argument("table", choices=tables, nargs="?", default="tiny")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--torch_python", default="", help="of others: PyTorch's interpreter")
    parser.add_argument("--maxtext_python", default="", help="of others: MaxText's interpreter")
    parser.add_argument("--nanodo", nargs=2, metavar=("PYTHON", "CHECKOUT"), help="of others")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as path:
        tables[options.table](options, Folder(path))


if __name__ == "__main__":
    main()

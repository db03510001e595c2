"""What a step costs with the run folder in a bucket instead of a local folder.

    python -m benchmarks.buckets [--steps 60] [--every 20] [--repeats 3] [--latency 0.03]

Trains the same small model turn by turn in a local folder and on the Google Cloud Storage server
of the tests, a process of its own that waits `--latency` seconds before each answer. It logs every
step and saves every `--every` steps. A figure is the wall time per step from the fifth step
to the end of the run, saves included; median and range of the repeats.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from tlm_jax import config as c
from tlm_jax import output, storage
from tlm_jax.cli.parsing import quiet_libraries

SERVER = pathlib.Path(__file__).parents[1] / "tests" / "gcs_server.py"
FIRST = 5


def run_config(steps: int, every: int) -> c.RunConfig:
    """1.3M parameters: 16 MB in a checkpoint."""
    return c.RunConfig(
        name="buckets",
        model=c.ModelConfig(
            vocab_size=4096,
            num_layers=4,
            d_model=128,
            mlp_width=352,
            mixer=c.AttentionConfig(num_heads=4),
            remat="none",
        ),
        data=c.DataConfig(seq_len=128, batch_size=4),
        training=c.TrainingConfig(
            num_steps=steps,
            log_every=1,
            eval_every=0,
            eval_batches=1,
            checkpoint_every=every,
            keep_last=2,
            sample_tokens=0,
        ),
    )


def seconds_per_step(config: c.RunConfig, folder: pathlib.Path) -> float:
    """Of a new run in a folder."""
    from tlm_jax.training import loop

    times: dict[int, float] = {}
    trainer = loop.Trainer(
        config,
        folder,
        output.console(quiet=True),
        hooks=[lambda done, _: times.update({done: time.perf_counter()})],
    )
    trainer.run()
    return (time.perf_counter() - times[FIRST]) / (config.training.num_steps - FIRST)


def start_server(latency: float) -> tuple[subprocess.Popen[str], str]:
    """A server with a bucket, and its address."""
    process = subprocess.Popen(
        [sys.executable, str(SERVER), str(latency)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--latency", type=float, default=0.03)
    options = parser.parse_args()
    quiet_libraries()
    server, url = start_server(options.latency)
    os.environ |= {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anything",
    }
    config = run_config(options.steps, options.every)
    found: dict[str, list[float]] = {"local folder": [], "bucket": []}
    try:
        with tempfile.TemporaryDirectory() as name:
            for turn in range(options.repeats):
                for arm, root in (
                    ("local folder", pathlib.Path(name)),
                    ("bucket", storage.path("gs://bucket")),
                ):
                    found[arm].append(seconds_per_step(config, root / f"run-{turn}"))
                    print(f"{arm}: {found[arm][-1] * 1e3:.1f} ms per step", flush=True)
    finally:
        server.kill()
        server.wait()
    for arm, values in found.items():
        middle, low, high = statistics.median(values), min(values), max(values)
        print(
            f"{arm}: median {middle * 1e3:.1f} ms per step ({low * 1e3:.1f} to {high * 1e3:.1f}), "
            f"{middle / statistics.median(found['local folder']):.2f} of the local folder's"
        )


if __name__ == "__main__":
    main()

"""Kills a run in a bucket again and again, while its server fails at random.

    python tests/faults/buckets.py [--kills 20] [--seed 0]

A process trains with its run folder on the Google Cloud Storage server of the tests, which answers
some requests with status 503, closes some connections and is too late with others. The process is
killed (-9) at random moments, and the same command must go on from a whole checkpoint. At the end
all losses must be those of a run in a local folder that nobody killed. Prints survived/total; the
exit status is 1 if anything was lost.
"""

import argparse
import collections
import json
import math
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

import gcs_server  # noqa: E402
from kills import losses, write_inputs  # noqa: E402

RATES = {503: 0.01, "drop": 0.005, "hang": 0.001}
PATIENCE = 2.0
"""Seconds that clients wait for a byte; a late answer takes three times as long."""
CLIENT = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests" / "training")!r})
from tlm_jax import storage
storage._READ_SECONDS = {PATIENCE}
import driver
sys.exit(driver.main())
"""


class Bucket:
    """The server, with its faults, and what lies there."""

    def __init__(self, rng: random.Random) -> None:
        gcs_server.HANG = 3 * PATIENCE
        self.server = gcs_server.Server("bucket")
        self.server.fault = self._fault
        self.faults: collections.Counter[gcs_server.Fault] = collections.Counter()
        self._rng = rng

    def _fault(self, method: str, path: str) -> gcs_server.Fault:
        drawn = self._rng.random()
        for fault, rate in RATES.items():
            if drawn < rate:
                self.faults[fault] += 1
                return fault
            drawn -= rate
        return None

    def losses(self) -> dict[int, float]:
        """Training loss of each step; the newest where steps were repeated."""
        found = {}
        for name in self.server.names("run/metrics."):
            for line in self.server.buckets["bucket"][name].data.splitlines():
                record = json.loads(line)
                if record["kind"] == "train":
                    found[record["step"]] = record["loss"]
        return found

    def steps(self) -> list[int]:
        """Whole checkpoints."""
        found = (
            re.fullmatch(r"run/checkpoints/(\d+)/commit_success.txt", name)
            for name in self.server.names("run/checkpoints/")
        )
        return sorted(int(match[1]) for match in found if match)


def start(folder: pathlib.Path, run: str, bucket: Bucket | None) -> subprocess.Popen[str]:
    """Trains; in the bucket, a bit slower than it could."""
    variables = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    slowly = [] if bucket is None else ["--pause-from-batch", "1", "--pause", "0.05"]
    words = ["train", "--config", str(folder / "config.py"), "--workdir", run]
    words += ["--training.num_steps", "4000", "--training.checkpoint_every", "10"]
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, *slowly, *words],
        env=os.environ | variables | ({} if bucket is None else bucket.server.environment),
        stdin=subprocess.DEVNULL,
        stdout=(folder / "out").open("w"),
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_once(folder: pathlib.Path, bucket: Bucket, rng: random.Random) -> str:
    """Starts the run and kills it after its first new record; what is wrong, or ""."""
    known, begun = max(bucket.steps(), default=0), len(bucket.server.names("run/metrics."))
    process = start(folder, "gs://bucket/run", bucket)
    give_up = time.monotonic() + 240
    while len(bucket.server.names("run/metrics.")) == begun:
        if process.poll() is not None or time.monotonic() > give_up:
            process.kill()
            return f"the run did not start:\n{(folder / 'out').read_text()[-800:]}"
        time.sleep(0.1)
    time.sleep(rng.uniform(0, 15))
    if process.poll() is not None:
        return f"the run ended by itself:\n{(folder / 'out').read_text()[-800:]}"
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest = max(bucket.steps(), default=0)
    print(
        f"  killed after step {max(bucket.losses())}; newest whole checkpoint {newest}", flush=True
    )
    return "a checkpoint was lost" if newest < known else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    bucket = Bucket(random.Random(options.seed))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_inputs(folder)
        survived = 0
        for index in range(options.kills):
            fault = kill_once(folder, bucket, rng)
            survived += not fault
            print(f"kill {index + 1}/{options.kills}: {fault or 'survived'}", flush=True)
        last = max(bucket.losses(), default=0) + 2
        process = start(folder, "gs://bucket/run", bucket)
        while max(bucket.losses(), default=0) < last and process.poll() is None:
            time.sleep(0.1)
        process.terminate()
        status, found = process.wait(), bucket.losses()
        alone = start(folder, str(folder / "alone"), None)
        while max(losses(folder / "alone"), default=0) < last and alone.poll() is None:
            time.sleep(0.1)
        alone.kill()
        expected = losses(folder / "alone")
    wrong = [s for s in range(1, last + 1) if found.get(s, math.nan) != expected.get(s)]
    asked = len(bucket.server.requests)
    shown = ", ".join(f"{bucket.faults[f]} x {f}" for f in RATES)
    print(f"told to stop, the run ended with {status}; faults: {shown} in {asked:,} requests")
    print(f"steps whose loss differs from that of a local run: {wrong or 'none'} of {last}")
    print(f"survived {survived}/{options.kills}")
    return int(survived < options.kills or bool(wrong) or status != 75)


if __name__ == "__main__":
    sys.exit(main())

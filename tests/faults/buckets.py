"""Kills a run in a bucket again and again, while its server fails at random.

    python tests/faults/buckets.py [--kills 20] [--seed 0] [--scheme gs] [--processes 1]

A job trains with its run folder on a server of the tests, for gs:// or s3://, which answers some
requests with status 503, closes some connections and is too late with others. All processes of the
job are killed (-9) at random moments, and the same command must go on from a whole checkpoint. At
the end all losses must be exactly those of a run of as many processes in a local folder that nobody
killed. Prints survived/total; the exit status is 1 if anything was lost.
"""

import argparse
import collections
import json
import math
import os
import pathlib
import random
import re
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

import gcs_server  # noqa: E402
import s3_server  # noqa: E402
from kills import losses, write_inputs  # noqa: E402

RATES = {503: 0.01, "drop": 0.005, "hang": 0.001}
PATIENCE = 2.0
"""Seconds that clients wait for a byte; a late answer takes three times as long."""
CLIENT = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests" / "training")!r})
from tlm_jax import storage
storage._READ_SECONDS = {PATIENCE}
import s3fs
s3fs.S3FileSystem.read_timeout = {PATIENCE}
import driver
sys.exit(driver.main())
"""


class Bucket:
    """The server, with its faults, and what lies there."""

    def __init__(self, scheme: str, rng: random.Random) -> None:
        gcs_server.HANG = s3_server.HANG = 3 * PATIENCE
        kind = {"gs": gcs_server.Server, "s3": s3_server.Server}[scheme]
        self.server: s3_server.Either = kind("bucket")
        self.run = f"{scheme}://bucket/run"
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
            for line in self.server.read(name).splitlines():
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


def start(
    folder: pathlib.Path, run: str, bucket: Bucket | None, number: int
) -> list[subprocess.Popen[str]]:
    """A job of so many processes that trains; in the bucket, a bit slower than it could."""
    variables = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    if number > 1:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            variables["JAX_COORDINATOR_ADDRESS"] = f"localhost:{probe.getsockname()[1]}"
        variables["JAX_NUM_PROCESSES"] = str(number)
    slowly = [] if bucket is None else ["--pause-from-batch", "1", "--pause", "0.05"]
    words = ["train", "--config", str(folder / "config.py"), "--workdir", run]
    words += ["--training.num_steps", "4000", "--training.checkpoint_every", "10"]
    words += ["--mesh.data", "1", "--mesh.fsdp", str(number)]  # each holds a part of every array
    job = []
    for index in range(number):
        with (folder / f"out-{index}").open("w") as out:
            job.append(
                subprocess.Popen(
                    [sys.executable, "-c", CLIENT, *slowly, *words],
                    env=os.environ
                    | variables
                    | {"JAX_PROCESS_ID": str(index)}
                    | ({} if bucket is None else bucket.server.environment),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
    return job


def kill(job: list[subprocess.Popen[str]]) -> None:
    """Kills all at once, as when a slice of machines is taken away."""
    for process in job:
        process.kill()
    for process in job:
        process.wait()


def ended(job: list[subprocess.Popen[str]]) -> bool:
    """Whether a process has ended by itself."""
    return any(process.poll() is not None for process in job)


def kill_once(folder: pathlib.Path, bucket: Bucket, rng: random.Random, number: int) -> str:
    """Starts the run and kills it after its first new record; what is wrong, or ""."""
    known, begun = max(bucket.steps(), default=0), len(bucket.server.names("run/metrics."))
    job = start(folder, bucket.run, bucket, number)
    give_up = time.monotonic() + 240
    while len(bucket.server.names("run/metrics.")) == begun:
        if ended(job) or time.monotonic() > give_up:
            kill(job)
            return f"the run did not start:{said(folder, number)}"
        time.sleep(0.1)
    time.sleep(rng.uniform(0, 15))
    early = ended(job)
    kill(job)
    if early:
        return f"the run ended by itself:{said(folder, number)}"
    newest = max(bucket.steps(), default=0)
    print(
        f"  killed after step {max(bucket.losses())}; newest whole checkpoint {newest}", flush=True
    )
    return "a checkpoint was lost" if newest < known else ""


def said(folder: pathlib.Path, number: int) -> str:
    """The last that each process wrote."""
    texts = ((folder / f"out-{index}").read_text()[-800:] for index in range(number))
    return "".join(f"\n--- process {index}\n{text}" for index, text in enumerate(texts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scheme", choices=("gs", "s3"), default="gs")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    rng, number = random.Random(options.seed), options.processes
    bucket = Bucket(options.scheme, random.Random(options.seed))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_inputs(folder)
        survived = 0
        for index in range(options.kills):
            fault = kill_once(folder, bucket, rng, number)
            survived += not fault
            print(f"kill {index + 1}/{options.kills}: {fault or 'survived'}", flush=True)
        last = max(bucket.losses(), default=0) + 2
        job = start(folder, bucket.run, bucket, number)
        while max(bucket.losses(), default=0) < last and not ended(job):
            time.sleep(0.1)
        job[0].terminate()
        statuses, found = {process.wait() for process in job}, bucket.losses()
        alone = start(folder, str(folder / "alone"), None, number)
        while max(losses(folder / "alone"), default=0) < last and not ended(alone):
            time.sleep(0.1)
        kill(alone)
        expected = losses(folder / "alone")
    wrong = [s for s in range(1, last + 1) if found.get(s, math.nan) != expected.get(s)]
    asked = len(bucket.server.requests)
    shown = ", ".join(f"{bucket.faults[f]} x {f}" for f in RATES)
    print(f"told to stop, the run ended with {statuses}; faults: {shown} in {asked:,} requests")
    print(f"steps whose loss differs from that of a local run: {wrong or 'none'} of {last}")
    print(f"survived {survived}/{options.kills}")
    return int(survived < options.kills or bool(wrong) or statuses != {75})


if __name__ == "__main__":
    sys.exit(main())

"""Kills one process of a training job again and again, and counts what survives.

    python tests/faults/kills.py [--kills 20] [--processes 2] [--seed 0]

A job of several real processes trains a small model; a process drawn at random is killed (-9) at
a random moment, saves included. The others must end by themselves, with a message, within a
minute, and the same command must go on from a whole checkpoint. At the end all losses of the job
must be those of a run that nobody killed, with one process. Prints survived/total; the exit
status is 1 if anything was lost.
"""

import argparse
import json
import math
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parents[2]
DRIVER = ROOT / "tests" / "training" / "driver.py"
BOUND = 60
"""Seconds within which the processes that were not killed must end."""
CONFIG = """
import pathlib

from tlm_jax import config as c


def get_config():
    return c.RunConfig(
        name="kills",
        model=c.ModelConfig(
            vocab_size=257,
            num_layers=2,
            d_model=64,
            mlp_width=128,
            taper=c.TaperConfig(schedule="linear"),
            mixer=c.AttentionConfig(num_heads=2),
            remat="none",
        ),
        data=c.DataConfig(
            path=str(pathlib.Path(__file__).parent / "text"),
            tokenizer="bytes",
            seq_len=64,
            batch_size=8,
            readers=2,
        ),
        optimizer=c.OptimizerConfig(warmup_steps=5),
        training=c.TrainingConfig(
            num_steps=400,
            log_every=1,
            eval_every=0,
            eval_batches=2,
            checkpoint_every=2,
            sample_tokens=0,
        ),
    )
"""


class Job:
    """The processes of a job that trains in a folder.

    Args:
      folder: where config, text and caches lie.
      name: of the run folder in it.
      number: of processes, a device each.
      words: more options of the command.
    """

    def __init__(
        self, folder: pathlib.Path, name: str, number: int, words: Sequence[str] = ()
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        self.outputs = [folder / f"{name}-{index}.out" for index in range(number)]
        self.processes = []
        for index in range(number):
            variables = {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": "1",
                "PYTHONPATH": str(ROOT),
                "XDG_CACHE_HOME": str(folder / "cache"),
            }
            if number > 1:
                variables |= {
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": str(number),
                    "JAX_PROCESS_ID": str(index),
                }
            run = ["train", "--config", str(folder / "config.py"), "--workdir", str(folder / name)]
            with self.outputs[index].open("w") as output:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, str(DRIVER), *run, *words],
                        env=os.environ | variables,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait(self, seconds: float) -> list[int | None]:
        """Exit statuses; None for a process that is still running after so long, then killed."""
        give_up = time.monotonic() + seconds
        statuses: list[int | None] = []
        for process in self.processes:
            try:
                statuses.append(process.wait(max(0.1, give_up - time.monotonic())))
            except subprocess.TimeoutExpired:
                statuses.append(None)
        for process in self.processes:
            process.kill()
            process.wait()
        return statuses

    def said(self, index: int) -> str:
        """What a process has written."""
        return self.outputs[index].read_text(errors="replace")


def write_inputs(folder: pathlib.Path) -> None:
    """Config and text."""
    rng = random.Random(0)
    (folder / "text").mkdir()
    (folder / "config.py").write_text(CONFIG)
    for index in range(40):
        words = [f"word{rng.randrange(30)}" for _ in range(200)]
        (folder / "text" / f"{index:02d}.txt").write_text(" ".join(words))


def losses(run: pathlib.Path) -> dict[int, float]:
    """Training loss of each step that the log knows; the newest where steps were repeated."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {r["step"]: r["loss"] for r in records if r["kind"] == "train"}


def steps(run: pathlib.Path) -> list[int]:
    """Whole checkpoints."""
    folder = run / "checkpoints"
    return (
        sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []
    )


def kill_once(folder: pathlib.Path, name: str, number: int, rng: random.Random) -> str:
    """Starts the job, kills a process at a random moment after its first step; "" if that is well.

    Otherwise it says what is wrong.
    """
    run = folder / name
    known = max(steps(run), default=0)
    begun = max(losses(run), default=0)
    job = Job(folder, name, number)
    give_up = time.monotonic() + 180
    while max(losses(run), default=0) <= begun and len(losses(run)) == begun:
        if any(p.poll() is not None for p in job.processes) or time.monotonic() > give_up:
            job.wait(1)
            return f"the job did not start:\n{job.said(0)[-800:]}"
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 1.5))
    victim = rng.randrange(number)
    job.processes[victim].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    statuses = job.wait(BOUND)
    seconds = time.monotonic() - begin
    others = [s for index, s in enumerate(statuses) if index != victim]
    print(
        f"  process {victim} killed at step {max(losses(run))}; the rest ended with {others} after "
        f"{seconds:.1f} s; whole checkpoints {steps(run)}",
        flush=True,
    )
    for index in range(number):
        if index != victim:
            print(f"    {job.said(index).strip().splitlines()[-1][:200]}", flush=True)
    if None in others:
        return "a process went on, or hung"
    if 0 in others and max(losses(run)) < 400:
        return "a process says that the run is complete"
    if any("error" not in job.said(i).lower() for i in range(number) if i != victim):
        return f"a process ended without a message:\n{job.said(1 - victim)[-800:]}"
    if max(steps(run), default=0) < known:
        return "a checkpoint was lost"
    return ""


def _wait_for_step(run: pathlib.Path, step: int) -> None:
    give_up = time.monotonic() + 300
    while max(losses(run), default=0) < step and time.monotonic() < give_up:
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_inputs(folder)
        survived = 0
        for index in range(options.kills):
            fault = kill_once(folder, "job", options.processes, rng)
            survived += not fault
            print(f"kill {index + 1}/{options.kills}: {fault or 'survived'}", flush=True)
        last = max(losses(folder / "job"), default=0) + 2
        job = Job(folder, "job", options.processes)
        _wait_for_step(folder / "job", last)
        job.processes[0].terminate()  # as a preempted machine is told: all save and end
        statuses = job.wait(BOUND)
        alone = Job(folder, "alone", 1, ["--training.checkpoint_every", "0"])
        _wait_for_step(folder / "alone", last)
        alone.wait(0)
        found, expected = losses(folder / "job"), losses(folder / "alone")
        wrong = [
            step
            for step in range(1, last + 1)
            if not abs(found.get(step, math.nan) - expected.get(step, math.nan)) <= 1e-5
        ]
        print(
            f"told to stop, the job ended with {statuses}; whole checkpoints "
            f"{steps(folder / 'job')}"
        )
        print(
            f"steps whose loss differs from that of a run that nobody killed: {wrong or 'none'} "
            f"of {last}"
        )
        print(f"survived {survived}/{options.kills}")
    return int(survived < options.kills or bool(wrong) or set(statuses) != {75})


if __name__ == "__main__":
    sys.exit(main())

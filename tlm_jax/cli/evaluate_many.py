"""tlm eval --checkpoints: many run folders, each evaluated by a process of its own."""

import concurrent.futures
import dataclasses
import pathlib
import subprocess
import sys
from collections.abc import Sequence

from tlm_jax import cluster, output
from tlm_jax.cli.parsing import parse
from tlm_jax.config import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Evaluate several checkpoints; all other options are those of --checkpoint."""

    checkpoints: tuple[pathlib.Path, ...]
    """Run folders."""
    engine: str = cluster.LOCAL
    """local, one after the other; or a Ray cluster, at once: ray, or ray://HOST:PORT."""
    gpus_per_checkpoint: float = 0.0
    """GPUs that Ray sets aside for a checkpoint; 0.25 lets four share one."""


_OWN = ("--checkpoints", "--engine", "--gpus_per_checkpoint")


def run(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm eval` for each run folder; returns 1 if any of them failed."""
    own, others = _divided(argv)
    command = parse(Command, own, prog, checkpoints=())
    if not command.checkpoints:
        raise UserError(f"{prog} --checkpoints needs run folders")
    cluster.check(command.engine)
    executor: concurrent.futures.Executor
    if command.engine == cluster.LOCAL:
        executor = concurrent.futures.ThreadPoolExecutor(1)
    else:
        executor = cluster.RayExecutor(command.engine, gpus=command.gpus_per_checkpoint)
    console = output.console()
    failed = 0
    try:
        tasks = {
            executor.submit(_evaluate, folder, tuple(others)): folder
            for folder in dict.fromkeys(command.checkpoints)
        }
        for number, future in enumerate(concurrent.futures.as_completed(tasks), 1):
            status, out, complaint = future.result()
            failed += status != 0
            what = f"failed: {complaint}" if status else "evaluated"
            console.print(
                f"[{number}/{len(tasks)}] {tasks[future]}: {what}", style="red" if status else None
            )
            print(out, end="", flush=True)
    finally:
        executor.shutdown(cancel_futures=True)
    if failed:
        raise UserError(f"{failed} of {len(tasks)} checkpoints were not evaluated")
    return 0


def _divided(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of this command's own options, and the others."""
    own: list[str] = []
    others: list[str] = []
    target = others
    for word in argv:
        if word.startswith("--"):
            target = own if word.partition("=")[0] in _OWN else others
        target.append(word)
    return own, others


def _evaluate(folder: pathlib.Path, words: tuple[str, ...]) -> tuple[int, str, str]:
    """Exit status, output and the last line of complaint of `tlm eval`."""
    command = [sys.executable, "-m", "tlm_jax", "eval", "--checkpoint", str(folder), *words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    complaint = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return done.returncode, done.stdout, complaint.removeprefix("error: ")

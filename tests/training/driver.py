"""Runs a verb of `tlm` as the command line does, and does harm at a set moment.

Tests start it as a process of its own:

  driver.py --record batches.txt --at-batch 14 SIGKILL --when-exists RUN/checkpoints/10 \
      train --config CONFIG --workdir RUN
"""

import argparse
import hashlib
import os
import pathlib
import resource
import signal
import sys
import time
from typing import Any


def main() -> int:
    """Parses the harm, installs it, and runs the verb; returns its exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", type=pathlib.Path, help="a hash of each batch goes here")
    parser.add_argument(
        "--at-batch",
        nargs=2,
        metavar=("N", "HARM"),
        help="before this process trains on its N-th batch; HARM is a signal to itself, such as "
        "SIGINT (Ctrl-C: to its reader processes too), or a file that fills up the disk",
    )
    parser.add_argument("--pause-from-batch", type=int, help="the steps from here on are slow")
    parser.add_argument("--pause", type=float, default=0.5, help="how slow, in seconds")
    parser.add_argument("--when-exists", type=str, help="the harm waits for this")
    parser.add_argument(
        "--at-scored-batch",
        nargs=2,
        metavar=("N", "SIGNAL"),
        help="a signal to itself before it scores the N-th batch of validation",
    )
    parser.add_argument("--pause-from-scored-batch", type=int, help="the same of validation")
    parser.add_argument("--scored", type=pathlib.Path, help="a line for each scored batch")
    parser.add_argument("--file-limit", type=int, help="no file can grow beyond so many bytes")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()

    if options.at_batch and options.at_batch[1] == "SIGINT":
        os.setpgid(0, 0)
    if options.file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (options.file_limit, options.file_limit))

    from tlm_jax import cli
    from tlm_jax.evaluation import perplexity
    from tlm_jax.training import loop

    loop.to_devices = _before(loop.to_devices, options.at_batch, options)
    perplexity.to_devices = _before(
        perplexity.to_devices,
        options.at_scored_batch,
        argparse.Namespace(
            record=options.scored,
            when_exists=None,
            pause_from_batch=options.pause_from_scored_batch,
            pause=options.pause,
        ),
    )
    return cli.main(options.command)


def _before(real: Any, harm: list[str] | None, options: argparse.Namespace) -> Any:
    """`real`, with a record of each call and harm before one of them."""
    count = 0

    def to_devices(batch: Any, mesh: Any) -> Any:
        nonlocal count
        count += 1
        if harm and count == int(harm[0]):
            _wait_for(options.when_exists)
            _do(harm[1])
        if options.pause_from_batch and count >= options.pause_from_batch:
            time.sleep(options.pause)
        if options.record:
            with options.record.open("a") as file:
                file.write(_digest(batch) + "\n")
        return real(batch, mesh)

    return to_devices


def _digest(batch: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(batch):
        digest.update(f"{name} {batch[name].dtype} {batch[name].shape}".encode())
        digest.update(batch[name].tobytes())
    return digest.hexdigest()


def _wait_for(name: str | None) -> None:
    from tlm_jax import storage

    give_up = time.monotonic() + 60
    path = None if name is None else storage.path(name)
    while path is not None and not path.exists():
        if time.monotonic() > give_up:
            raise TimeoutError(f"{path} did not appear")
        time.sleep(0.01)


def _do(harm: str) -> None:
    if harm == "SIGINT":
        os.killpg(os.getpgid(0), signal.SIGINT)
        return
    if harm.startswith("SIG"):
        for _ in range(2):  # a stop may arrive as several signals
            os.kill(os.getpid(), signal.Signals[harm])
        return
    with open(harm, "wb", buffering=0) as file:
        for size in (65536, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


if __name__ == "__main__":
    sys.exit(main())

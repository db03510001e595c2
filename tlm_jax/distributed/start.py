"""What must happen before anything asks for devices: compiled programs cached, processes joined.

A job has a process on each host of a TPU slice, or on each GPU or node.
"""

import dataclasses
import os
import pathlib
import re
import socket
import sys
import time
import warnings
from typing import Literal

from tlm_jax.config import UserError
from tlm_jax.validation import Checked, Count, NaturalNumber, require

_SHUTDOWN_SECONDS = 60
HEARTBEAT_SECONDS = 60
"""Silence after which a process counts as dead and the others end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessesConfig(Checked):
    """The processes of a job; usually read from the environment."""

    join: Literal["auto", "always", "never"] = "auto"
    """auto joins others if Slurm, Open MPI, GKE or JAX_COORDINATOR_ADDRESS says there are any."""
    coordinator: str | None = None
    """HOST:PORT of process 0; None reads it from the environment."""
    count: Count | None = None
    """Number of processes; None reads it from the environment."""
    index: NaturalNumber | None = None
    """Index of this process, from 0; None reads it from the environment."""
    timeout: Count = 300
    """Seconds that the processes wait for each other at the start."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coordinator is not None:
            require(
                re.fullmatch(r"\S+:\d+", self.coordinator) is not None,
                f"processes.coordinator={self.coordinator} is not HOST:PORT",
            )
        require(
            (self.count is None) == (self.index is None),
            f"processes.count={self.count} and processes.index={self.index} go together",
        )
        if self.count is not None and self.index is not None:
            require(
                0 <= self.index < self.count,
                f"processes.index={self.index} must be from 0 to {self.count - 1}, as "
                f"processes.count is {self.count}",
            )


def expected(config: ProcessesConfig, environment: dict[str, str]) -> bool:
    """Whether there are other processes to join.

    Raises:
      UserError: a variable that counts them is not a number.
    """
    if config.join != "auto":
        return config.join == "always"
    if config.count is not None:
        return config.count > 1
    if config.coordinator or "JAX_COORDINATOR_ADDRESS" in environment:
        return True
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES")
    if any(_number(environment, name, 1) > 1 for name in counts):
        return True
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    return "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in environment


def _number(environment: dict[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(
            f"the environment variable {name}={text[:40]!r} is not a number of processes; unset "
            "it, or use --processes.join never for a single process"
        )
    return int(text)


def keep_programs() -> None:
    """Keeps compiled programs in the user's cache folder, for the next start of the same program.

    JAX_COMPILATION_CACHE_DIR names another folder (on a pod, one that all hosts share), and
    JAX_ENABLE_COMPILATION_CACHE=0 turns it off.
    """
    # A cache that cannot be written costs time, and is no business of the user's.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(folder / "tlm_jax" / "compiled"))


def join(config: ProcessesConfig) -> None:
    """Joins the other processes, if there are any, before anything asks for devices.

    Raises:
      UserError: the environment does not say all that is needed, or not all came in time.
    """
    environment = dict(os.environ)
    if not expected(config, environment):
        return
    import jax

    count, index = config.count, config.index
    if count is None and "JAX_NUM_PROCESSES" in environment:
        count = _number(environment, "JAX_NUM_PROCESSES", 1)
        index = _number(environment, "JAX_PROCESS_ID", 0)
    if environment.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    coordinator = config.coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    if coordinator is not None and index:
        _wait_for(coordinator, config.timeout)
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            initialization_timeout=config.timeout,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        raise UserError(
            f"cannot join the processes of this job: {str(error).rstrip('.')}; give "
            "--processes.coordinator HOST:PORT --processes.count N --processes.index I, or "
            "--processes.join never for a single process"
        ) from error
    except RuntimeError as error:
        raise UserError(
            f"the processes of this job failed to connect within {config.timeout} s: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error


def _wait_for(address: str, seconds: float) -> None:
    """Waits until something answers at HOST:PORT: JAX itself would abort without a clear message.

    Raises:
      UserError: nothing does.
    """
    host, _, port = address.rpartition(":")
    give_up = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            if time.monotonic() > give_up:
                reason = error.strerror or error
                raise UserError(
                    f"no coordinator answers at {address} within {seconds} s ({reason}); is "
                    "process 0 running, and its port reachable from here?"
                ) from None
            time.sleep(0.5)
        else:
            return


def leave(status: int) -> None:
    """Ends a process of a job that failed; the ordinary way out would wait for the others."""
    if status == 0 or "jax" not in sys.modules:
        return
    import jax

    if jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

"""The process of one or several cells of a sweep: how it is started, stopped and waited for."""

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import functools
import io
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any

from rich.console import Console

from tlm_jax import cluster, config_io, files, storage
from tlm_jax.config import RUN_AGAIN, RunConfig, UserError

CELL, LOG = "cell.json", "log.txt"
_LOCK = ".lock"  # of a run folder, see `training.faults`
_PATIENCE = 120.0
"""Seconds that the process of an earlier call may take to save and end."""
_WAIT = 1.0
"""Seconds between looks at whether a task was cancelled."""
Ended = tuple[int | None, float]
"""Exit status of the process, None if it was interrupted; and seconds."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # not to be loaded after a fork


class Stop:
    """Records a signal to stop, and forwards it to the processes and tasks of cells."""

    def __init__(self) -> None:
        self.told = False
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.executor: cluster.RayExecutor | None = None

    def __call__(self, *_: Any) -> None:
        self.told = True
        for process in list(self.processes):
            process.terminate()
        if self.executor is not None:
            self.executor.cancel()

    @contextlib.contextmanager
    def on_error(self) -> Iterator[None]:
        """An error in this context (a full disk, say) stops the cells that are running."""
        try:
            yield
        except BaseException:
            self()
            raise


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """In this context, SIGINT and SIGTERM are recorded and forwarded."""
    stop = Stop()
    handlers = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """What the process of a cell may use."""

    cores: tuple[int, ...] = ()
    """Processor cores; empty means all."""
    shares_device: bool = False
    """Other cells use the accelerator at the same time."""


def places(number: int) -> queue.SimpleQueue[Place]:
    """This many slots, which divide this process's cores among them."""
    found: queue.SimpleQueue[Place] = queue.SimpleQueue()
    here = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for index in range(number):
        mine = here[index::number] or here[index % max(1, len(here)) :][:1]
        found.put(Place(cores=tuple(mine) if number > 1 else (), shares_device=number > 1))
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a process needs to train cells, of types that every node of a cluster knows."""

    folders: tuple[pathlib.Path, ...]
    """Of the cells; several are seeds of one arm, to be trained in one program."""
    configs: tuple[str, ...]
    """Of the runs, as JSON."""
    trust: tuple[str, ...]
    """Words that allow the modules which define the runs' mixers."""

    @classmethod
    def of(cls, cells: Mapping[pathlib.Path, RunConfig]) -> "Task":
        """The task that trains runs, each in its folder."""
        texts = [json.dumps(config_io.to_dict(c), indent=1) + "\n" for c in cells.values()]
        trust = config_io.trust_options(next(iter(cells.values())))
        return cls(folders=tuple(cells), configs=tuple(texts), trust=tuple(trust))


def train(task: Task, console: Console, stop: Stop, place: Place) -> int | None:
    """Trains a cell in its folder, or several in one program, from the last checkpoint.

    Returns:
      The exit status of the process; None if it was interrupted, perhaps before it had started
      or could save.
    """
    for folder in task.folders:
        if not stop.told:
            folder.mkdir(parents=True, exist_ok=True)
            _wait_until_free(folder, console, stop)
    if stop.told:
        return None
    status = _run(task, stop, place)
    interrupted = stop.told or status == RUN_AGAIN or {-status, status - 128} & set(_SIGNALS)
    return None if status and interrupted else status


class Here:
    """Trains cells on this machine, several tasks at a time."""

    def __init__(self, parallel: int, console: Console, stop: Stop) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(parallel)
        self._places = places(parallel)
        self._console, self._stop = console, stop

    def start(self, cells: Mapping[pathlib.Path, RunConfig]) -> concurrent.futures.Future[Ended]:
        """Trains a cell, or several in one program, as soon as there is room."""
        return self._pool.submit(self._train, Task.of(cells))

    def _train(self, task: Task) -> Ended:
        begin, place = time.monotonic(), self._places.get()
        try:
            status = train(task, self._console, self._stop, place)
        finally:
            self._places.put(place)
        return status, time.monotonic() - begin

    def __enter__(self) -> None:
        self._pool.__enter__()

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


class Nodes:
    """Trains cells on the nodes of a Ray cluster, each a task."""

    def __init__(self, executor: cluster.RayExecutor, gpus: float, stop: Stop) -> None:
        self._executor, self._gpus = executor, gpus
        stop.executor = executor

    def start(self, cells: Mapping[pathlib.Path, RunConfig]) -> concurrent.futures.Future[Ended]:
        """Trains a cell as soon as a node has room for it."""
        task = Task.of({folder.resolve(): config for folder, config in cells.items()})
        return self._executor.submit(train_on_node, task, 0 < self._gpus < 1)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()


def train_on_node(task: Task, shares_device: bool) -> Ended:
    """On a node: trains a cell; when it is cancelled, the run saves and ends first."""
    begin, stop = time.monotonic(), Stop()
    place = Place(shares_device=shares_device)
    with stop.on_error():
        status = train(task, Console(file=io.StringIO()), stop, place)
    return status, time.monotonic() - begin


def _run(task: Task, stop: Stop, place: Place) -> int:
    first = task.folders[0]
    for folder, config in zip(task.folders, task.configs, strict=True):
        files.write_text(folder / CELL, config)
    for folder in task.folders[1:]:
        files.write_text(folder / LOG, f"Trained with {first.name}; see ../{first.name}/{LOG}\n")
    words = ["train", "--config", str(first / CELL), "--workdir", str(first)]
    if len(task.folders) > 1:
        words = ["train-seeds", *map(str, task.folders)]
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if place.shares_device else {}
    with _appended(first / LOG) as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tlm_jax", *words, *task.trust],
            env=shared | os.environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes through us, once
            preexec_fn=functools.partial(_settle, os.getpid(), place.cores),
        )
        stop.processes.add(process)
        if stop.told:  # the signal came while the process was being started
            process.terminate()
        try:
            while True:  # in short waits: a task that Ray cancels is told between them
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(_WAIT)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            stop.processes.discard(process)


@contextlib.contextmanager
def _appended(path: pathlib.Path) -> Iterator[IO[Any]]:
    """A file to append to; one in a bucket grows at the end."""
    if not storage.in_bucket(path):
        with path.open("a") as file:
            yield file
        return
    with tempfile.TemporaryFile() as file:
        try:
            yield file
        finally:
            file.seek(0)
            old = path.read_bytes() if path.is_file() else b""
            path.write_bytes(old + file.read())


def _wait_until_free(folder: pathlib.Path, console: Console, stop: Stop) -> None:
    """Waits while the process of an earlier call, which was killed, saves its cell and ends.

    If it takes too long, `tlm train` itself says who is using the folder.
    """
    give_up = time.monotonic() + _PATIENCE
    waiting = False
    while not stop.told and time.monotonic() < give_up:
        try:
            with files.locked(folder / _LOCK, "{who}"):
                return
        except UserError as who:
            if not waiting:
                console.print(f"Waiting for {who}, which is still using {folder}.")
            waiting = True
        time.sleep(0.2)


def _settle(parent: int, cores: tuple[int, ...]) -> None:
    """In the new process, on Linux: pins it to its cores, and sends it SIGTERM, so that it saves,
    when the thread that started it ends."""
    if cores:
        os.sched_setaffinity(0, cores)
    if _LIBC is not None:
        set_parent_death_signal = 1
        _LIBC.prctl(set_parent_death_signal, signal.SIGTERM)
        if os.getppid() != parent:  # it was killed before we asked
            os._exit(RUN_AGAIN)


def complaint(log: pathlib.Path, status: int, cell: str) -> str:
    """The last line that mentions an error (of this cell, if one names it), or the last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line]
    errors = [line for line in lines if "error" in line.lower()]
    errors = [line for line in errors if f" {cell}: " in line] or errors
    return f"status {status}: {(errors or lines or ['no output'])[-1].strip()[:300]}"

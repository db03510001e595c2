"""Processes that take turns of two steps, so that all of them see the same machine.

A worker is a command that warms up, prints one line of JSON (whatever it wants to say of its
start), then answers each line on standard input with the seconds of one step, and at the end of
its input prints a last line of JSON. Each runs in a process of its own: in one process, what one
program's allocator keeps would be measured with the other.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from typing import IO, Any

_PAUSE = 0.3
"""Seconds before each turn: threads of the one before look out for work for a while (OpenMP's for
0.2), on cores that the next one would miss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entrant:
    """One that takes part."""

    command: Sequence[str]
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Variables besides those of this process."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finish:
    """What a worker did."""

    seconds: list[float]
    """One a turn."""
    said: dict[str, Any]
    """Its two lines of JSON, together."""

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def middle_half(self) -> str:
        """Quartiles in milliseconds: "12.1 to 13.0"."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return f"{low * 1e3:.1f} to {high * 1e3:.1f}"


def run(entrants: Mapping[str, Entrant], turns: int) -> dict[str, Finish]:
    """Lets workers take turns; who breaks is left out, with a line on standard error.

    Args:
      entrants: by name.
      turns: of each that count; two more come first.
    """
    workers = {name: _start(one) for name, one in entrants.items()}
    said: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {name: [] for name in workers}
    for name, worker in workers.items():
        with _left_out(name, said):
            said[name] = json.loads(_line(worker.stdout))
    group = list(said)
    for turn in range(turns + 2):
        for name in group if turn % 2 else group[::-1]:
            if name in said:
                with _left_out(name, said):
                    seconds = _turn(workers[name])
                    if turn >= 2:
                        times[name].append(seconds)
    for name in group:
        last, _ = workers[name].communicate()
        with _left_out(name, said):
            said[name] |= json.loads(last)
    return {name: Finish(seconds=times[name], said=words) for name, words in said.items()}


def one_by_one(
    entrants: Mapping[str, Entrant], turns: int, *, ready: Collection[str], queued: int = 1
) -> Generator[tuple[str, Finish | None], None, None]:
    """Starts workers at the same time and yields each one's steps, taken while the rest wait.

    For an accelerator, whose steps need few cores but whose memory holds one model only. None is
    one that broke.

    Args:
      entrants: by name, in the order in which they are timed.
      turns: of each that count; two more come first.
      queued: steps of a turn, which wait for each other on the device only, as in training.
      ready: those that must have compiled before the first is timed.
    """
    workers = {name: _start(one) for name, one in entrants.items()}
    said: dict[str, dict[str, Any]] = {}

    def wait(name: str) -> None:
        with _left_out(name, said):
            said[name] = json.loads(_line(workers[name].stdout))

    try:
        for name in ready:
            wait(name)
        for name, worker in workers.items():
            if name not in ready:
                wait(name)
            seconds = []
            with _left_out(name, said):
                assert worker.stdin is not None
                for _ in range(turns + 2):
                    worker.stdin.write(f"{queued}\n")
                    worker.stdin.flush()
                    seconds.append(float(_line(worker.stdout)))
                last, _ = worker.communicate()
                said[name] |= json.loads(last)
            yield name, Finish(seconds=seconds[2:], said=said[name]) if name in said else None
    finally:
        for worker in workers.values():
            worker.kill()


def _start(entrant: Entrant) -> subprocess.Popen[str]:
    return subprocess.Popen(
        list(entrant.command),
        env=os.environ | dict(entrant.env),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ratio(ours: Finish, theirs: Finish) -> float:
    """Median over pairs of steps."""
    return statistics.median(a / b for a, b in zip(ours.seconds, theirs.seconds, strict=True))


def _turn(worker: subprocess.Popen[str]) -> float:
    """Seconds of the second of two steps: before the first the process was idle, and its memory
    may have gone to others."""
    assert worker.stdin is not None
    time.sleep(_PAUSE)
    worker.stdin.write("step\nstep\n")
    worker.stdin.flush()
    return [float(_line(worker.stdout)) for _ in range(2)][1]


def _line(stream: IO[str] | None) -> str:
    assert stream is not None
    line = stream.readline()
    if not line:
        raise EOFError
    return line


@contextlib.contextmanager
def _left_out(name: str, said: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, KeyError, ValueError) as error:
        said.pop(name, None)
        print(f"{name} broke: {type(error).__name__} {error}", file=sys.stderr)


def answer(
    step: Callable[[], None],
    *,
    start: Mapping[str, Any],
    end: Callable[[], Any],
    wait: Callable[[], Any] = lambda: None,
) -> None:
    """A worker's part: a step, already warm, for each line of standard input.

    Args:
      step: does one, or starts it.
      start: said before the first.
      end: what is said after the last.
      wait: returns when the steps that were started are done. A line that is a number starts so
        many before it waits, and is answered with the seconds of each.
    """
    print(json.dumps(dict(start)), flush=True)
    for line in sys.stdin:
        number = int(line) if line.strip().isdigit() else 1
        begin = time.perf_counter()
        for _ in range(number):
            step()
        wait()
        print((time.perf_counter() - begin) / number, flush=True)
    print(json.dumps(end()), flush=True)


def resident_mib(name: str = "VmHWM") -> float:
    """MiB that this process has in memory now (VmRSS), or has had at most (VmHWM).

    Linux's own count: getrusage's begins with the peak of the process that started this one.
    """
    found = re.search(rf"{name}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    assert found, "needs Linux"
    return int(found[1]) / 1024


def unlocked_mkl(folder: pathlib.Path) -> dict[str, str]:
    """What gives torch MKL's best kernels on other makers' processors: a library to preload.

    It is made in `folder`, with a C compiler.
    """
    source, library = folder / "mkl.c", folder / "mkl.so"
    source.write_text("int mkl_serv_intel_cpu_true(void) { return 1; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return {"LD_PRELOAD": str(library)}

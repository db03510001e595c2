"""What tests of whole runs share: real processes, and folders compared by content."""

import hashlib
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

ROOT = pathlib.Path(__file__).parents[1]
DRIVER = ROOT / "tests" / "training" / "driver.py"
NUM_STEPS = 20
"""Of the run that `config_file` describes; it saves at half of them and at the end."""
CACHE = {
    "JAX_COMPILATION_CACHE_DIR": "",  # set for each session
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    # Else the folder is a part of a program's name, and every session has its own.
    "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
}
"""Variables by which every compiled program is kept, however small, and found by later sessions."""
Fails = Callable[..., str]
"""Runs `tlm` with these words, which are wrong, and returns its only line of complaint."""


def command(script: pathlib.Path | str, *words: object) -> list[str]:
    """The command line of a Python script of the repository."""
    return [sys.executable, str(ROOT / script), *map(str, words)]


def environment(devices: int = 1, *, cache: bool = True) -> dict[str, str]:
    """Variables of a process with so many simulated devices that can import the package.

    With `cache`, what a process of this test session compiled is not compiled again.
    """
    variables = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    if not cache:
        for name in CACHE:
            del variables[name]
    return variables


def run(
    script: pathlib.Path | str,
    *words: object,
    devices: int = 1,
    cache: bool = True,
    variables: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a script of the repository to its end; one that hangs is ended and fails the test."""
    return subprocess.run(
        command(script, *words),
        cwd=ROOT,
        env=environment(devices, cache=cache) | dict(variables or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def steps(folder: pathlib.Path) -> list[int]:
    """Steps of the whole checkpoints of a run folder."""
    return sorted(int(name) for name in _checkpoints(folder) if name.isdigit())


def unfinished(folder: pathlib.Path) -> list[int]:
    """Steps of the checkpoints of a run folder that are being written, or were."""
    suffix = ".orbax-checkpoint-tmp"
    return [int(n.removesuffix(suffix)) for n in _checkpoints(folder) if n.endswith(suffix)]


def _checkpoints(folder: pathlib.Path) -> list[str]:
    checkpoints = folder / "checkpoints"
    return [p.name for p in checkpoints.iterdir()] if checkpoints.is_dir() else []


def contents(folder: pathlib.Path, *, but: Sequence[str] = ()) -> dict[str, str]:
    """A hash of every file below a folder, except in the top-level entries `but`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in but
    }


def only_error(stderr: str) -> str:
    """The one line that tells a user what went wrong; progress may precede it."""
    lines = [line for line in stderr.splitlines() if not line.startswith(("prepar", "note: "))]
    assert len(lines) == 1, f"one line was expected:\n{stderr}"
    assert lines[0].startswith("error: "), stderr
    return lines[0].removeprefix("error: ")

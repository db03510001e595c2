"""Compiled programs, kept from one test session to the next in the user's cache folder.

JAX finds a program by a hash of its code, of the compiler's version and of the options, so
whatever changes a program has it compiled anew. A session works on links of its own: JAX does not
write its files atomically, and many tests kill processes.
"""

import hashlib
import os
import pathlib
import platform
import shutil

import zstandard

MOST_BYTES = 2**30
"""Kept at most; of more, the oldest programs go."""


def store() -> pathlib.Path:
    """Where those for this kind of CPU are kept; delete it to compile everything again."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    try:
        known = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        known = []
    flags = next((line for line in known if line.startswith(("flags", "Features"))), "")
    kind = hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:8]
    return pathlib.Path(cache) / "tlm_jax" / "tests" / kind


def take(kept: pathlib.Path, session: pathlib.Path) -> None:
    """Makes the folder of a session, with all programs that are kept."""
    session.mkdir()
    for path in kept.glob("*-cache") if kept.is_dir() else ():
        try:
            _link(path, session / path.name)
        except FileNotFoundError:  # another session has just removed it
            continue


def keep(session: pathlib.Path, kept: pathlib.Path, most: int = MOST_BYTES) -> None:
    """Keeps the whole programs of a session that are new; torn files are left out."""
    if not session.is_dir():  # no test ran
        return
    kept.mkdir(parents=True, exist_ok=True)
    for path in session.glob("*-cache"):
        if not (kept / path.name).exists() and _is_whole(path):
            _link(path, kept / path.name)
    ages = sorted((p.stat().st_mtime, p.stat().st_size, p) for p in kept.glob("*-cache"))
    total = sum(size for _, size, _ in ages)
    for _, size, path in ages:
        if total <= most:
            break
        path.unlink(missing_ok=True)
        total -= size


def _is_whole(path: pathlib.Path) -> bool:
    try:
        zstandard.ZstdDecompressor().decompress(path.read_bytes())
    except zstandard.ZstdError:
        return False
    return True


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
    """A hard link, or between file systems a copy; atomic."""
    beside = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        os.link(source, beside)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, beside)
    beside.rename(target)

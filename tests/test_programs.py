"""Compiled programs that test sessions hand on."""

import os
import pathlib
import subprocess
import sys

import programs
import zstandard
from helpers import environment

WHOLE = zstandard.ZstdCompressor().compress(bytes(1000))


def test_whole_programs_are_handed_on_and_torn_ones_are_not(tmp_path: pathlib.Path) -> None:
    """A test that kills a process can leave half a file, which JAX would warn of for ever."""
    first, kept, second = (tmp_path / name for name in ("first", "kept", "second"))
    programs.take(kept, first)
    (first / "a-cache").write_bytes(WHOLE)
    (first / "b-cache").write_bytes(WHOLE[:-3])
    (first / "c-cache").write_bytes(b"")
    programs.keep(first, kept)
    programs.take(kept, second)
    assert [path.name for path in second.iterdir()] == ["a-cache"]
    assert (second / "a-cache").read_bytes() == WHOLE


def test_the_oldest_programs_go_when_there_are_too_many(tmp_path: pathlib.Path) -> None:
    session, kept = tmp_path / "session", tmp_path / "kept"
    programs.take(kept, session)
    for age, name in enumerate(("old-cache", "middle-cache", "new-cache")):
        (session / name).write_bytes(WHOLE)
        os.utime(session / name, (age, age))
    programs.keep(session, kept, most=2 * len(WHOLE))
    assert {path.name for path in kept.iterdir()} == {"middle-cache", "new-cache"}


def test_a_later_session_finds_a_program(tmp_path: pathlib.Path) -> None:
    """Its name does not depend on the folder that it is kept in, which is another each time."""
    names = []
    for session in ("first", "second"):
        variables = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / session)}
        compiled = subprocess.run(
            [sys.executable, "-c", "import jax; jax.jit(lambda x: x + 1)(1.0)"],
            env=environment() | variables,
            check=False,
            capture_output=True,
            text=True,
        )
        assert compiled.returncode == 0, compiled.stderr
        names.append({path.name for path in (tmp_path / session).glob("*-cache")})
    assert names[0] == names[1] != set()

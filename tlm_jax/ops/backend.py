"""Which hardware a program is traced for, and the one rule by which ops choose their version.

Every op is a plain reference and, where it pays, faster versions for some hardware. A version
says where it can run; the first that can is taken. `choose` answers for hardware that is absent
too, as `tlm compile` asks it.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

_REFERENCES: contextvars.ContextVar[bool] = contextvars.ContextVar("references", default=False)
_TARGET: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)

REFERENCE = "reference"


def target() -> str:
    """cpu, gpu or tpu: what the program being traced will run on."""
    found = _TARGET.get() or jax.default_backend()
    return "gpu" if found in ("cuda", "rocm") else found


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """Makes ops choose for another platform than the default backend, inside the block."""
    token = _TARGET.set(platform)
    try:
        yield
    finally:
        _TARGET.reset(token)


@contextlib.contextmanager
def references() -> Iterator[None]:
    """Makes every op set to `auto` use its plain reference, inside the block."""
    token = _REFERENCES.set(True)
    try:
        yield
    finally:
        _REFERENCES.reset(token)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Version:
    """One way to compute an op."""

    name: str
    function: Callable[..., Any]
    runs: Callable[..., bool]
    """Called with the op's static facts by keyword (`target`, `dtype`, `shards`, ...)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op:
    """An op with its versions, the fastest first; the last is the reference and runs anywhere."""

    name: str
    versions: tuple[Version, ...]

    def choose(self, wanted: str = "auto", **facts: Any) -> Version:
        """The version asked for, or for `auto` the first that runs with these facts.

        Raises:
          ValueError: there is no version of that name.
        """
        if wanted == "auto" and _REFERENCES.get():
            return self.versions[-1]
        for version in self.versions:
            if wanted == version.name or (wanted == "auto" and version.runs(**facts)):
                return version
        known = ", ".join(version.name for version in self.versions)
        raise ValueError(f"unknown {self.name} kernel {wanted!r}; known: {known}")


def everywhere(**_: Any) -> bool:
    """A version that needs nothing."""
    return True

"""Errors for users, checks of configs, and helpers for messages that say what would work.

A config derives from `Checked`, and its annotations say what each field may hold: its type, and
with `Annotated[float, Range(above=0)]` its range.
"""

import dataclasses
import errno
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

LARGEST = 2**31 - 1
"""Largest whole number of a field that names no other: that of int32."""
_LARGEST_FLOAT32 = 3.4e38
_SCARCE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class UserError(Exception):
    """A mistake the user can fix; shown as one line, without a stack trace."""


def causes(error: BaseException) -> list[BaseException]:
    """An error and what caused it, first cause last.

    The chain can be a ring, because several threads raise the same error again.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return chain


def system_errors(error: BaseException) -> set[int]:
    """The `errno` of what the operating system refused, among the causes of an error."""
    numbers = set()
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno is not None:
            numbers.add(cause.errno)
        elif found := re.search(r"os_error_code='(\d+)'", str(cause)):  # TensorStore's
            numbers.add(int(found[1]))
    return numbers


def lacks_resources(error: BaseException) -> bool:
    """Whether memory, descriptors or threads ran out: at the next try there may be enough."""
    return not _SCARCE.isdisjoint(system_errors(error)) or any(
        isinstance(cause, MemoryError) or "can't start new thread" in str(cause)
        for cause in causes(error)
    )


def require(condition: bool, message: str) -> None:
    """Raises `ValueError(message)` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers that a field may hold, as a part of its annotation; None is no bound."""

    least: float | None = None
    above: float | None = None
    """Like `least`, but it is itself refused."""
    most: float | None = None
    below: float | None = None
    """Like `most`, but it is itself refused."""

    def complaint(self, value: float) -> str | None:
        """What a number outside of the range must do; None of one inside."""
        if self.least is not None and value < self.least:
            return "not be negative" if self.least == 0 else f"be at least {self.least}"
        if self.above is not None and value <= self.above:
            return "be positive" if self.above == 0 else f"be above {self.above}"
        if self.most is not None and value > self.most:
            return f"be at most {self.most}"
        if self.below is not None and value >= self.below:
            return f"be below {self.below}"
        return None


Count = Annotated[int, Range(least=1)]
NaturalNumber = Annotated[int, Range(least=0)]
Seed = Annotated[int, Range(least=0, most=2**32 - 1)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(least=0)]
Fraction = Annotated[float, Range(least=0, most=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """Base of configs: making one checks every field against its annotation.

    Numbers must be finite (in float32), and whole numbers at most `LARGEST` unless a `Range` says
    more. What is neither a class, None, a union, a `Literal` nor a tuple is not checked.

    Raises:
      ValueError: a field holds a value of another type or outside of its range.
    """

    def __post_init__(self) -> None:
        cls: Any = type(self)
        for name, hint in _hints(cls).items():
            _check(name, getattr(self, name), hint)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _check(name: str, value: Any, hint: Any) -> None:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        _check_union(name, value, inner)
    elif origin is tuple and isinstance(value, tuple):
        if inner[-1] is Ellipsis:
            inner = inner[:1] * len(value)
        if len(value) != len(inner):
            raise ValueError(f"{name} is {_shown(value)}; it must have {len(inner)} entries")
        for index, (entry, each) in enumerate(zip(value, inner, strict=True)):
            _check(f"{name}[{index}]", entry, each)
    elif (text := _complaint(value, hint)) is not None:
        raise ValueError(f"{name} is {_shown(value)}; it must {text}")


def _check_union(name: str, value: Any, alternatives: tuple[Any, ...]) -> None:
    problem = None
    for alternative in alternatives:
        if alternative is type(None):
            continue
        try:
            _check(name, value, alternative)
        except ValueError as error:
            problem = str(error)
        else:
            return
    if type(None) not in alternatives:
        raise ValueError(problem)
    if value is not None:
        raise ValueError(f"{problem}, or None")


def _complaint(value: Any, hint: Any) -> str | None:
    """What a value must be that is not of the type, or not in its range; None if it is."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        ranges = [note for note in inner[1:] if isinstance(note, Range)]
        largest = any(note.most is not None for note in ranges)
        found = (note.complaint(value) for note in ranges)
        return _type_complaint(value, inner[0], not largest) or next(filter(None, found), None)
    if origin is Literal:
        fits = any(type(value) is type(one) and value == one for one in inner)
        return None if fits else f"be one of {', '.join(map(repr, inner))}"
    return _type_complaint(value, origin or hint, True)


def _type_complaint(value: Any, cls: Any, limited: bool) -> str | None:
    if cls is int:
        if type(value) is not int:
            return "be a whole number"
        return f"be at most {LARGEST}" if limited and abs(value) > LARGEST else None
    if cls is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "be a number"
        return None if abs(value) < _LARGEST_FLOAT32 else "be a finite number"
    try:
        if not isinstance(cls, type) or isinstance(value, cls):
            return None
    except TypeError:  # Any, or a protocol that cannot be asked
        return None
    words = {bool: "True or False", str: "a string"}
    return f"be {words.get(cls, f'a {cls.__name__}')}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def some(lines: Sequence[str], most: int = 4) -> str:
    """The first of some lines as one, and how many more there are."""
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "; ".join([*lines[:most], *more])


def largest(fits: Callable[[int], bool]) -> int:
    """The largest whole number that fits, as all below it do; 0 if 1 does not.

    Doubles from 1 until a number does not fit, then bisects.
    """
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def divisors(n: int) -> str:
    """The divisors of n, ascending, for a message: the middle of a long list is left out."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    found = [*map(str, small), *(str(n // d) for d in reversed(small) if d * d != n)]
    if len(found) > 16:
        found[12:-3] = ["..."]
    return f"[{', '.join(found)}]"

"""Errors for users, and small helpers for messages that say what would work."""

import errno
import re

_SCARCE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class UserError(Exception):
    """A mistake the user can mend; shown as one line, without a stack trace."""


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


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]

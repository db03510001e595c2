"""What is wrong with a checkpoint that cannot be loaded: damage, or the machine."""

import errno
import json
import os
import re
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from tlm_jax import storage
from tlm_jax.config import UserError
from tlm_jax.validation import causes, lacks_resources, system_errors

_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
# TensorStore's words for what has nothing to do with the content of files.
_PASSING = re.compile("^(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED|PERM)")
_NOT_OF_THE_FILE = (jax.errors.JaxRuntimeError, ImportError, NotImplementedError)

_T = TypeVar("_T")


class DamagedCheckpointError(UserError):
    """A checkpoint that cannot be read although nothing else is wrong."""


class _ElsewhereError(Exception):
    """An error that another process of the job met."""

    def __init__(self, process: int, *, damage: bool) -> None:
        super().__init__(f"process {process} cannot read it, and says why")
        self.damage = damage


def is_damage(error: BaseException) -> bool:
    """Whether files are missing or their content is wrong.

    It is not if the system refused to read them, or memory, descriptors, the network or a
    device failed.
    """
    chain = causes(error)
    if isinstance(error, _ElsewhereError):
        return error.damage
    return not (
        system_errors(error) - _MISSING
        or lacks_resources(error)
        or any(isinstance(e, _NOT_OF_THE_FILE) or _PASSING.match(str(e)) for e in chain)
        or any(storage.refused(e) for e in chain)
    )


def together(work: Callable[[], _T]) -> _T:
    """What `work` returns if it succeeds in every process of the job; else all raise.

    All call it damage only if no process has another error.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    if jax.process_count() > 1:
        # 0 well, 1 damage, 2 another error; and the system's number for it
        number = max(system_errors(error), default=0) if error else 0
        mine = 0 if error is None else 1 if is_damage(error) else 2
        verdicts = np.atleast_2d(multihost_utils.process_allgather(np.array([mine, number])))
        worst = int(verdicts[:, 0].argmax())
        if verdicts[worst, 0] > mine:
            cause = OSError(number, os.strerror(number)) if (number := verdicts[worst, 1]) else None
            raise _ElsewhereError(worst, damage=verdicts[worst, 0] == 1) from cause
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def reason(error: BaseException) -> str:
    """What went wrong, without the internals of Orbax and TensorStore."""
    chain = causes(error)
    for link in chain:
        if isinstance(link, _ElsewhereError):
            return str(link)
        if text := storage.refused(link):
            return text
        if number := re.search(r"os_error_code='(\d+)'", str(link)):
            return os.strerror(int(number[1]))
    cause = chain[-1]
    text = " ".join(str(cause).split())
    if isinstance(cause, OSError) and cause.strerror:
        return f"{cause.strerror}: {cause.filename}" if cause.filename else cause.strerror
    if isinstance(cause, json.JSONDecodeError):
        return f"a file of it is not valid JSON ({text})"
    return text[:300] or type(cause).__name__

"""Answers on disk, so that an evaluation that was killed goes on where it was."""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any


class Journal:
    """A file of JSON lines {key: answer}; keys are hashed.

    A line that was cut off by a kill is left out. Two evaluations of the same model may
    share a file.

    Args:
      path: the file; None keeps answers in memory only.
      about: what the answers depend on besides the requests (the checkpoint, limits); a file
        that is about something else is begun anew.
      writes: whether this process writes (one of several does).
    """

    def __init__(self, path: pathlib.Path | None, about: dict[str, Any], *, writes: bool = True):
        self._answers: dict[str, Any] = {}
        self._file = None
        if path is None:
            return
        header = json.dumps(about, sort_keys=True)
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        usable = lines[:1] == [header]
        if usable:
            for line in lines[1:]:
                with contextlib.suppress(ValueError):
                    self._answers.update(json.loads(line))
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a" if usable else "w", encoding="utf-8")
            # After a line that was cut off, the next one must begin anew.
            self._file.write("\n" if usable else header + "\n")

    def __len__(self) -> int:
        return len(self._answers)

    def known(self, keys: Sequence[str]) -> dict[str, Any]:
        """Answers of those requests that have one."""
        hashed = {key: _hash(key) for key in keys}
        return {key: self._answers[h] for key, h in hashed.items() if h in self._answers}

    def add(self, key: str, answer: Any) -> None:
        """Keeps an answer."""
        self._answers[_hash(key)] = answer
        if self._file is not None:
            self._file.write(json.dumps({_hash(key): answer}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:32]

"""Answers on disk, so that a killed evaluation resumes where it stopped."""

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tlm_jax import bucket_files, files, storage
from tlm_jax.config import UserError


class Journal:
    """A file of JSON lines, each with an answer and a checksum; keys are hashed.

    A line that a kill cut off, and one whose checksum does not match, are removed: their
    requests have no answer.

    Args:
      path: the file; None keeps answers in memory only.
      about: what the answers depend on besides the requests (the parameters, the tokenizer), as
        JSON values; a file that is about something else is started over.
      writes: whether this process writes (one of several does).
    """

    def __init__(self, path: pathlib.Path | None, about: dict[str, Any], *, writes: bool = True):
        self.damaged = 0
        """Whole lines that were not as they were written."""
        self._answers: dict[str, Any] = {}
        self._file: Any = None
        if path is None:
            return
        header = _line({"about": about})
        try:
            content = bucket_files.read_log(path)
        except FileNotFoundError:
            content = b""
        lines = content.split(b"\n")[:-1]  # what a kill cut off has no end
        kept = [header]
        if lines[:1] == [header]:
            for line in lines[1:]:
                record = _record(line)
                if record is None:
                    self.damaged += 1
                else:
                    self._answers[record["key"]] = record["answer"]
                    kept.append(line)
        elif lines and _record(lines[0]) is None:
            self.damaged = 1
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = b"\n".join([*kept, b""])
            if content != whole:
                bucket_files.remove_log(path)
                files.write_text(path, whole.decode())
            if storage.in_bucket(path):  # a kill loses the answers of some seconds
                self._file = bucket_files.Log(path, lambda _: None)
            else:
                self._file = path.open("ab", buffering=0)

    def __len__(self) -> int:
        return len(self._answers)

    def known(self, keys: Sequence[str]) -> dict[str, Any]:
        """Answers of those requests that have one."""
        hashed = {key: _hash(key) for key in keys}
        return {key: self._answers[h] for key, h in hashed.items() if h in self._answers}

    def add(self, key: str, answer: Any) -> None:
        """Remembers an answer (JSON values); a kill after this does not lose it."""
        hashed = _hash(key)
        self._answers[hashed] = answer
        if self._file is not None:
            self._file.write(_line({"key": hashed, "answer": answer}) + b"\n")

    def answers(
        self,
        keys: Sequence[str],
        ask: Callable[[list[int]], Iterable[tuple[int, Any]]],
        advance: Callable[[int, int], None],
    ) -> list[Any]:
        """The answer of each request; those without one are asked, and their answers added.

        Args:
          keys: of the requests.
          ask: takes the indices of requests, and yields (place among these, answer).
          advance: told (done, total).
        """
        known = self.known(keys)
        missing = [i for i, key in enumerate(keys) if key not in known]
        done = len(keys) - len(missing)
        advance(done, len(keys))
        for place, answer in ask(missing):
            key = keys[missing[place]]
            if key not in known:  # of equal requests, the first answer counts, as after a kill
                known[key] = answer
                self.add(key, answer)
            done += 1
            advance(done, len(keys))
        return [known[key] for key in keys]

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(files.sealed(record)).encode()


def _record(line: bytes) -> dict[str, Any] | None:
    """What a line holds, if it is as it was written."""
    try:
        record = json.loads(line)
    except ValueError:  # also what is not UTF-8
        return None
    if not isinstance(record, dict) or files.CHECKSUM not in record:
        return None
    try:
        return files.verified(record, "a line")
    except UserError:
        return None


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:32]

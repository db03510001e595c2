"""The data iterator's position, in a checkpoint."""

import asyncio
import json
from collections.abc import Awaitable
from typing import Any

import jax

from tlm_jax import files
from tlm_jax.data.shares import SharedBatches

FILE = "position.json"


class Position:
    """The data iterator's position, as Orbax saves and loads it.

    One file for each reader, whatever the number of processes: each is written by one process,
    and read by those that run this reader then. (Grain's own way is a file for each process, which
    no other number of them can read.)

    Args:
      iterator: with `get_state` and `set_state`; of several readers, a `data.shares.SharedBatches`.
      sealed: whether a file that is loaded must have a checksum.
    """

    def __init__(self, iterator: Any, *, sealed: bool = True) -> None:
        self._iterator, self._sealed = iterator, sealed
        self._share = iterator.share if isinstance(iterator, SharedBatches) else None

    async def save(self, directory: Any) -> Awaitable[None]:
        state = self._iterator.get_state()
        if self._share is not None:
            mine = {_file(reader): state[str(reader)] for reader in self._share.saves}
        else:
            mine = {FILE: state} if jax.process_index() == 0 else {}
        texts = {name: json.dumps(files.sealed(s)) for name, s in mine.items()}  # written later

        async def write() -> None:
            folder = await directory.await_creation()
            for name, text in texts.items():
                await asyncio.to_thread((folder / name).write_text, text)

        return write()

    async def load(self, directory: Any) -> Awaitable[None]:
        async def of(name: str) -> dict[str, Any]:
            text = await asyncio.to_thread((directory / name).read_text)
            return verified(json.loads(text), sealed=self._sealed)

        async def read() -> None:
            if self._share is None:
                self._iterator.set_state(await of(FILE))
            else:
                self._iterator.set_state({str(r): await of(_file(r)) for r in self._share.readers})

        return read()


def names(layout: dict[str, Any]) -> list[str]:
    """The files of a position.

    Args:
      layout: the data layout that is saved with it (`Dataset.layout`).
    """
    readers = layout.get("readers")
    return [_file(reader) for reader in range(readers)] if readers else [FILE]


def _file(reader: int) -> str:
    return f"position-{reader:05d}.json"


def verified(record: dict[str, Any], *, sealed: bool) -> dict[str, Any]:
    """The iterator's state in a position file, which must have a checksum if it was sealed."""
    if sealed and files.CHECKSUM not in record:
        raise files.DamagedFileError("the checksum over the data's position is missing")
    return files.verified(record, "the data's position")

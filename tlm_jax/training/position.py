"""Where the data iterator stands, in a checkpoint."""

import asyncio
import json
from collections.abc import Awaitable
from typing import Any

import jax

from tlm_jax import files

FILE = "position.json"


class Position:
    """Where the data iterator stands, as Orbax saves and loads it.

    One file, whatever the number of processes: all of them read the same batches. (Grain's own
    way is a file for each process, which no other number of them can read.)

    Args:
      iterator: with `get_state` and `set_state`.
      sealed: whether a file that is loaded must have a checksum.
    """

    def __init__(self, iterator: Any, *, sealed: bool = True) -> None:
        self._iterator, self._sealed = iterator, sealed

    async def save(self, directory: Any) -> Awaitable[None]:
        state = json.dumps(files.sealed(self._iterator.get_state()))  # now; written later

        async def write() -> None:
            folder = await directory.await_creation()
            if jax.process_index() == 0:
                await asyncio.to_thread((folder / FILE).write_text, state)

        return write()

    async def load(self, directory: Any) -> Awaitable[None]:
        async def read() -> None:
            text = await asyncio.to_thread((directory / FILE).read_text)
            self._iterator.set_state(verified(json.loads(text), sealed=self._sealed))

        return read()


def verified(record: dict[str, Any], *, sealed: bool) -> dict[str, Any]:
    """The iterator's state in a position file, which must have a checksum if it was sealed."""
    if sealed and files.CHECKSUM not in record:
        raise files.DamagedFileError("the checksum over the data's position is missing")
    return files.verified(record, "the data's position")

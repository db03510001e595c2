"""Tensors by name: safetensors files read in parts, and written in shards."""

import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from tlm_jax import files
from tlm_jax.config import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_DTYPES = ("F32", "BF16", "F16", "F64")


class TensorSource(Protocol):
    """Named tensors that lie in files."""

    where: str
    """The file or folder, for messages."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor."""
        ...

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a tensor, float32."""
        ...


class SafetensorsFolder:
    """A folder with model.safetensors, or shards of it and their index.

    The files are memory-mapped: only the rows that are read enter memory.

    Raises:
      UserError: there are no such files, or one is damaged.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.where = str(folder)
        self.files = tuple(_weight_files(folder))
        self._files: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in self.files:
            reader = self._open(path)
            for name in reader.keys():  # noqa: SIM118 (not a mapping)
                tensor = reader.get_slice(name)
                if tensor.get_dtype() not in _DTYPES:
                    raise UserError(
                        f"{path}: {name} has dtype {tensor.get_dtype()}; one of "
                        f"{', '.join(_DTYPES)} can be imported"
                    )
                self._files[name] = reader
                self.shapes[name] = tuple(tensor.get_shape())

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a tensor, float32; `UserError` if some are not finite."""
        with np.errstate(over="ignore"):
            rows = self._files[name].get_slice(name)[start:stop].astype(np.float32)
        if not np.isfinite(rows).all():
            raise UserError(f"{self.where}: {name} holds numbers that are not finite")
        return rows

    @staticmethod
    def _open(path: pathlib.Path) -> Any:
        with needs_extra():
            from safetensors import SafetensorError, safe_open
        try:
            return safe_open(path, framework="np")
        except FileNotFoundError:
            raise UserError(f"{path} does not exist, and {INDEX} names it") from None
        except SafetensorError as error:
            raise UserError(f"{path} is damaged: {error}") from error


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    index = folder / INDEX
    if index.is_file():
        names = files.read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise UserError(f"{index} is not an index of safetensors files")
        for name in names.values():  # a link, as in the Hugging Face cache, may lead elsewhere
            if not isinstance(name, str) or name in ("", "..") or "/" in name or "\0" in name:
                raise UserError(f"{index} names {name!r}, which is not a file beside it")
            if (folder / name).exists() and not (folder / name).is_file():
                raise UserError(f"{folder / name}, which {INDEX} names, is not a regular file")
        return [folder / name for name in sorted(set(names.values()))]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    raise UserError(
        f"{folder} has neither {WEIGHTS} nor {INDEX}; other formats can be saved again as "
        "safetensors, by save_pretrained of transformers"
    )


def write_safetensors(
    folder: pathlib.Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes model.safetensors, or shards of at most `shard_bytes` and an index.

    One shard at a time is in memory; a tensor is never cut.
    """
    with needs_extra():
        from safetensors import SafetensorError
        from safetensors.numpy import save_file
    shards: list[list[str]] = []
    total = 0

    def save(held: dict[str, np.ndarray]) -> None:
        try:
            save_file(held, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        except SafetensorError as error:  # what the system refuses, it reports in words
            if number := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
            raise
        shards.append(list(held))

    held: dict[str, np.ndarray] = {}
    for name, array in tensors:
        if held and sum(a.nbytes for a in held.values()) + array.nbytes > shard_bytes:
            save(held)
            held = {}
        held[name] = np.ascontiguousarray(array)
        total += array.nbytes
    save(held)
    os.umask(mask := os.umask(0o077))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        file = file if len(shards) > 1 else WEIGHTS
        path = (folder / f"shard-{number}").rename(folder / file)
        path.chmod(0o666 & ~mask)  # the library makes files that only their owner can read
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def needs_extra() -> Iterator[None]:
    """Says which optional packages are missing, instead of an ImportError."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"package {error.name} is missing; install it with: pip install 'tlm-jax[hf]'"
        ) from error

"""The header of a GGUF file: its metadata, and where each tensor lies.

After the GGUF specification (ggml/docs/gguf.md, versions 2 and 3), little-endian. Every count,
length and offset is compared with the size of the file before anything of that size is made, and
tensors must lie one after the other as llama.cpp writes and demands them, so that damage to the
structure is found. Numbers and texts in the metadata have no checksum.
"""

import dataclasses
import math
import pathlib
import struct
from typing import Any

import numpy as np

from tlm_jax.interop.tensors import needs_extra
from tlm_jax.validation import round_up

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
_MOST_DIMS = 4


class DamagedError(ValueError):
    """What the file says of itself cannot be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of the file."""

    name: str
    type: Any
    """A `gguf.GGMLQuantizationType`."""
    shape: tuple[int, ...]
    """Rows first, as Hugging Face has it; the file says it the other way round."""
    data: np.ndarray
    """A view of the file: numbers, or quantised rows as bytes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What a file holds."""

    fields: dict[str, Any]
    """Metadata: numbers, bools, bytes of a string, lists of them, NumPy arrays of numbers."""
    tensors: tuple[StoredTensor, ...]


class _Cursor:
    """Reads a memory-mapped file from its start, never beyond its end."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.place = data, 0

    def take(self, count: int, what: str) -> memoryview:
        """The next `count` bytes."""
        if count > len(self.data) - self.place:
            raise DamagedError(
                f"{what} at byte {self.place:,} needs {count:,} bytes, and the file ends at "
                f"{len(self.data):,}"
            )
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self, kind: str, what: str) -> Any:
        return struct.unpack(kind, self.take(struct.calcsize(kind), what))[0]

    def string(self, what: str) -> bytes:
        return self.take(self.number("<Q", what), what).tobytes()

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self._array(what)
        if kind not in _SCALARS:
            raise DamagedError(f"{what} has type {kind}, which does not exist")
        found = self.number(_SCALARS[kind], what)
        return self._bool(found, what) if kind == _BOOL else found

    def _array(self, what: str) -> Any:
        kind, count = self.number("<I", what), self.number("<Q", what)
        if kind == _STRING:
            self._check_room(8 * count, what)
            return [self.string(what) for _ in range(count)]
        if kind not in _SCALARS:
            raise DamagedError(f"{what} is an array of type {kind}, which cannot be read")
        size = struct.calcsize(_SCALARS[kind])
        found = np.frombuffer(self.take(size * count, what), _SCALARS[kind])
        if kind != _BOOL:
            return found
        self._bool(int(found.max(initial=0)), what)
        return found.astype(bool)

    def _check_room(self, count: int, what: str) -> None:
        place = self.place
        self.take(count, what)
        self.place = place

    @staticmethod
    def _bool(value: int, what: str) -> bool:
        if value > 1:
            raise DamagedError(f"{what} is a bool with value {value}")
        return bool(value)


def read(path: pathlib.Path) -> Header:
    """Reads and checks the header of a file, which is memory-mapped.

    Raises:
      DamagedError: the file is not a whole GGUF file.
      UserError: package gguf is missing.
    """
    if not path.stat().st_size:
        raise DamagedError("it is empty")
    cursor = _Cursor(memoryview(np.memmap(path, np.uint8, mode="r")))  # type: ignore[arg-type]
    if cursor.take(4, "the magic number").tobytes() != _MAGIC:
        raise DamagedError("it does not begin with GGUF")
    version = cursor.number("<I", "the version")
    if version not in _VERSIONS:
        raise DamagedError(f"its version is {version}; 2 and 3 in little-endian order can be read")
    num_tensors = cursor.number("<Q", "the number of tensors")
    num_fields = cursor.number("<Q", "the number of metadata fields")
    fields: dict[str, Any] = {}
    for index in range(num_fields):
        key = _text(cursor.string(f"key {index} of the metadata"), f"key {index} of the metadata")
        if key in fields:
            raise DamagedError(f"metadata {key} is there twice")
        what = f"metadata {key!r}"
        fields[key] = cursor.value(cursor.number("<I", what), what)
    infos = [_tensor_info(cursor, index) for index in range(num_tensors)]
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise DamagedError(f"general.alignment is {alignment!r}; it must be a power of two")
    return Header(fields=fields, tensors=_placed(cursor, infos, alignment))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Info:
    name: str
    dims: tuple[int, ...]
    type: Any
    offset: int
    row_bytes: int
    num_bytes: int


def _tensor_info(cursor: _Cursor, index: int) -> _Info:
    with needs_extra():
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    what = f"entry {index} of the tensors"
    name = _text(cursor.string(what), what)
    what = f"tensor {name!r}"
    num_dims = cursor.number("<I", what)
    if not 1 <= num_dims <= _MOST_DIMS:
        raise DamagedError(f"{what} has {num_dims} dims; it must have 1 to {_MOST_DIMS}")
    dims = tuple(cursor.number("<Q", what) for _ in range(num_dims))
    number, offset = cursor.number("<I", what), cursor.number("<Q", what)
    try:
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise DamagedError(f"{what} has type {number}, which this version of gguf does not know") \
            from None  # fmt: skip
    if 0 in dims or dims[0] % block:
        raise DamagedError(f"{what} has dims {dims}; they must be multiples of {block}, 1, ...")
    row_bytes = dims[0] // block * block_bytes
    return _Info(
        name=name,
        dims=dims,
        type=kind,
        offset=offset,
        row_bytes=row_bytes,
        num_bytes=row_bytes * math.prod(dims[1:]),
    )


def _placed(cursor: _Cursor, infos: list[_Info], alignment: int) -> tuple[StoredTensor, ...]:
    """The tensors, which must fill the rest of the file without a gap."""
    start = round_up(cursor.place, alignment)
    expected, end = 0, cursor.place
    found: dict[str, StoredTensor] = {}
    for info in infos:
        if info.name in found:
            raise DamagedError(f"tensor {info.name!r} is there twice")
        if info.offset != expected:
            raise DamagedError(
                f"tensor {info.name!r} has offset {info.offset:,}; after the one before it comes "
                f"{expected:,}"
            )
        cursor.place = start + expected
        raw = np.frombuffer(cursor.take(info.num_bytes, f"tensor {info.name!r}"), np.uint8)
        end = cursor.place
        expected += round_up(info.num_bytes, alignment)
        shape = tuple(reversed(info.dims))
        plain = _PLAIN.get(info.type.name)
        data = raw.view(plain).reshape(shape) if plain else raw.reshape(*shape[:-1], info.row_bytes)
        found[info.name] = StoredTensor(name=info.name, type=info.type, shape=shape, data=data)
    if len(cursor.data) - end >= alignment:
        raise DamagedError(f"{len(cursor.data) - end:,} bytes follow its last tensor")
    return tuple(found.values())


def _text(content: bytes, what: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise DamagedError(f"{what} is not valid UTF-8") from None

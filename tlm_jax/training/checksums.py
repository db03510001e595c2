"""A checksum of each array of a state, computed on the devices where the array lies.

It depends on values, shape and type alone, not on the mesh or on how the array is divided. Each
element, as an unsigned integer, is mixed with its place in the array and the results are added
up modulo 2^32, twice with different mixtures: 64 bits in all. For a given place the mixture is a
bijection, so that one changed element always changes both sums; any other damage goes unnoticed
with a chance of about 2^-64. (Our choice; the mixture is a short form of MurmurHash3's finalizer.)
"""

import asyncio
import hashlib
import json
import pathlib
from collections.abc import Awaitable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tlm_jax import files
from tlm_jax.models.skeleton import by_path

FILE = "checksums.json"

_Sums = dict[str, tuple[jax.Array, jax.Array]]


def shapes(tree: Any) -> dict[str, str]:
    """Type and shape of each leaf by its name, such as `float32[4,32]`."""
    return {
        path: f"{leaf.dtype.name}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in by_path(tree).items()
    }


def of(tree: Any) -> dict[str, str]:
    """The checksum of each array of a tree by its name, 16 hexadecimal digits.

    With several processes all must call it.
    """
    return _read(_computed(tree))


class Saved:
    """The checksums of a tree, as Orbax saves them beside the arrays.

    They are dispatched at once, before the next update takes the arrays' memory, and run while
    the arrays are copied and written.
    """

    def __init__(self, tree: Any) -> None:
        self._sums = _computed(tree)

    async def save(self, directory: Any) -> Awaitable[None]:
        async def write() -> None:
            folder = await directory.await_creation()
            record = files.sealed({"checksums": await asyncio.to_thread(_read, self._sums)})
            if jax.process_index() == 0:
                await asyncio.to_thread((folder / FILE).write_text, json.dumps(record))

        return write()

    async def load(self, directory: Any) -> Awaitable[None]:
        raise TypeError("checksums are read with `saved`")


def saved(folder: pathlib.Path) -> dict[str, str]:
    """What `Saved` wrote into a folder."""
    record = json.loads((folder / FILE).read_bytes())
    if files.CHECKSUM not in record:
        raise files.DamagedFileError("the checksum over the checksums is missing")
    return files.verified(record, "its list of checksums")["checksums"]


def mismatches(saved: Mapping[str, str], tree: Any) -> list[str]:
    """Names of the arrays that do not have the checksums that were saved."""
    return [key for key, value in of(tree).items() if saved.get(key) != value]


def identity(checksums: Mapping[str, str], below: str) -> str:
    """A digest of all checksums whose names begin with `below`."""
    lines = (f"{key} {value}" for key, value in sorted(checksums.items()) if key.startswith(below))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _computed(tree: Any) -> _Sums:
    found: _Sums = {}
    for path, leaf in by_path(tree).items():
        sums = _sums(leaf)
        if _simulated(sums[0]):
            # Programs whose collectives overlap can wait for each other forever there.
            jax.block_until_ready(sums)
        found[path] = sums
    return found


def _simulated(array: jax.Array) -> bool:
    """Whether an array lies on several devices that are one CPU."""
    devices: set[Any] = array.sharding.device_set
    return len(devices) > 1 and all(device.platform == "cpu" for device in devices)


def _read(sums: _Sums) -> dict[str, str]:
    return {
        key: f"{first:08x}{second:08x}" for key, (first, second) in jax.device_get(sums).items()
    }


@jax.jit
def _sums(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    values = _integers(array)
    place = _places(values.shape[:-1]) * jnp.uint32(values.shape[-1] % 2**32) + jnp.arange(
        values.shape[-1], dtype=jnp.uint32
    )
    mixed = (values ^ (place * jnp.uint32(0x9E3779B9))) * jnp.uint32(0x85EBCA6B)
    mixed ^= mixed >> 15
    first = mixed * jnp.uint32(0xC2B2AE35)
    second = (mixed ^ (mixed >> 7)) * jnp.uint32(0x27D4EB2F)
    zero = jnp.uint32(0)
    return jax.lax.reduce(  # both in one pass over the array
        (first ^ (first >> 16), second ^ (second >> 13)),
        (zero, zero),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        tuple(range(values.ndim)),
    )


def _places(shape: tuple[int, ...]) -> jax.Array:
    """Number of each element in row-major order, modulo 2^32, with one more dim of size 1."""
    place = jnp.zeros((*shape, 1), jnp.uint32)
    for dim, size in enumerate(shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, place.shape, dim)
        place = place * jnp.uint32(size % 2**32) + along
    return place


def _integers(array: jax.Array) -> jax.Array:
    """The bits of each element as uint32, at least one dim; a 64-bit element becomes two."""
    array = jnp.atleast_1d(array)
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    size = array.dtype.itemsize
    if size < 4:
        return jax.lax.bitcast_convert_type(array, f"uint{8 * size}").astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(array, jnp.uint32)

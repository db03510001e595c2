"""A checksum depends on the values of an array alone, and on every bit of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tlm_jax.training import checksums

TYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "bool"]


def _one(array: jax.Array | np.ndarray) -> str:
    return checksums.of({"a": array})["a"]


def test_the_same_however_an_array_is_divided() -> None:
    array = jax.random.normal(jax.random.key(0), (8, 6, 16), jnp.float32)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    specs = [P(), P("x"), P(None, "y"), P("y", None, "x"), P(None, None, ("x", "y"))]
    found = {_one(jax.device_put(array, NamedSharding(mesh, spec))) for spec in specs}
    assert found == {_one(array)}


@pytest.mark.parametrize("dtype", TYPES)
def test_every_flipped_bit_counts(dtype: str) -> None:
    whole = np.asarray(jax.random.normal(jax.random.key(1), (3, 5)).astype(dtype))
    places = range(whole.nbytes)
    bits = [0] if dtype == "bool" else range(8)
    found = {_one(whole)}
    for place, bit in itertools.product(places, bits):
        damaged = bytearray(whole.tobytes())
        damaged[place] ^= 1 << bit
        found.add(_one(np.frombuffer(damaged, whole.dtype).reshape(whole.shape)))
    assert len(found) == 1 + len(places) * len(bits)


def test_places_count() -> None:
    """Exchanged elements and rows, a flipped sign everywhere, zeros for a part."""
    whole = np.arange(1, 4097, dtype=np.float32).reshape(64, 64)
    half = whole.copy()
    half[32:] = 0
    found = [_one(x) for x in (whole, whole.T.copy(), whole[::-1].copy(), -whole, half)]
    assert len(set(found)) == len(found)
    with_zero = {_one(np.where(np.arange(9) == i, 0.5, 0.0)) for i in range(9)}
    assert len(with_zero) == 9

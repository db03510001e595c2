"""The contract of scaling: 8 devices share the work of one, along every axis of the mesh."""

import functools
import os

import jax
import jax.numpy as jnp
import pytest
from helpers import ROOT

from benchmarks import meshes

# Programs are compiled once for all tests, but compiled: some tests are of what is said meanwhile.
pytestmark = [pytest.mark.xdist_group("mesh_costs"), pytest.mark.usefixtures("compiled_anew")]
GOLDEN = ROOT / "tests" / "golden" / "collectives.txt"
MOST_FLOPS = 1.1
MOST_TEMPORARY = {"tensor": 0.7}
"""Over one device's. Under `tensor` alone the residual stream lies whole on each device."""

cost = functools.cache(meshes.cost)
each_cell = pytest.mark.parametrize(("model", "mesh"), meshes.CELLS)


@each_cell
def test_each_device_computes_its_share(model: str, mesh: str) -> None:
    share = cost(model, None).flops / meshes.DEVICES
    assert cost(model, mesh).flops <= MOST_FLOPS * share


@each_cell
def test_temporaries_fall(model: str, mesh: str) -> None:
    most = MOST_TEMPORARY.get(mesh, 0.35)
    assert cost(model, mesh).temporary <= most * cost(model, None).temporary


@each_cell
def test_the_partitioner_has_nothing_to_say(model: str, mesh: str) -> None:
    assert cost(model, mesh).complaints == ""


def test_what_native_code_writes_is_caught() -> None:
    """The compiler does not write through Python's own stream."""
    with meshes.stderr() as said:
        os.write(2, b"[SPMD] Involuntary full rematerialization")
    assert said == ["[SPMD] Involuntary full rematerialization"]


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 11), reason="newer partitioners split this lookup in silence"
)
def test_what_the_partitioner_says_is_caught() -> None:
    """Rows that were made split in one way and are wanted split in another."""
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(jax.sharding.AxisType.Auto,) * 3)

    def on(shape: tuple[int, ...], kind: type, *axes: object) -> jax.ShapeDtypeStruct:
        where = jax.sharding.NamedSharding(mesh, jax.P(*axes))
        return jax.ShapeDtypeStruct(shape, kind, sharding=where)

    def lookup(table_VD: jax.Array, tokens_BL: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(table_VD[tokens_BL], jax.P(("a", "b"), None, None))

    arguments = on((64, 32), jnp.float32, "c", "b"), on((8, 16), jnp.int32, ("a", "b"), None)
    with jax.set_mesh(mesh), meshes.stderr() as said:
        jax.jit(lookup).lower(*arguments).compile()
    assert "nvoluntary full rematerialization" in said[0]


def test_collectives_are_those_that_were_reviewed() -> None:
    """TLM_UPDATE_GOLDEN=1 writes the file anew; look at its diff."""
    lines = ["bytes of the results of collectives on a device, in one train step"]
    for model, mesh in meshes.CELLS:
        found = sorted(cost(model, mesh).collectives.items())
        lines.append(f"{model} / {mesh}: " + ", ".join(f"{kind} {n:,}" for kind, n in found))
    text = "\n".join(lines) + "\n"
    if os.environ.get("TLM_UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()

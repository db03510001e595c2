"""The rule that chooses versions of ops."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlm_jax import ops
from tlm_jax.ops.products import DENSE, FLOAT32_PRODUCT, PRODUCT, WEIGHT_GRADIENT
from tlm_jax.ops.rotary import SINES

PACKAGE = pathlib.Path(ops.__file__).parents[1]


def test_models_and_the_stack_ask_for_no_hardware() -> None:
    """They call ops; only ops asks which hardware it is (with the import rule of `make lint`)."""
    asks = re.compile(r"default_backend|platform_dependent|pallas|cuda|== .(cpu|gpu|tpu)")
    files = [*PACKAGE.glob("models/*.py"), PACKAGE / "stack.py"]
    assert len(files) > 10
    # What `auto` means for dtype and scans; the names of operations in traced programs.
    allowed = {"settings.py", "liveness.py"}
    for file in files:
        found = asks.search(file.read_text())
        assert file.name in allowed or not found, f"{file.name}: {found}"


@pytest.mark.parametrize("op", [DENSE, SINES], ids=lambda op: op.name)
@pytest.mark.parametrize("target", ["cpu", "gpu", "tpu"])
def test_only_a_cpu_gets_versions_for_a_cpu(op, target: str) -> None:
    chosen = op.choose(target=target, shards=1, devices=1, dtype="float32").name
    assert (chosen == "reference") == (target != "cpu")


@pytest.mark.parametrize(
    "op", [DENSE, WEIGHT_GRADIENT, PRODUCT, FLOAT32_PRODUCT], ids=lambda op: op.name
)
def test_bfloat16_has_versions_on_a_cpu_only(op) -> None:
    def chosen(target: str, dtype: str) -> str:
        return op.choose(target=target, shards=1, devices=1, dtype=dtype).name

    assert chosen("cpu", "bfloat16") != chosen("cpu", "float32")
    assert {chosen(target, "bfloat16") for target in ("gpu", "tpu")} == {"reference"}


def test_several_devices_keep_factors_where_they_are() -> None:
    facts = {"target": "cpu", "shards": 1, "dtype": "bfloat16"}
    assert DENSE.choose(devices=1, **facts).name == "bfloat16"
    assert DENSE.choose(devices=2, **facts).name == "flattened"
    assert PRODUCT.choose(devices=2, **facts).name == "reference"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_stay_split_over_tokens(dtype: str) -> None:
    assert DENSE.choose(target="cpu", shards=4, devices=4, dtype=dtype).name == "reference"


def test_versions_for_a_cpu_equal_the_references() -> None:
    keys = jax.random.split(jax.random.key(0), 2)
    x_BLD = jax.random.normal(keys[0], (2, 7, 8))
    w_DHK = jax.random.normal(keys[1], (8, 3, 4))
    positions_BL = jnp.arange(14).reshape(2, 7)

    def both():
        y_BLHK = ops.dense(x_BLD, w_DHK)
        return y_BLHK, ops.rotary(y_BLHK, positions_BL, 100.0)

    faster = both()
    with ops.references():
        plain = both()
    for a, b in zip(faster, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_program_can_be_traced_for_other_hardware() -> None:
    def names():
        jaxpr = jax.make_jaxpr(lambda x: ops.rotary(x, jnp.zeros((1, 4), int), 10.0))(
            jnp.zeros((1, 4, 2, 8))
        )
        return {eqn.primitive.name for eqn in jaxpr.eqns}

    assert "dot_general" in names()
    with ops.tracing_for("tpu"):
        assert "dot_general" not in names()
    assert "dot_general" in names()


def test_an_unknown_version_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown dense kernel 'fast'; known: bfloat16, flattened"):
        DENSE.choose("fast", target="cpu", shards=1, devices=1, dtype="float32")

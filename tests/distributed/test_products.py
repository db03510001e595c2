"""FLOPs that are read from a program's text, against the compiler's own count."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tlm_jax.distributed.products import product_flops


def abstract(*shape: int, where: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"padding": "VALID"},
    "strides": {"padding": [(1, 2), (0, 3)], "window_strides": (2, 1)},
    "holes": {"padding": [(2, 2), (3, 3)], "lhs_dilation": (3, 2), "rhs_dilation": (1, 2)},
    "groups": {"padding": "SAME", "feature_group_count": 2},
    "groups of rows": {"padding": "SAME", "batch_group_count": 2},
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_count_what_the_compiler_counts(name: str) -> None:
    """TPU programs hold products as convolutions, the batch as a dim with padding and holes."""
    options = {"window_strides": (1, 1)} | CONVOLUTIONS[name]
    channels = 6 // options.get("feature_group_count", 1)

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **options)

    lowered = jax.jit(convolve).lower(abstract(4, 9, 7, 6), abstract(3, 2, channels, 8))
    assert product_flops(lowered.as_text("hlo")) == lowered.cost_analysis()["flops"] > 0


def test_a_product_as_a_tpu_program_holds_it() -> None:
    """Four products of (192, 48) and (48, 512): three of four places of the kernel are padding."""
    text = """
HloModule m
ENTRY %main (p: bf16[192,48,1], q: bf16[4,512,48]) -> bf16[4,512,192] {
  %p = bf16[192,48,1]{2,1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[4,512,48]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = bf16[4,512,192]{1,2,0:T(8,128)(2,1)S(1)} convolution(%p, %q), window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_0oi->0fb
}
"""  # noqa: E501
    assert product_flops(text) == 4 * 2 * 192 * 48 * 512


def test_loops_count_as_often_as_they_run() -> None:
    """Before a program is compiled and after; the compiler's own count takes a loop once."""

    def loss(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.sum(lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0])

    lowered = jax.jit(jax.grad(loss, 1)).lower(abstract(64, 32), abstract(5, 32, 32))
    program = lowered.compile()
    whole = 3 * 5 * 2 * 64 * 32 * 32
    assert product_flops(lowered.as_text("hlo")) == whole
    assert product_flops(program.as_text()) == whole
    assert whole / 5 < program.cost_analysis()["flops"] < whole / 4


def test_repeated_work_is_more_than_a_share() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (jax.sharding.NamedSharding(mesh, jax.P(axis)) for axis in ("x", None))

    def flops(out: jax.sharding.NamedSharding) -> tuple[int, int]:
        product = jax.jit(lambda x, w: lax.with_sharding_constraint(x, out) @ w, out_shardings=out)
        lowered = product.lower(abstract(64, 32, where=split), abstract(32, 16, where=whole))
        return product_flops(lowered.compile().as_text()), product_flops(lowered.as_text("hlo"))

    assert flops(split) == (2 * 8 * 32 * 16, 2 * 64 * 32 * 16)
    assert flops(whole) == (2 * 64 * 32 * 16, 2 * 64 * 32 * 16)

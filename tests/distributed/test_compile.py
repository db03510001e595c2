"""What `tlm compile` reads from a program, and what it refuses; .ci/run compiles for a TPU."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from helpers import ROOT, only_error
from jax.sharding import NamedSharding
from test_meshes import run_config

from tlm_jax import cli, output
from tlm_jax.cli import compile_ahead
from tlm_jax.config import MeshConfig, UserError
from tlm_jax.distributed import topology
from tlm_jax.distributed.collectives import Collectives, collectives
from tlm_jax.models import skeleton
from tlm_jax.training import aot


def test_collectives_count_as_often_as_loops_run() -> None:
    """Five layers that gather their weights in a scan, and one sum over all devices at the end."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(weights_LDD: jax.Array, x_BD: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            w = jax.lax.with_sharding_constraint(w, jax.P(None, None))
            return jnp.tanh(x @ w), None

        return jnp.sum(jax.lax.scan(layer, x_BD, weights_LDD)[0])

    def abstract(shape: tuple[int, ...], *axes: str | None) -> jax.ShapeDtypeStruct:
        where = NamedSharding(mesh, jax.P(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)

    with jax.set_mesh(mesh):
        arguments = abstract((5, 64, 64), None, "fsdp", None), abstract((16, 64), "fsdp", None)
        text = jax.jit(loss).lower(*arguments).compile().as_text()
    found = {c.kind: c for c in collectives(text)}
    assert found["all-gather"] == Collectives(kind="all-gather", count=5, bytes=5 * 64 * 64 * 4)
    assert found["all-reduce"] == Collectives(kind="all-reduce", count=1, bytes=4)


def test_started_collectives_and_loops_of_unknown_length() -> None:
    """As TPU programs write them: how often a loop runs stands in its condition, if anywhere."""
    text = """
HloModule m
%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %g = (bf16[8,16]{1,0}, bf16[8,128]{1,0}) all-gather-start(%x), dimensions={1}
  %d = bf16[8,128]{1,0} all-gather-done(%g)
}
%below_five (p: (s32[], bf16[8,128])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(5), metadata={op_name="while/cond/lt"}
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i, %constant.7), direction=LT
}
%fused (a: f32[4]) -> f32[4] {
  %r = f32[4]{0} reduce-scatter(%a), to_apply=%add
}
ENTRY %main (p0: bf16[8,16]) -> f32[4] {
  %w = (s32[], bf16[8,128]) while(%t), body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %v = (s32[], bf16[8,128]) while(%u), body=%body
  %l = (s32[], bf16[8,128]) while(%w), condition=%below_five, body=%body
  %f = f32[4]{0} fusion(%y), kind=kLoop, calls=%fused
}
"""
    assert collectives(text) == (
        Collectives(kind="all-gather", count=9, bytes=9 * 8 * 128 * 2),
        Collectives(kind="reduce-scatter", count=1, bytes=16),
    )


def test_loops_in_steps_of_two() -> None:
    """A TPU's loop over the shards of a product's operand sends two of them each time."""
    text = """
HloModule m
%below_eight (p: (bf16[8,16], u32[])) -> pred[] {
  %constant.4 = u32[]{:T(128)} constant(8)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.4), direction=LT
}
%two (p: (bf16[8,16], u32[])) -> (bf16[8,16], u32[]) {
  %constant.2.sunk = u32[]{:T(128)} constant(2)
  %j = u32[]{:T(128)} get-tuple-element(%p), index=1
  %a = bf16[8,16]{1,0} collective-permute(%x), channel_id=1
  %b = bf16[8,16]{1,0} collective-permute(%a), channel_id=2
  %next = u32[]{:T(128)} add(%j, %constant.2.sunk), metadata={op_name="a"}
  ROOT %t = (bf16[8,16]{1,0}, u32[]{:T(128)}) tuple(%b, /*index=1*/%next)
}
ENTRY %main (p0: bf16[8,16]) -> bf16[8,16] {
  %l = (bf16[8,16], u32[]) while(%t0), condition=%below_eight, body=%two
}
"""
    assert collectives(text) == (
        Collectives(kind="collective-permute", count=8, bytes=8 * 8 * 16 * 2),
    )


def test_the_train_step_compiles_for_given_devices() -> None:
    """The report for devices that are here: more rows need more memory, and a limit is kept."""
    config = run_config("transformer", MeshConfig(data=2))
    small = aot.with_batch(config, 8)
    results = [
        aot.compile_step("train", aot.with_batch(config, rows), jax.devices()[:2], 2**40)
        for rows in (8, 64)
    ]
    memories = [r.memory for r in results]
    assert memories[0] is not None
    assert memories[1] is not None
    # Parameters and two moments on each of the two; the batch is small.
    state = 3 * 4 * skeleton(config.model).num_params
    assert memories[0].arguments == pytest.approx(state, rel=0.02)
    assert memories[1].temporary > 2 * memories[0].temporary
    assert results[1].flops == pytest.approx(8 * results[0].flops)
    assert results[1].accessed > results[0].accessed > state
    for result in results:  # each of the two has half of the work, and what is computed again
        assert result.products == pytest.approx(result.share, rel=0.01)
        assert result.products > result.flops
    assert {c.kind for c in results[0].collectives} == {"all-reduce"}
    limit = memories[0].total + 1
    assert aot.compile_step("evaluation", small, jax.devices()[:2], limit).fits
    assert not aot.compile_step("train", small, jax.devices()[:2], limit - 2).fits


def test_the_table_says_who_counted() -> None:
    """The formula's FLOPs, the program's, how much of them is repeated, and the compiler's."""
    result = aot.Compiled(
        name="train",
        batch_size=8,
        seconds=1.0,
        memory=aot.Memory(arguments=1, outputs=1, temporary=1, code=1),
        limit=2**30,
        refusal="",
        flops=3e12,
        products=5e12,
        share=4e12,
        counted=2e12,
        accessed=1e9,
        collectives=(),
    )
    console = output.console()
    with console.capture() as capture:
        console.print(compile_ahead._table([result]))
    text = capture.get()
    for row, value in (
        ("TFLOPs per step", "3.000"),
        ("in the program", "5.000"),
        ("over its share", "1.25"),
        ("compiler, loops once", "2.000"),
    ):
        assert re.search(rf"{row} .* {value} ", text), text
    assert "a loop over layers counts once" in " ".join(text.split())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "'v5e' is not CHIP:AxB"),
        ("v3:4x4", "with chip v4, v5e, v5p, v6e"),
        ("v5e:4x4x4", "slices of v5e have 2 sides, such as v5e:2x2"),
        ("v5p:4x4", "slices of v5p have 3 sides, such as v5p:2x2x2"),
    ],
)
def test_names_of_slices(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        topology.parse(name)
    assert topology.parse("v5p:2x2x4").shape == (2, 2, 4)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the compiler is here")
def test_without_the_compiler(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compile", "--config", str(ROOT / "configs" / "tiny.py"), "--topology", "v5e:2x4"]
    assert cli.main(words) == 1
    assert only_error(capsys.readouterr().err).endswith("pip install 'tlm-jax[tpu]'")

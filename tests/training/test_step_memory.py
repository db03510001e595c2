"""What `tlm plan` says of memory, against what the compiler of this machine allocates."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest
from helpers import ROOT

from benchmarks import plan_memory
from tlm_jax import config_io
from tlm_jax.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    TaperConfig,
    TrainingConfig,
    UserError,
)
from tlm_jax.mixers import AttentionConfig, GatedAttentionConfig, MixerConfig, TitansConfig
from tlm_jax.mlp import MLPConfig
from tlm_jax.models import liveness, skeleton
from tlm_jax.training import aot, memory, step
from tlm_jax.training.updates import About, make_optimizer

TOLERANCE = 0.15
ARCHITECTURES: dict[str, tuple[MixerConfig, MLPConfig]] = {
    "transformer": (AttentionConfig(num_heads=4), MLPConfig()),
    "gated_attention": (GatedAttentionConfig(num_heads=4), MLPConfig()),
    "hope_attention": (AttentionConfig(num_heads=4), MLPConfig(periods=(1, 4))),
    "titans": (TitansConfig(num_heads=2, memory_width=32), MLPConfig()),
}


def run_config(
    architecture: str,
    remat: str = "full",
    widths: tuple[int, ...] = (384, 384, 192),
    mesh: MeshConfig = MeshConfig(data=1),  # noqa: B008
    parts: int = 1,
    **model: object,
) -> RunConfig:
    """Three layers, with rows enough that activations are most of the memory."""
    mixer, mlp = ARCHITECTURES[architecture]
    values = {
        "vocab_size": 512,
        "num_layers": len(widths),
        "d_model": 64,
        "mlp_width": sum(widths) // len(widths),
        "taper": TaperConfig(schedule="explicit", widths=widths),
        "mixer": mixer,
        "mlp": mlp,
        "remat": remat,
    }
    return RunConfig(
        model=ModelConfig(**(values | model)),
        data=DataConfig(seq_len=256, batch_size=16),
        training=TrainingConfig(loss_chunk=64, grad_accumulation=parts),
        mesh=mesh,
    )


def off(config: RunConfig, devices: int = 1) -> float:
    """The estimate over what the compiler allocates, minus 1."""
    found = aot.compile_step("train", config, jax.devices()[:devices], 2**60).memory
    assert found is not None
    planned = memory.step_memory(config, devices=devices, target="cpu")
    return planned.total / found.total - 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_estimate_is_the_compilers(architecture: str, remat: str) -> None:
    assert abs(off(run_config(architecture, remat))) < TOLERANCE


def test_a_broken_estimate_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tolerance can be missed: by an estimate that forgets what layers keep."""
    config = run_config("transformer", "none")
    layer = memory._Estimate.layer

    def forgets(self: memory._Estimate, *args: object) -> memory._Layer:
        return dataclasses.replace(layer(self, *args), kept=0)

    monkeypatch.setattr(memory._Estimate, "layer", forgets)
    assert abs(off(config)) > TOLERANCE


@pytest.mark.parametrize(
    ("devices", "mesh"), [(8, MeshConfig(data=1, fsdp=8)), (4, MeshConfig(data=4))]
)
def test_devices_share_the_rows(devices: int, mesh: MeshConfig) -> None:
    assert abs(off(run_config("transformer", mesh=mesh, widths=(256,) * 4), devices)) < TOLERANCE


def test_parts_and_loops() -> None:
    """A loop over layers stacks what they keep; parts make each of them smaller."""
    looped = run_config("transformer", "none", (256,) * 3, scan_layers=True)
    assert abs(off(looped)) < TOLERANCE
    parts = run_config("transformer", widths=(256,) * 3, parts=4)
    assert abs(off(parts)) < TOLERANCE
    whole = dataclasses.replace(parts, training=TrainingConfig(loss_chunk=64))
    four, one = (memory.step_memory(config, target="cpu") for config in (parts, whole))
    assert 4 * sum(four.kept_by_layer) == sum(one.kept_by_layer)
    assert four.gradients > one.gradients


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_state_is_exact(architecture: str) -> None:
    """On each device of a mesh, for all the tapers; counters of a few bytes aside."""
    config = run_config(architecture, mesh=MeshConfig(data=1, fsdp=4))
    planned = memory.step_memory(config, devices=4, target="cpu")
    model = skeleton(config.model)
    tx = make_optimizer(config.optimizer, 1, About.of(model), config.model.mlp)
    devices = jax.sharding.AbstractMesh((1, 4, 1, 1), ("data", "fsdp", "sequence", "tensor"))
    state = step.abstract_state(model, tx, devices)
    for part, size in ((state.params, planned.parameters), (state.opt_state, planned.optimizer)):
        leaves = jax.tree.leaves(part)
        shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in leaves]
        assert size == 4 * sum(map(math.prod, shapes))


def test_layers_between_the_ends_of_a_taper() -> None:
    """Kept bytes are linear in the width: the middle layer has the mean of the outer ones."""
    found = memory.step_memory(run_config("transformer", "none", (384, 256, 128)), target="cpu")
    first, middle, last = found.kept_by_layer
    assert first > middle > last
    assert middle == pytest.approx((first + last) / 2, rel=0.01)
    full = memory.step_memory(run_config("transformer", "full"), target="cpu")
    assert full.kept_by_layer == (16 * 256 * 64 * 4,) * 3  # the stream alone


def test_a_mesh_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="needs 8 devices, and there are 4"):
        memory.step_memory(run_config("transformer", mesh=MeshConfig(data=8)), devices=4)


def test_arrays_in_tiles() -> None:
    """A TPU's array fills tiles of 8 x 128, in the order of dims that leaves the least empty."""
    aval = jax.ShapeDtypeStruct((24, 64, 16, 64), jnp.float32)
    assert liveness.array_bytes(aval) == 4 * 24 * 64 * 16 * 64
    assert liveness.array_bytes(aval, tiled=True) == 4 * 24 * 128 * 16 * 64
    wide = jax.ShapeDtypeStruct((4096, 64), jnp.bfloat16)
    assert liveness.array_bytes(wide, tiled=True) == 2 * 4096 * 64
    assert liveness.array_bytes(wide, tiled=True, row_major=True) == 2 * 4096 * 128


def test_what_a_program_holds() -> None:
    """By hand: two products, the second read by nothing after the sum; elementwise ones fuse."""

    def program(x: jax.Array, w: jax.Array) -> jax.Array:
        y = jnp.exp(x @ w) + 1.0  # what a product reads is in memory: 256 bytes each
        z = y @ w
        return jnp.sum(z * 2.0, axis=0)

    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    found = liveness.held(jax.make_jaxpr(program)(x, x))
    assert found.peak == 2 * 256
    assert found.results == (32,)


def test_the_published_error_is_the_tables() -> None:
    """What `tlm plan` prints of its own error is the worst of what was compiled."""
    lines = plan_memory.CELLS.read_text().splitlines()
    for target, (configs, error) in memory.MEASURED.items():
        cells = [cell for cell in map(json.loads, lines) if cell["target"] == target]
        worst = max(abs(cell["plan"] / cell["compiler"] - 1) for cell in cells)
        assert configs == len(cells)
        assert error - 1 < 100 * worst <= error


def test_the_published_plan_is_todays() -> None:
    """One cell for each target, planned again."""
    for name in ("tiny:transformer / cpu / None / none / 1",
                 "tlm_440m:transformer / v5e:4x4 / 1 / full / 1"):  # fmt: skip
        found = plan_memory.known()[name]
        cell = next(cell for cell in plan_memory.cells() if cell.name == name)
        assert plan_memory.compared(cell, found)["plan"] == pytest.approx(found["plan"], rel=0.02)


def test_large_config_fits_the_slice_of_its_header() -> None:
    """The 1.3B model with its exact taper and its own batch, by the estimate."""
    config = config_io.load_config(ROOT / "configs" / "tlm_1_3b.py")
    assert memory.step_memory(config, devices=16).total < 15.75 * 2**30

"""Every architecture on every mesh equals one device; what lies where; meshes that do not fit."""

import dataclasses
import os
import pathlib
from typing import Any

import batches
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from tlm_jax.architectures import ARCHITECTURES
from tlm_jax.config import (
    AttentionConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TaperConfig,
    TrainingConfig,
    UserError,
)
from tlm_jax.config_io import load_config
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.distributed import sharding
from tlm_jax.mixers import GatedAttentionConfig, MixerConfig, TitansConfig
from tlm_jax.mlp import MLPConfig
from tlm_jax.models import skeleton
from tlm_jax.models.loss import training_loss
from tlm_jax.training import step
from tlm_jax.training.updates import About, make_optimizer

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "shardings.txt"
HEADS = TaperConfig(schedule="explicit", widths=(10, 10, 4), multiple_of=1)
MEMORIES = TaperConfig(schedule="explicit", widths=(24, 8), multiple_of=8)
TITANS = {"num_heads": 4, "memory_width": 16, "chunk": 8, "window": 16, "memory_taper": MEMORIES}
MIXERS: dict[str, tuple[MixerConfig, MLPConfig]] = {
    "transformer": (
        AttentionConfig(num_heads=16, num_kv_heads=8, heads_taper=HEADS),
        MLPConfig(),
    ),
    "gated_attention": (GatedAttentionConfig(num_heads=4), MLPConfig()),
    "hope_attention": (AttentionConfig(num_heads=4), MLPConfig(periods=(1, 4))),
    "titans": (TitansConfig(**TITANS), MLPConfig()),
}
MESHES = {
    "data8": MeshConfig(data=8),
    "fsdp8": MeshConfig(data=1, fsdp=8),
    "data2-fsdp2-tensor2": MeshConfig(data=2, fsdp=2, tensor=2),
    "sequence4-tensor2": MeshConfig(data=1, sequence=4, tensor=2),
}


def run_config(name: str, mesh: MeshConfig) -> RunConfig:
    mixer, mlp = MIXERS[name]
    widths = (80, 48) if name == "titans" else (80, 80, 32)  # a scan, and a layer by itself
    return RunConfig(
        model=ModelConfig(
            vocab_size=64,
            num_layers=len(widths),
            d_model=32,
            mlp_width=64,
            taper=TaperConfig(schedule="explicit", widths=widths),
            mixer=mixer,
            mlp=mlp,
            compute_dtype="float32",
        ),
        data=DataConfig(seq_len=64, batch_size=8),
        optimizer=OptimizerConfig(warmup_steps=2),
        training=TrainingConfig(num_steps=10, loss_chunk=16),
        mesh=mesh,
    )


def batch() -> dict[str, np.ndarray]:
    """Rows with two documents and some padding."""
    return batches.batch([[27, 33]] * 8, 64, vocab=64)


def loss_and_gradients(config: RunConfig, num_devices: int) -> tuple[float, Any, Any]:
    """The mean loss, its gradients and a fresh training state, all on the config's mesh."""
    model = skeleton(config.model)
    mesh = mesh_lib.make_mesh(config, jax.devices()[:num_devices])
    tx = make_optimizer(config.optimizer, 10, About.of(model), config.model.mlp)
    shardings = step.state_shardings(model, tx, mesh)

    def loss(params: Any, data: dict[str, jax.Array]) -> jax.Array:
        tokens = jnp.sum(data["document_ids"] > 0)
        return training_loss(model, params, data, tokens, chunk=16, z_loss=1e-4)[0]

    with jax.set_mesh(mesh):
        init = jax.jit(lambda key: step.init_state(model, tx, key), out_shardings=shardings)
        state = init(jax.random.key(0))
        run = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings.params))
        value, grads = run(state.params, sharding.to_devices(batch(), mesh))
    return float(value), grads, state


@pytest.fixture(scope="module")
def one_device() -> dict[str, tuple[float, Any, Any]]:
    return {}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(  # one worker runs all meshes of one, for they share what one device does
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in MIXERS]
)
def test_loss_and_gradients_equal_one_device(name: str, mesh: str, one_device: dict) -> None:
    config = run_config(name, MESHES[mesh])
    if MESHES[mesh].sequence > 1 and not config.model.mixer.splits_sequence:
        with pytest.raises(UserError, match=r"sequence=4: Titans .* cannot split it"):
            mesh_lib.make_mesh(config)
        return
    if name not in one_device:
        one_device[name] = loss_and_gradients(run_config(name, MeshConfig()), 1)
    loss, grads, _ = one_device[name]
    found, found_grads, state = loss_and_gradients(config, 8)
    assert found == pytest.approx(loss, abs=1e-5)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found_grads), jax.tree.leaves(grads), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=str(path))
    parts = MESHES[mesh].fsdp * MESHES[mesh].tensor
    # Norms' scales lie on every device, and of Titans the convolutions and memories at the start
    # are split by heads only: much of a model as small as this one.
    most = 2 if name == "titans" else 1.25
    for tree in (state.params, state.opt_state):
        assert total_bytes(tree) <= bytes_per_device(tree) * parts
        assert bytes_per_device(tree) <= total_bytes(tree) / parts * most


def bytes_per_device(tree: Any) -> int:
    """Bytes on the first device."""
    first = jax.devices()[0]
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    shards = [
        s.data.nbytes for leaf in leaves for s in leaf.addressable_shards if s.device == first
    ]
    return sum(shards)


def total_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def golden_text() -> str:
    """Where each parameter of the first layer of each architecture lies, by logical names."""
    lines = []
    sizes = {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 2}
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 4)
    for name in ARCHITECTURES:
        model = skeleton(load_config(f"{ROOT}/configs/tlm_440m.py:{name}").model)
        where = sharding.param_shardings(model.shapes, model.logical_axes, mesh)
        lines.append(f"{name}, 440M, mesh {sizes}")
        for path, spec in jax.tree_util.tree_leaves_with_path(where):
            words = [str(key.key) for key in path]
            if words[0] == "segments" and words[1] != "000":
                continue
            shape = model.shapes
            for word in words:
                shape = shape[word]
            axes = ["+".join(a) if isinstance(a, tuple) else a or "-" for a in spec.spec]
            sizes_text = " x ".join(str(n) for n in shape.shape)
            lines.append(f"  {'/'.join(words):44} {sizes_text:24} {' '.join(axes)}")
    return "\n".join(lines) + "\n"


def test_shardings_are_those_that_were_reviewed() -> None:
    """TLM_UPDATE_GOLDEN=1 writes the file anew; look at its diff."""
    text = golden_text()
    if os.environ.get("TLM_UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_a_mesh_that_does_not_fit_is_one_clear_line() -> None:
    config = run_config("transformer", MeshConfig())

    def fails(mesh: MeshConfig, match: str) -> None:
        with pytest.raises(UserError, match=match):
            mesh_lib.make_mesh(dataclasses.replace(config, mesh=mesh))

    fails(MeshConfig(data=3), r"mesh data=3 needs 3 devices, and there are 8; set one size to -1")
    fails(
        MeshConfig(fsdp=16), r"mesh data=-1 fsdp=16 needs a multiple of 16 devices, and there are 8"
    )
    fails(MeshConfig(data=1, sequence=8, tensor=2), r"needs 16 devices, and there are 8")
    short = dataclasses.replace(config, data=DataConfig(seq_len=60, batch_size=8), training=TrainingConfig(loss_chunk=0))  # fmt: skip  # noqa: E501
    with pytest.raises(UserError, match=r"data.seq_len=60 .* sequence=8; use 64"):
        mesh_lib.make_mesh(dataclasses.replace(short, mesh=MeshConfig(data=1, sequence=8)))


def test_widths_that_do_not_divide_name_a_schedule_that_fits() -> None:
    """Whatever is suggested is then taken."""
    config = run_config("transformer", MeshConfig(data=1, tensor=8))
    mixer = AttentionConfig(num_heads=8)

    def message(**model: Any) -> str:
        changed = dataclasses.replace(config.model, mixer=mixer, **model)
        with pytest.raises(UserError) as error:
            mesh_lib.make_mesh(dataclasses.replace(config, model=changed))
        return str(error.value)

    tapered = {"num_layers": 4, "mlp_width": 72, "taper": TaperConfig(multiple_of=4)}
    found = message(**tapered)
    assert found == (
        "segment 0 (from layer 0): MLP width 108 does not divide over mesh tensor=8; "
        "use --model.taper.multiple_of 8, or a smaller mesh.tensor"
    )
    fits = tapered | {"taper": TaperConfig(multiple_of=8)}
    model = dataclasses.replace(config.model, mixer=mixer, **fits)
    assert mesh_lib.make_mesh(dataclasses.replace(config, model=model)).shape["tensor"] == 8
    explicit = TaperConfig(schedule="explicit", widths=(68, 64, 60), multiple_of=4)
    assert "; use widths=(64, 64, 64)" in message(num_layers=3, mlp_width=64, taper=explicit)
    uniform = TaperConfig(schedule="uniform")
    assert "; use --model.mlp_width 64, or" in message(num_layers=3, mlp_width=60, taper=uniform)
    narrow = message(num_layers=3, mlp_width=20, taper=TaperConfig(multiple_of=4))
    assert "use --model.taper.multiple_of 8 (" in narrow


def test_slices_are_joined_along_the_data_axis_only() -> None:
    """Devices as a two-slice pod describes them; each slice holds whole copies of the model."""

    @dataclasses.dataclass(frozen=True)
    class Chip:
        id: int
        slice_index: int
        process_index: int
        platform: str = "gpu"
        device_kind: str = "fake"

    chips = [Chip(id=i, slice_index=i // 4, process_index=i // 4) for i in range(8)]
    placed = mesh_lib._over_slices((4, 2, 1, 1), chips, 2)
    assert placed.shape == (4, 2, 1, 1)
    assert [{c.slice_index for c in row.ravel()} for row in placed] == [{0}, {0}, {1}, {1}]
    with pytest.raises(UserError, match=r"data=1 does not divide over 2 slices.*data=2"):
        mesh_lib._over_slices((1, 8, 1, 1), chips, 2)

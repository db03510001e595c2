"""What a train step on a CPU needs: loops or not, the order of gradients, freed memory."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tlm_jax.config import (
    AttentionConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    TaperConfig,
)
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.models import skeleton
from tlm_jax.models.settings import scans_layers
from tlm_jax.training import aot, memory, step, updates

UNIFORM = ModelConfig(
    vocab_size=64,
    num_layers=6,
    d_model=64,
    mlp_width=256,
    taper=TaperConfig(schedule="uniform"),
    mixer=AttentionConfig(num_heads=2),
    remat="none",
)
RUN = RunConfig(model=UNIFORM, data=DataConfig(seq_len=128, batch_size=8))


@pytest.mark.parametrize(
    ("scan_layers", "remat", "loops"),
    [(None, "none", False), (None, "full", True), (True, "none", True), (False, "full", False)],
)
def test_layers_are_a_loop_where_it_pays(scan_layers: bool | None, remat: str, loops: bool) -> None:
    config = dataclasses.replace(UNIFORM, scan_layers=scan_layers, remat=remat)
    model = skeleton(config)
    ids = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    program = jax.make_jaxpr(lambda p, x: model.merge(p)(x)[0])(model.shapes, ids)
    assert scans_layers(config) == loops
    assert any(e.primitive.name == "scan" for e in program.eqns) == loops


def test_a_tpu_scans_unless_told_not_to() -> None:
    """Whatever machine compiles for it."""
    assert aot.for_devices(RUN).model.scan_layers is True
    unrolled = dataclasses.replace(RUN, model=dataclasses.replace(UNIFORM, scan_layers=False))
    assert aot.for_devices(unrolled).model.scan_layers is False


def test_global_norm_and_clipping_are_optax_s() -> None:
    rng = np.random.default_rng(0)
    grads = {n: rng.normal(size=(5, s)).astype("float32") for n, s in (("a", 3), ("b", 70))}
    np.testing.assert_allclose(updates.global_norm(grads), optax.global_norm(grads), rtol=1e-6)
    for most in (0.1, 1e3):
        ours, _ = updates.clip_by_global_norm(most).update(grads, optax.EmptyState())
        theirs, _ = optax.clip_by_global_norm(most).update(grads, optax.EmptyState())
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_gradients_are_made_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the norm in the tree's order, all wait for the embedding's: a fifth more memory."""
    taper = TaperConfig(schedule="linear", multiple_of=16)
    tapered = dataclasses.replace(UNIFORM, num_layers=4, taper=taper)
    config = dataclasses.replace(RUN, model=tapered)
    model, mesh = skeleton(config.model), mesh_lib.device_mesh(MeshConfig(data=1, fsdp=1))

    def temporary() -> int:
        tx = updates.make_optimizer(config.optimizer, 10, updates.About.of(model))
        program = step.lower_train_step(config, model, tx, mesh).compile()
        return int(program.memory_analysis().temp_size_in_bytes)

    ours = temporary()
    monkeypatch.setattr(step, "global_norm", optax.global_norm)
    monkeypatch.setattr(updates, "clip_by_global_norm", optax.clip_by_global_norm)
    assert ours < 0.83 * temporary()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_goes_back_to_the_system() -> None:
    """A process frees 200 MB below a block that it keeps, which the C library alone would hold."""
    script = """
import ctypes, pathlib
from tlm_jax.training.allocator import release_freed_memory
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [c.malloc(65536) for _ in range(3200)]
for block in blocks: ctypes.memset(block, 1, 65536)
def resident():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
for block in blocks[:-1]: c.free(block)
before = resident()
release_freed_memory()
print(before - resident())
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(out.stdout) > 150_000  # KiB


def test_attention_by_cudnn_is_planned_where_there_is_none() -> None:
    model = dataclasses.replace(UNIFORM, attention_kernel="cudnn")
    assert memory.step_memory(dataclasses.replace(RUN, model=model)).total > 0

"""Programs for each kind of batch: the right one is compiled when it is needed, and used."""

import dataclasses
import io
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from tlm_jax.config import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.distributed.sharding import to_devices
from tlm_jax.ops import _gpu, attention
from tlm_jax.training import metrics
from tlm_jax.training.loop import Trainer
from tlm_jax.training.programs import TrainStep

CONFIG = RunConfig(
    model=ModelConfig(
        vocab_size=257,
        num_layers=2,
        d_model=16,
        mlp_width=32,
        mixer=AttentionConfig(num_heads=2),
        compute_dtype="float32",
    ),
    data=DataConfig(tokenizer="bytes", seq_len=64, batch_size=8),
    optimizer=OptimizerConfig(warmup_steps=1),
    training=TrainingConfig(num_steps=12, log_every=1, loss_chunk=64, sample_tokens=0),
)


@pytest.fixture
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """For cuDNN's kernels, which run nowhere here: plain products with the documents that they
    are told of."""

    def causal(q, k, v, begins_BL):  # type: ignore[no-untyped-def]
        return attention._xla(q, k, v, jnp.ones_like(begins_BL, jnp.int32), window=None)

    def packed(q, k, v, begins_BL, *, most):  # type: ignore[no-untyped-def]
        number = jnp.cumsum(begins_BL, axis=1)
        return attention._xla(q, k, v, jnp.minimum(number, most), window=None)

    monkeypatch.setattr(_gpu, "_causal", causal)
    monkeypatch.setattr(_gpu, "_packed", packed)


@pytest.mark.usefixtures("_stand_ins")
def test_each_batch_goes_to_the_program_of_its_documents(tmp_path: pathlib.Path) -> None:
    """Losses are those of plain attention; each kind is compiled once, when it first comes."""
    text = tmp_path / "text.jsonl"
    documents = ["x" * 3000, *map(chr, range(97, 400)), *(f"{n} long" * 20 for n in range(20))]
    text.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
    losses, logs = {}, {}
    for kernel in ("cudnn", "xla"):
        config = dataclasses.replace(
            CONFIG,
            model=dataclasses.replace(CONFIG.model, attention_kernel=kernel),
            data=dataclasses.replace(CONFIG.data, path=str(text)),
        )
        log = io.StringIO()
        Trainer(config, tmp_path / kernel, Console(file=log, width=200)).run()
        found = metrics.records(tmp_path / kernel)
        losses[kernel] = [r["loss"] for r in found if r["kind"] == "train"]
        logs[kernel] = [line for line in log.getvalue().splitlines() if "Compiled" in line]
    np.testing.assert_allclose(losses["cudnn"], losses["xla"], rtol=1e-5)
    compiled = [line.partition(" for ")[2].partition(" in ")[0] for line in logs["cudnn"]]
    assert sorted(compiled) == ["one document", "up to 32 documents"]
    assert len(logs["xla"]) == 1


@pytest.mark.parametrize(("documents", "kind"), [(1, 0), (2, 1), (40, 2)])
def test_several_processes_look_at_the_rows_of_all(
    documents: int, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row of eight decides, whichever device has it; each process knows only its own rows."""
    ids = np.ones((8, 64), np.int32)
    ids[7] = 1 + np.arange(64) * documents // 64
    mesh = mesh_lib.make_mesh(CONFIG)
    placed = to_devices({"document_ids": ids}, mesh)
    train_step = TrainStep(lambda _: pytest.fail("nothing to compile"), "cudnn", 64, print)
    mine = {"document_ids": np.ones_like(ids)}
    assert train_step.kind({"document_ids": ids}, placed) == kind
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with jax.set_mesh(mesh):
        assert train_step.kind(mine, placed) == kind

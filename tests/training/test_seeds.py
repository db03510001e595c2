"""Seeds in one program: each is what it would be alone."""

import dataclasses
import functools
import json
import math
import pathlib

import batches
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from tlm_jax import config_io
from tlm_jax.config import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TaperConfig,
    TrainingConfig,
    UserError,
)
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.distributed.sharding import to_devices
from tlm_jax.mixers import GatedAttentionConfig, MixerConfig, TitansConfig
from tlm_jax.mlp import MLPConfig
from tlm_jax.models import skeleton
from tlm_jax.training import checkpoint, seeds, step
from tlm_jax.training.updates import About, make_optimizer

MIXERS: dict[str, tuple[MixerConfig, MLPConfig]] = {
    "transformer": (AttentionConfig(num_heads=2), MLPConfig()),
    "gated_attention": (GatedAttentionConfig(num_heads=2), MLPConfig()),
    "hope_attention": (AttentionConfig(num_heads=2), MLPConfig(periods=(1, 2))),
    "titans": (TitansConfig(num_heads=2, memory_width=8, chunk=8, window=8), MLPConfig()),
}
SEEDS = (3, 11)


def run_config(name: str) -> RunConfig:
    mixer, mlp = MIXERS[name]
    return RunConfig(
        model=ModelConfig(
            vocab_size=64,
            num_layers=1,
            d_model=32,
            mlp_width=64,
            taper=TaperConfig(schedule="uniform"),
            mixer=mixer,
            mlp=mlp,
            compute_dtype="float32",
        ),
        data=DataConfig(seq_len=16, batch_size=4),
        # A large eps: without it AdamW turns rounding noise in tiny gradients into full steps.
        optimizer=OptimizerConfig(warmup_steps=2, eps=1e-3),
        training=TrainingConfig(num_steps=10, loss_chunk=8),
    )


@pytest.mark.parametrize("name", MIXERS)
def test_steps_of_seeds_together_are_those_apart(name: str) -> None:
    """Three steps on batches of their own: parameters, moments and metrics, and the start."""
    config = run_config(name)
    model, mesh = skeleton(config.model), mesh_lib.single_device_mesh()
    tx = make_optimizer(config.optimizer, 10, About.of(model), config.model.mlp)
    data = {
        seed: [batches.batch([[7, 6]] * 4, 16, vocab=64, seed=seed + n) for n in range(3)]
        for seed in SEEDS
    }
    init = functools.partial(step.init_state, model, tx)
    with jax.set_mesh(mesh):
        alone = step.lower_train_step(config, model, tx, mesh).compile()
        apart = []
        for seed in SEEDS:
            state = start = jax.jit(init)(jax.random.key(seed))
            start = jax.tree.map(jnp.copy, start)
            for batch in data[seed]:
                state, metrics = alone(state, to_devices(batch, mesh))
            apart.append((start, state, metrics))
        keys = jnp.stack([jax.random.key(seed) for seed in SEEDS])
        state = start = jax.jit(jax.vmap(init))(keys)
        start = jax.tree.map(jnp.copy, start)
        both = step.lower_train_step(config, model, tx, mesh, seeds=len(SEEDS)).compile()
        for pair in zip(*data.values(), strict=True):
            batch = {key: np.stack([one[key] for one in pair]) for key in pair[0]}
            state, metrics = both(state, jax.device_put(batch))
    together = jax.device_get((start, state, metrics))
    for place, one in enumerate(jax.device_get(apart)):
        jax.tree.map(
            lambda a, b, place=place: np.testing.assert_allclose(b[place], a, atol=2e-6, rtol=1e-5),
            one,
            together,
        )


@pytest.mark.parametrize(
    ("target", "dtype", "kernel", "refused"),
    [
        ("gpu", "bfloat16", "auto", True),
        ("gpu", "bfloat16", "chunked", False),
        ("gpu", "float32", "auto", False),
        ("tpu", "bfloat16", "auto", False),
    ],
)
def test_a_kernel_that_chooses_by_the_batch_is_refused(target, dtype, kernel, refused) -> None:
    config = run_config("transformer")
    model = dataclasses.replace(config.model, compute_dtype=dtype, attention_kernel=kernel)
    config = dataclasses.replace(config, model=model)
    if not refused:
        seeds.require_mappable(config, target)
        return
    with pytest.raises(UserError, match=r'cudnn; set model\.attention_kernel to "chunked"'):
        seeds.require_mappable(config, target)


class _Position:
    """Of an iterator."""

    def get_state(self) -> dict[str, object]:
        return {}

    def set_state(self, state: dict[str, object]) -> None:
        self.state = state


def test_a_seed_that_fails_fails_alone(
    finished_run: pathlib.Path,
    config_file: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seed 1 starts with a parameter that is not finite; seed 0 is the run that all tests share.

    Its records and its checkpoint are those of that run.
    """
    base = config_io.load_config(config_file)
    training = dataclasses.replace(base.training, max_bad_steps=3)
    base = dataclasses.replace(base, training=training)
    configs = [
        dataclasses.replace(base, seed=seed, data=dataclasses.replace(base.data, seed=seed))
        for seed in (1, 0)
    ]
    with pytest.raises(UserError, match="on one device, and there are 8"):
        seeds.train(configs, [tmp_path / "a", tmp_path / "b"], Console())
    monkeypatch.setattr(mesh_lib, "make_mesh", lambda _: mesh_lib.single_device_mesh())
    whole = step.init_state

    def poisoned(model, tx, key):  # type: ignore[no-untyped-def]
        bad = jax.random.key_data(key)[1] == 1
        state = whole(model, tx, key)
        params = jax.tree.map(lambda leaf: jnp.where(bad, jnp.nan, leaf), state.params)
        return dataclasses.replace(state, params=params)

    monkeypatch.setattr(step, "init_state", poisoned)
    bad, good = folders = [tmp_path / "cell-1", tmp_path / "cell-0"]
    failed = seeds.train(configs, folders, Console())
    assert list(failed) == [bad]
    assert failed[bad].startswith("stopped at step 3: the loss or its gradient was not")
    assert not list((bad / "checkpoints").iterdir())

    mine, theirs = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (good, finished_run)
    )
    assert [(row["kind"], row["step"]) for row in mine] == [
        (row["kind"], row["step"]) for row in theirs
    ]
    measured = {"tokens_per_second", "mfu", "goodput", "checksum"}
    for row, other in zip(mine, theirs, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - measured - {"kind"}:
            assert math.isclose(row[name], other[name], rel_tol=1e-4, abs_tol=1e-6), (row, other)

    model = skeleton(base.model)
    tx = make_optimizer(base.optimizer, base.training.num_steps, About.of(model))
    shapes = step.abstract_state(model, tx, mesh_lib.single_device_mesh())
    saved = []
    for folder in (good, finished_run):
        position = _Position()
        with checkpoint.Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
            state, metadata = checkpoints.restore(20, shapes, position), checkpoints.metadata(20)
        facts = ("param_shapes", "data_layout", "mlp_widths", "tokens")
        saved.append((state, position.state, {name: metadata[name] for name in facts}))
    assert saved[0][1:] == saved[1][1:]
    for ours, reference in zip(*(jax.tree.leaves(one[0]) for one in saved), strict=True):
        np.testing.assert_allclose(ours, reference, atol=1e-4)

"""Levels of an MLP chain that are updated every few steps, against AdamW written by hand."""

import dataclasses
import pathlib
from typing import Any

import batches
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tlm_jax.config import (
    AttentionConfig,
    DataConfig,
    MeshConfig,
    MLPConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TaperConfig,
    TrainingConfig,
)
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.distributed.sharding import to_devices
from tlm_jax.models import skeleton
from tlm_jax.training import checkpoint, memory, step
from tlm_jax.training.updates import (
    About,
    clip_by_global_norm,
    learning_rate,
    make_optimizer,
    update_period,
)

# One worker runs them all, for they share compiled programs.
pytestmark = pytest.mark.xdist_group("periodic")

PERIODS = (4, 1, 2)
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=3, eps=1e-3, clip_norm=0.5
)
CONFIG = RunConfig(
    model=ModelConfig(
        vocab_size=32,
        num_layers=1,
        d_model=16,
        mlp_width=48,
        taper=TaperConfig(schedule="uniform"),
        mlp=MLPConfig(periods=PERIODS),
        mixer=AttentionConfig(num_heads=2),
        remat="none",
        compute_dtype="float32",
    ),
    data=DataConfig(seq_len=8, batch_size=8),
    optimizer=OPTIMIZER,
    training=TrainingConfig(num_steps=12),
)


def toy(seed: int, scale: float = 1.0):
    """A tree of the paths that a model of one segment has."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return scale * rng.standard_normal(shape, np.float32)

    def level():
        return {"gate": draw(2, 3, 4), "norm": {"scale": draw(2, 3)}}

    mixer = {"mlp": {"0": {"gate": draw(2, 2)}}}  # a mixer's own parts are no levels
    block = {"mixer": mixer, "mlp": {str(i): level() for i in range(3)}}
    return {"embedding": draw(5, 3), "segments": {"000": block}}


DECAYS = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", toy(0))
ABOUT = About(decays=DECAYS, logical_axes=None)


def adamw_by_hand(params, gradients, period_rate):
    """The parameters after each step, in float64, leaf by leaf."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    values, tree = jax.tree.flatten(params)
    values = [np.asarray(v, np.float64) for v in values]
    decays = jax.tree.leaves(DECAYS)
    moments = [[0.0, 0.0, 0, 0.0] for _ in values]  # mu, nu, updates, sum of gradients
    history = []
    schedule = learning_rate(OPTIMIZER, 12)
    for index, gradient in enumerate(gradients):
        leaves = [np.asarray(g, np.float64) for g in jax.tree.leaves(gradient)]
        norm = np.sqrt(sum(np.sum(g**2) for g in leaves))
        for i, path in enumerate(paths):
            mu, nu, updates, total = moments[i]
            total = total + leaves[i] * min(1.0, OPTIMIZER.clip_norm / norm)
            period = update_period(path, PERIODS)
            if (index + 1) % period == 0:
                g, total, updates = total / period, 0.0, updates + 1
                mu = OPTIMIZER.beta1 * mu + (1 - OPTIMIZER.beta1) * g
                nu = OPTIMIZER.beta2 * nu + (1 - OPTIMIZER.beta2) * g**2
                direction = (mu / (1 - OPTIMIZER.beta1**updates)) / (
                    np.sqrt(nu / (1 - OPTIMIZER.beta2**updates)) + OPTIMIZER.eps
                )
                direction = direction + OPTIMIZER.weight_decay * decays[i] * values[i]
                rate = float(schedule(index)) * (period if period_rate == "times_period" else 1)
                values[i] = values[i] - rate * direction
            moments[i] = [mu, nu, updates, total]
        history.append(jax.tree.unflatten(tree, list(values)))
    return history


@pytest.mark.parametrize("period_rate", ["schedule", "times_period"])
def test_each_level_follows_adamw_on_the_mean_of_its_period(period_rate: Any):
    """Values, clipping by the whole norm, bias correction, decay and the run's schedule."""
    mlp = MLPConfig(periods=PERIODS, period_rate=period_rate)
    params = start = toy(0)
    # Norms on both sides of the clip, so that parts of a period are clipped and others are not.
    gradients = [toy(i + 1, scale=0.02 if i % 3 else 1.0) for i in range(9)]
    tx = make_optimizer(OPTIMIZER, 12, ABOUT, mlp)
    state, update = tx.init(params), jax.jit(tx.update)
    before = params
    for index, (gradient, expected) in enumerate(
        zip(gradients, adamw_by_hand(start, gradients, period_rate), strict=True)
    ):
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        for (path, value), old, wanted in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(before),
            jax.tree.leaves(expected),
            strict=True,
        ):
            name = f"step {index + 1}, {jax.tree_util.keystr(path)}"
            changes = (index + 1) % update_period(path, PERIODS) == 0
            assert (value != old).any() == changes, name
            np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6, err_msg=name)
        before = params


def test_only_levels_have_a_period():
    paths = {
        jax.tree_util.keystr(path, simple=True, separator="/"): update_period(path, PERIODS)
        for path, _ in jax.tree_util.tree_leaves_with_path(skeleton(CONFIG.model).shapes)
    }
    assert {p for p in paths if paths[p] == 4} == {p for p in paths if "/mlp/0/" in p}
    assert {p for p in paths if paths[p] == 2} == {p for p in paths if "/mlp/2/" in p}
    assert sum(p == 4 for p in paths.values()) == 4  # norm, gate, up and down of one segment
    toy_periods = [update_period(p, (7, 7, 7)) for p, _ in _leaves(toy(0))]
    assert sorted(toy_periods) == [1, 1] + [7] * 6


def test_a_slow_level_moves_a_period_th_of_the_sum_of_steps_or_all_of_it():
    """Four equal gradients: AdamW moves a level of period 1 by four rates, one of period 4 by one.

    The other reading of eq. 71 moves both alike; the optimizer's state has the same tree.
    """
    tree = jax.tree.map(np.ones_like, toy(0))
    config = dataclasses.replace(OPTIMIZER, weight_decay=0.0, warmup_steps=0, eps=1e-12)
    moved, structures = {}, []
    for period_rate in ("schedule", "times_period"):
        mlp = MLPConfig(periods=PERIODS, period_rate=period_rate)
        tx = make_optimizer(config, 10_000, ABOUT, mlp)
        state, params, update = tx.init(tree), tree, jax.jit(tx.update)
        for _ in range(4):
            updates, state = update(tree, state, params)
            params = jax.tree.map(np.add, params, updates)
        levels = params["segments"]["000"]["mlp"]
        moved[period_rate] = [1 - float(levels[str(i)]["gate"][0, 0, 0]) for i in range(3)]
        structures.append(jax.tree.structure(state))
    rate = config.learning_rate
    np.testing.assert_allclose(moved["schedule"], [rate, 4 * rate, 2 * rate], rtol=1e-3)
    np.testing.assert_allclose(moved["times_period"], [4 * rate] * 3, rtol=1e-3)
    assert structures[0] == structures[1]


def _leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def test_period_one_everywhere_is_plain_adamw_to_the_last_bit():
    plain = optax.chain(
        clip_by_global_norm(OPTIMIZER.clip_norm),
        optax.adamw(
            learning_rate(OPTIMIZER, 12),
            b1=OPTIMIZER.beta1,
            b2=OPTIMIZER.beta2,
            eps=OPTIMIZER.eps,
            weight_decay=OPTIMIZER.weight_decay,
            mask=DECAYS,
        ),
    )
    results = []
    levels = (MLPConfig(periods=periods) for periods in ((1,), (1, 1, 1)))
    ours = (make_optimizer(OPTIMIZER, 12, ABOUT, mlp) for mlp in levels)
    for tx in (plain, *ours):
        params = toy(0)
        state, update = tx.init(params), jax.jit(tx.update)
        for index in range(3):
            updates, state = update(toy(index + 1), state, params)
            params = optax.apply_updates(params, updates)
        results.append((params, state))
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[2])
    for a, b, c in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


class Run:
    """A compiled train step on some devices."""

    def __init__(self, mesh: MeshConfig, num_devices: int):
        config = dataclasses.replace(CONFIG, mesh=mesh)
        self.model = skeleton(config.model)
        steps, about = config.training.num_steps, About.of(self.model)
        self.tx = make_optimizer(config.optimizer, steps, about, config.model.mlp)
        self.mesh = mesh_lib.make_mesh(config, jax.devices()[:num_devices])
        self.shardings = step.state_shardings(self.model, self.tx, self.mesh)
        self._step = jax.jit(
            step.make_train_step(config, self.model, self.tx),
            out_shardings=(self.shardings, None),
            compiler_options={"xla_backend_optimization_level": 0},  # compiles twice as fast
        )

    def init(self) -> step.TrainState:
        """Parameters of our own: some of an initialiser's would be zero or one."""
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda a: jnp.asarray(0.3 * rng.standard_normal(a.shape, np.float32)),
            self.model.shapes,
        )
        fresh = step.init_state(self.model, self.tx, jax.random.key(0))
        return dataclasses.replace(fresh, params=params, opt_state=self.tx.init(params))

    def __call__(self, state: step.TrainState, index: int) -> step.TrainState:
        with jax.set_mesh(self.mesh):
            return self._step(state, to_devices(batch(index), self.mesh))[0]

    def states(self, start: step.TrainState, steps: int) -> list[step.TrainState]:
        states = [jax.device_put(start, self.shardings)]
        for index in range(steps):
            states.append(self(states[-1], index))
        return states


def batch(seed: int) -> dict[str, np.ndarray]:
    return batches.batch([[8]] * 8, 8, vocab=32, seed=seed)


@pytest.fixture(scope="module")
def run() -> Run:
    return Run(MeshConfig(), 1)


@pytest.fixture(scope="module")
def states(run: Run) -> list[step.TrainState]:
    return run.states(run.init(), 8)


def levels(state: step.TrainState) -> list[np.ndarray]:
    return [np.asarray(state.params["segments"]["000"]["mlp"][str(i)]["up"]) for i in range(3)]


def test_a_model_in_training_changes_its_levels_at_their_periods(states):
    for level, period in enumerate(PERIODS):
        changed = [
            index
            for index in range(1, 9)
            if (levels(states[index])[level] != levels(states[index - 1])[level]).any()
        ]
        assert changed == list(range(period, 9, period)), f"level {level}"


def test_the_sum_of_a_period_is_kept_only_for_slow_levels(run: Run):
    """Accumulators cost memory, which the plan counts."""
    shapes = jax.eval_shape(run.init)
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes.opt_state))
    assert 4 * size == memory.step_memory(CONFIG, target="cpu").optimizer
    assert size > 2 * sum(leaf.size for leaf in jax.tree.leaves(shapes.params))


def test_a_non_finite_step_is_no_part_of_a_period(run: Run, states):
    """After the bad step everything is as before, and the period goes on from there."""
    state = states[2]
    scale = state.params["final_norm"]["scale"]
    broken = state.params | {"final_norm": {"scale": scale.at[0].set(jnp.nan)}}
    bad = run(dataclasses.replace(state, params=broken), 5)
    assert int(bad.skipped) == 1
    for a, b in zip(*(jax.tree.leaves(s.opt_state) for s in (bad, state)), strict=True):
        np.testing.assert_array_equal(a, b)
    state = dataclasses.replace(bad, params=state.params)
    for index in (2, 3):
        state = run(state, index)
    for a, b in zip(*(jax.tree.leaves(s.params) for s in (state, states[4])), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_resumed_within_a_period_is_the_same_to_the_last_bit(
    run: Run, states, tmp_path: pathlib.Path
):
    """The accumulated gradients are in the checkpoint."""
    data = grain.MapDataset.range(4).to_iter_dataset()
    with jax.set_mesh(run.mesh):
        with checkpoint.Checkpoints(tmp_path) as saved:
            saved.save(6, states[6], iter(data), {})
            saved.wait()
        shapes = jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
            jax.eval_shape(run.init),
            run.shardings,
        )
        with checkpoint.Checkpoints(tmp_path) as saved:
            state = saved.restore(6, shapes, iter(data))
    assert jax.tree.structure(state) == jax.tree.structure(states[6])
    for index in (6, 7):
        state = run(state, index)
    for (path, a), b in zip(_leaves(state), jax.tree.leaves(states[8]), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(path))


def test_eight_devices_equal_one(states):
    """Values, and accumulators and moments that lie where their parameters lie."""
    eight = Run(MeshConfig(data=2, fsdp=2, tensor=2), 8)
    state = eight.states(states[0], 5)[-1]
    for (path, a), b in zip(_leaves(state.params), jax.tree.leaves(states[5].params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=str(path))
    gate = state.params["segments"]["000"]["mlp"]["0"]["gate"]
    assert {shard.data.shape for shard in gate.addressable_shards} == {(1, 8, 8)}
    found = [
        leaf
        for path, leaf in _leaves(state.opt_state)
        if jax.tree_util.keystr(path).endswith("['mlp']['0']['gate']")
    ]
    assert len(found) == 3  # the mean gradient and two moments
    assert all(leaf.sharding == gate.sharding for leaf in found)

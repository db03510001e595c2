"""What every mixer must satisfy, as checks for a user's own test suite.

    from tlm_jax.testing import check_mixer

    def test_my_mixer():
        check_mixer(MyMixerConfig(width=24))

Each check builds a small float32 model around the mixer, two tapered layers of it (the checks of
scans, training and sharding take equal ones), and raises an `AssertionError` that says what does
not hold. The check of sharding needs 8 devices, which a CPU simulates: `check_mixer` asks for them
if jax has not been used before, else set JAX_NUM_CPU_DEVICES=8.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from tlm_jax import config_io, costs
from tlm_jax.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TaperConfig,
    TrainingConfig,
)
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.distributed import sharding
from tlm_jax.mixers import MixerConfig
from tlm_jax.models import skeleton
from tlm_jax.training import step
from tlm_jax.training.updates import About, make_optimizer

VOCAB = 64
_TOLERANCE = 1e-4
_DEVICES = 8


def check_mixer(config: MixerConfig, *, d_model: int = 32, mlp_width: int = 64) -> None:
    """Runs all `CHECKS` on a model of two layers whose mixer is `config`.

    Args:
      config: the mixer; small, for the checks run on a CPU too.
      d_model: width of the residual stream; must suit the mixer.
      mlp_width: mean MLP width.

    Raises:
      AssertionError: a check fails; the message names it.
    """
    model = ModelConfig(
        vocab_size=VOCAB,
        num_layers=2,
        d_model=d_model,
        mlp_width=mlp_width,
        taper=TaperConfig(schedule="linear", multiple_of=mlp_width // 4),
        mixer=config,
        compute_dtype="float32",
    )
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        with contextlib.suppress(RuntimeError):  # jax has chosen its devices already
            jax.config.update("jax_num_cpu_devices", _DEVICES)
    for check in CHECKS:
        try:
            check(model)
        except AssertionError as error:
            what = (check.__doc__ or check.__name__).splitlines()[0]
            raise AssertionError(f"{check.__name__}: {what} {error}") from error


def tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Random int32 token ids (rows, length)."""
    return np.asarray(jax.random.randint(jax.random.key(seed), (rows, length), 0, VOCAB))


@functools.lru_cache(maxsize=2)  # the checks of a model share what they compile
def forward(config: ModelConfig) -> tuple[Callable[..., np.ndarray], Any]:
    """Compiled (params, ids, document_ids, positions) -> logits, and fresh parameters."""
    model = skeleton(config)

    @jax.jit
    def run(params: Any, ids: Any, document_ids: Any = None, positions: Any = None) -> jax.Array:
        built = model.merge(params)
        hidden, _ = built(ids, document_ids_BL=document_ids, positions_BL=positions)
        return built.logits(hidden)

    # Compared by NumPy: operation by operation, JAX compiles each.
    return lambda *inputs: np.asarray(run(*inputs)), model.init(jax.random.key(0))


def check_budget(config: ModelConfig) -> None:
    """A model and its uniform twin cost the same, and costs count the real parameters."""
    assert costs.twin_difference(config, 64) == {}
    for twin in (config, config.uniform_twin()):
        planned = costs.model_costs(twin, 64)
        assert planned.parameters == skeleton(twin).num_params, "parameters"
        assert planned.forward_flops <= planned.forward_flops_full, "causal FLOPs"


def check_causality(config: ModelConfig) -> None:
    """A token changes nothing before it, in other rows, or in other documents of its row."""
    run, params = forward(config)
    ids = tokens(2, 40)
    documents = np.array([[1] * 25 + [2] * 15] * 2, np.int32)
    positions = np.array([[*range(25), *range(15)]] * 2, np.int32)
    base = run(params, ids, documents, positions)
    other = ids.copy()
    other[0, 10] = (other[0, 10] + 1) % VOCAB
    late = run(params, other, documents, positions)
    np.testing.assert_array_equal(base[0, :10], late[0, :10], "tokens before it changed")
    np.testing.assert_array_equal(base[1], late[1], "another row changed")
    np.testing.assert_array_equal(base[0, 25:], late[0, 25:], "another document changed")
    changed = (base[0, 10:12] != late[0, 10:12]).any(axis=-1)  # further ones a window may hide
    assert changed.all(), "the token itself or the one after it did not change"


def check_documents(config: ModelConfig) -> None:
    """Two documents in a row, padding behind them, score as each does alone.

    Of mixers that say so (`masks_by_document`): others may count chunks from the start of a row.
    """
    if not all(mixer.masks_by_document for mixer in config.mixers):
        return
    run, params = forward(config)
    ids = tokens(1, 40)
    documents = np.array([[1] * 17 + [2] * 19 + [0] * 4], np.int32)
    positions = np.array([[*range(17), *range(19), *range(4)]], np.int32)
    packed = run(params, ids, documents, positions)
    for begin, end in ((0, 17), (17, 36)):
        alone = run(params, ids[:, begin:end])
        np.testing.assert_allclose(
            packed[:, begin:end], alone, rtol=_TOLERANCE, atol=_TOLERANCE, err_msg="not alike"
        )


def _gradients(config: ModelConfig) -> Callable[..., Any]:
    """Compiled (params, ids) -> (loss, gradients), on the current mesh."""
    model = skeleton(config)

    def loss(params: Any, ids: jax.Array) -> jax.Array:
        built = model.merge(params)
        return jnp.mean(jnp.square(jax.nn.log_softmax(built.logits(built(ids)[0]))))

    return jax.jit(jax.value_and_grad(loss))


@functools.lru_cache(maxsize=2)  # scans and sharding share it
def _scanned(config: ModelConfig) -> tuple[Any, Any, Callable[..., Any], Any]:
    """(model, parameters, `_gradients`, what they are) of the twin as a rematerialised scan."""
    twin = dataclasses.replace(config.uniform_twin(), scan_layers=True, remat="full")
    model, run = skeleton(twin), _gradients(twin)
    params = model.init(jax.random.key(0))
    return model, params, run, run(params, tokens(4, 32))


def check_scans(config: ModelConfig) -> None:
    """Loss and gradients of a rematerialised scan are those of a plain loop; all are used."""
    model, params, _, (value, grads) = _scanned(config)
    loop = _gradients(dataclasses.replace(model.config, scan_layers=False, remat="none"))
    other, plain = loop(params, tokens(4, 32))
    np.testing.assert_allclose(value, other, rtol=1e-5, err_msg="loss")
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(plain), strict=True
    ):
        name, scale = jax.tree_util.keystr(path), float(np.abs(b).max())
        assert np.isfinite(scale), f"gradient of {name} is not finite"
        assert scale > 0, f"{name} gets no gradient"
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * scale, err_msg=name)


def check_decoding(config: ModelConfig) -> None:
    """Tokens read with a cache, a prompt at once and then one by one, score as in one pass."""
    length, prompt = 96, 37
    run, params = forward(config)
    model, ids = skeleton(config), tokens(2, length)

    @functools.partial(jax.jit, static_argnames="prefill")
    def advance(ids: Any, start: Any, cache: Any, *, prefill: bool = False) -> Any:
        built = model.merge(params)
        positions = jnp.broadcast_to(start + jnp.arange(ids.shape[1]), ids.shape)
        hidden, cache = built(ids, positions_BL=positions, cache=cache, prefill=prefill)
        return built.logits(hidden), cache

    empty = model.merge(params).init_cache(2, length)
    first, cache = advance(ids[:, :prompt], 0, empty, prefill=True)
    parts = [np.asarray(first)]
    for index in range(prompt, length):
        part, cache = advance(ids[:, index : index + 1], index, cache)
        parts.append(np.asarray(part))
    decoded, full = np.concatenate(parts, axis=1), run(params, ids)
    np.testing.assert_allclose(decoded, full, rtol=_TOLERANCE, atol=_TOLERANCE)


def check_config(config: ModelConfig) -> None:
    """The config survives JSON, as in a checkpoint."""
    run = RunConfig(model=config)
    assert config_io.from_dict(config_io.to_dict(run)) == run


def check_training(config: ModelConfig) -> None:
    """100 updates in bfloat16 at a high rate: none is skipped, and the loss falls."""
    config = dataclasses.replace(config.uniform_twin(), compute_dtype="bfloat16")
    state, history = train(config, num_steps=100)
    assert int(state.skipped) == 0, "updates were skipped"
    assert np.isfinite(history).all(), "the loss is not finite"
    assert history[-1] < 0.5 * history[0], f"the loss went from {history[0]} to {history[-1]}"
    assert all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params))


def check_sharding(config: ModelConfig) -> None:
    """Loss and gradients on a mesh of data 2 x fsdp 2 x tensor 2 are those of one device."""
    if len(jax.devices()) < _DEVICES:
        raise RuntimeError(
            f"the check of sharding needs {_DEVICES} devices, and {len(jax.devices())} is too few; "
            f"set JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES={_DEVICES} before jax is imported"
        )
    model, params, run, one = _scanned(config)
    mesh = jax.make_mesh((2, 2, 1, 2), mesh_lib.AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.set_mesh(mesh):
        where = sharding.param_shardings(model.shapes, model.logical_axes, mesh)
        split_ids = jax.device_put(tokens(4, 32), sharding.token_sharding(mesh))
        many = run(jax.device_put(params, where), split_ids)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(many), jax.tree.leaves(one), strict=True
    ):
        scale = max(float(np.abs(b).max()), 1e-6)
        np.testing.assert_allclose(
            np.asarray(a), np.asarray(b), rtol=1e-3, atol=1e-4 * scale,
            err_msg=jax.tree_util.keystr(path),
        )  # fmt: skip


CHECKS: tuple[Callable[[ModelConfig], None], ...] = (
    check_config,
    check_budget,
    check_causality,
    check_documents,
    check_scans,
    check_decoding,
    check_training,
    check_sharding,
)


def train(model: ModelConfig, num_steps: int) -> tuple[Any, np.ndarray]:
    """The last training state and the losses of so many updates on one small batch."""
    config = RunConfig(
        model=model,
        data=DataConfig(seq_len=32, batch_size=4),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=10),
        training=TrainingConfig(num_steps=num_steps, loss_chunk=0),
    )
    structure = skeleton(model)
    tx = make_optimizer(config.optimizer, num_steps, About.of(structure), model.mlp)
    ids = tokens(4, 33)
    positions = np.tile(np.arange(32, dtype=np.int32), (4, 1))
    batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:], "positions": positions}
    batch["document_ids"] = np.ones_like(positions)
    update = jax.jit(step.make_train_step(config, structure, tx), donate_argnums=0)
    state = jax.jit(lambda key: step.init_state(structure, tx, key))(jax.random.key(0))
    losses = []
    for _ in range(num_steps):
        state, metrics = update(state, batch)
        losses.append(metrics["loss"])
    return state, np.stack(losses)

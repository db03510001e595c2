"""Training state and the train step, as pure functions.

Shapes: B batch, L length. A batch has int32 (B, L) arrays `inputs`, `targets`,
`positions` and `document_ids` (0 is padding, not scored).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from tlm_jax.config import RunConfig
from tlm_jax.distributed import sharding
from tlm_jax.garbage import no_collection
from tlm_jax.models import LanguageModel, Skeleton
from tlm_jax.models.loss import Teacher, distillation_loss, training_loss
from tlm_jax.ops import rows
from tlm_jax.training.updates import global_norm, learning_rate, updates_made

_NORM_STEPS = 100
"""Updates in the running mean of the gradient norm, and before which none is a spike."""

_COMPILER_OPTIONS: dict[str, dict[str, str | bool]] = {
    "cpu": {
        "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
        "xla_cpu_copy_insertion_use_region_analysis": True,
    },
    "gpu": {
        "xla_gpu_enable_dynamic_slice_fusion": False,
        "xla_gpu_enable_triton_gemm": False,
    },
}
"""By platform: on a CPU a schedule that needs less memory, no copies of the donated state. On GPUs
no fusion that writes a product into a loop's stack and makes the product again for who else reads
it (jaxlib 0.11: gate and up projections ran twice), and products by cuBLAS: trying Triton's tilings
takes minutes for each new shape."""

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
TokenLoss = Callable[[LanguageModel, Batch], jax.Array]
"""(model, batch) -> float32 loss (B, L) of each token's target."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a checkpoint holds of a model in training; or a shape or sharding for each part."""

    step: Any
    """int32; batches consumed."""
    params: Any
    opt_state: Any
    skipped: Any
    """int32; updates not made: loss or gradient not finite, or a spike (`skip_spikes`)."""
    skipped_in_a_row: Any
    typical_norm: Any
    """float32; running mean of the gradient norms (before clipping) of the updates that were made,
    0 at the start. Skipped ones count neither in it nor in its weights (our choice): a spike is
    not typical, and a norm that is not finite tells nothing."""


def init_state(skeleton: Skeleton, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """Fresh parameters and moments at step 0."""
    return first_state(tx, skeleton.init(key))


def first_state(tx: optax.GradientTransformation, params: Any) -> TrainState:
    """These parameters at step 0, with fresh moments."""
    return TrainState(  # each counter a buffer of its own, as the train step donates them
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
        typical_norm=jnp.zeros((), jnp.float32),
    )


def state_shardings(
    skeleton: Skeleton, tx: optax.GradientTransformation, mesh: Mesh | AbstractMesh
) -> TrainState:
    """A `NamedSharding` for each leaf of the training state."""
    params = sharding.param_shardings(skeleton.shapes, skeleton.logical_axes, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    return TrainState(
        step=replicated,
        params=params,
        opt_state=sharding.optimizer_shardings(tx, skeleton.shapes, params),
        skipped=replicated,
        skipped_in_a_row=replicated,
        typical_norm=replicated,
    )


def abstract_state(
    skeleton: Skeleton, tx: optax.GradientTransformation, mesh: Mesh | AbstractMesh
) -> TrainState:
    """Shape, dtype and sharding of each leaf of the training state."""
    shapes = jax.eval_shape(functools.partial(first_state, tx), skeleton.shapes)
    return _placed(shapes, state_shardings(skeleton, tx, mesh))


def abstract_params(skeleton: Skeleton, mesh: Mesh | AbstractMesh) -> Any:
    """Shape, dtype and sharding of each parameter."""
    shardings = sharding.param_shardings(skeleton.shapes, skeleton.logical_axes, mesh)
    return _placed(skeleton.shapes, shardings)


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, shardings
    )


def abstract_batch(rows: int, length: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of the arrays of a batch."""
    where = sharding.token_sharding(mesh)
    shape = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=where)
    return dict.fromkeys(("inputs", "targets", "document_ids", "positions"), shape)


def compiler_options(mesh: Mesh) -> dict[str, str | bool] | None:
    """What XLA is told when it compiles the train step."""
    return _COMPILER_OPTIONS.get(mesh.devices.flat[0].platform)


def stacked(tree: Any, number: int) -> Any:
    """Shape, dtype and sharding of so many of these arrays along a new first dim, not split."""

    def stack(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        where = NamedSharding(leaf.sharding.mesh, PartitionSpec(None, *leaf.sharding.spec))
        return jax.ShapeDtypeStruct((number, *leaf.shape), leaf.dtype, sharding=where)

    return jax.tree.map(stack, tree)


def lower_train_step(
    config: RunConfig,
    skeleton: Skeleton,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    loss: TokenLoss | None = None,
    teacher: Skeleton | None = None,
    seeds: int | None = None,
    kind: int | None = None,
) -> jax.stages.Lowered:
    """The train step for a mesh, to be compiled; the mesh's devices need not be here.

    The old state is donated: the new one takes its place. With a teacher the step takes its
    parameters, sharded like others, as a third argument. With `seeds`, it trains so many models
    that do not know each other: state, batch and metrics have one more dim, the first. With `kind`
    its batches need that kind of attention (`ops.rows`).
    """
    state = abstract_state(skeleton, tx, mesh)
    batch = abstract_batch(config.data.batch_size, config.data.seq_len, mesh)
    function = make_train_step(config, skeleton, tx, loss, teacher)
    if seeds is not None:
        state, batch, function = stacked(state, seeds), stacked(batch, seeds), jax.vmap(function)
    replicated = NamedSharding(mesh, PartitionSpec())
    more = () if teacher is None else (abstract_params(teacher, mesh),)
    train_step = jax.jit(
        function,
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), replicated),
        compiler_options=compiler_options(mesh),
    )
    # Tracing makes millions of objects that stay: a fifth of its time went into collections.
    with jax.set_mesh(mesh), rows.of_kind(kind), no_collection():
        return train_step.lower(state, batch, *more)


def make_train_step(
    config: RunConfig,
    skeleton: Skeleton,
    tx: optax.GradientTransformation,
    loss: TokenLoss | None = None,
    teacher: Skeleton | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The function (state, batch) -> (state, metrics), not yet compiled.

    With a teacher it is (state, batch, teacher's parameters) -> (state, metrics).

    Metrics: `loss` (nats per token), `grad_norm` (before clipping), `tokens`
    (scored in this step), `learning_rate` (what this update is multiplied by, or would have been
    if it is skipped: the schedule counts updates that were made; absent with an optimizer that
    has no schedule), `skipped` and `skipped_in_a_row`; with a teacher `divergence`, the mean
    KL(teacher || model) in nats per token.

    Args:
      config: the run.
      skeleton: the model's structure.
      tx: the optimizer.
      loss: of each token in place of the negative log-likelihood; its mean over the tokens that
        are not padding is what training descends on.
    """
    parts = config.training.grad_accumulation
    chunk, z_loss = config.training.loss_chunk, config.training.z_loss
    spike = config.training.skip_spikes
    rate = learning_rate(config.optimizer, config.training.num_steps)

    def gradients(params: Any, batch: Batch, tokens: jax.Array, taught: Any) -> tuple[Metrics, Any]:
        def objective(params: Any) -> tuple[jax.Array, Metrics]:
            if loss is not None:
                loss_BL = loss(skeleton.merge(params), batch)
                mean = jnp.sum(jnp.where(batch["document_ids"] > 0, loss_BL, 0.0)) / tokens
                return mean, {"loss": mean}
            if teacher is not None:
                whole = Teacher(
                    skeleton=teacher, params=taught, weight=config.training.teacher_weight
                )
                value, (nll, divergence) = distillation_loss(
                    skeleton, params, batch, tokens, whole, chunk=chunk, z_loss=z_loss
                )
                return value, {"loss": nll, "divergence": divergence}
            value, nll = training_loss(skeleton, params, batch, tokens, chunk=chunk, z_loss=z_loss)
            return value, {"loss": nll}

        (_, means), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return means, grads

    def accumulated(
        params: Any, batch: Batch, tokens: jax.Array, taught: Any
    ) -> tuple[Metrics, Any]:
        if parts == 1:
            return gradients(params, batch, tokens, taught)
        # Part i takes rows i, i + parts, ...: each device keeps its own rows.
        split = jax.tree.map(
            lambda a: a.reshape(a.shape[0] // parts, parts, *a.shape[1:]).swapaxes(0, 1), batch
        )

        def add(total: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradients(params, part, tokens, taught)), None

        names = ("loss",) if teacher is None else ("loss", "divergence")
        zeros = ({name: jnp.zeros(()) for name in names}, jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(add, zeros, split)[0]

    def train_step(
        state: TrainState, batch: Batch, taught: Any = None
    ) -> tuple[TrainState, Metrics]:
        tokens = jnp.sum(batch["document_ids"] > 0)
        means, grads = accumulated(state.params, batch, jnp.maximum(tokens, 1), taught)
        grad_norm = global_norm(grads)
        good = jnp.isfinite(means["loss"]) & jnp.isfinite(grad_norm)
        made = state.step - state.skipped
        if spike:
            # While the mean is young, steps differ too much to tell.
            good &= (made < _NORM_STEPS) | (grad_norm <= spike * state.typical_norm)
        # A mean over all updates at first, then over about the last _NORM_STEPS.
        weight = 1.0 / jnp.minimum(made + 1, _NORM_STEPS)
        typical_norm = state.typical_norm + weight * (grad_norm - state.typical_norm)
        count = updates_made(state.opt_state)
        with jax.named_scope("optimizer"):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

        bad = (~good).astype(jnp.int32)
        state = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            opt_state=keep(opt_state, state.opt_state),
            skipped=state.skipped + bad,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
            typical_norm=keep(typical_norm, state.typical_norm),
        )
        metrics = means | {
            "grad_norm": grad_norm,
            "tokens": tokens,
            "skipped": state.skipped,
            "skipped_in_a_row": state.skipped_in_a_row,
        }
        if count is not None:
            metrics["learning_rate"] = rate(count)
        return state, metrics

    return train_step

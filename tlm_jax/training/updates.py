"""Optimizers: clipping, a direction by kind of optimizer, a learning rate by schedule.

Shapes in comments: a stacked parameter has its layers first.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tlm_jax.mlp import MLPConfig
from tlm_jax.models import Skeleton
from tlm_jax.optimizers import AdafactorConfig, MuonConfig, OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """What an optimizer may know of each parameter; trees of the parameters' structure."""

    decays: Any
    """Whether weight decay acts on it."""
    logical_axes: Any
    """Names of its dims."""

    @classmethod
    def of(cls, model: Skeleton) -> "About":
        """What a model says of its parameters."""
        return cls(decays=model.decays, logical_axes=model.logical_axes)

    @property
    def decay_mask(self) -> Callable[[Any], Any]:
        """For optax: the flags of those parameters that a transformation is given."""
        return functools.partial(_among, self.decays)


ONE_LEVEL = MLPConfig()
Direction = Callable[[Any, About], optax.GradientTransformation]
_DIRECTIONS: dict[type[OptimizerConfig], Direction] = {}


def register_optimizer(config: type[OptimizerConfig], direction: Direction) -> None:
    """Registers `direction(config, about)` to make the optimizers of a config.

    It returns what the learning rate is multiplied with, weight decay included and clipping
    excluded: gradients in, updates to be subtracted out.
    """
    _DIRECTIONS[config] = direction


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Step -> rate: linear to the peak in `warmup_steps`, then by `config.schedule`.

    Starts at peak / (warmup_steps + 1), so that the first update does something, and reaches the
    final rate at `num_steps`.
    """
    peak, final, warmup = config.learning_rate, config.final_learning_rate, config.warmup_steps
    after = max(num_steps - warmup, 1)
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, after, final / peak)
    elif config.schedule == "linear":
        decay = optax.linear_schedule(peak, final, after)
    else:
        falling = min(max(round(config.decay_fraction * num_steps), 1), after)
        decay = optax.linear_schedule(peak, final, falling, after - falling)
    return optax.join_schedules(
        [optax.linear_schedule(peak / (warmup + 1), peak, warmup), decay], [warmup]
    )


def updates_made(opt_state: Any) -> jax.Array | None:
    """Updates that a state of `make_optimizer` has made: where its schedule stands, int32.

    Fewer than the steps of a run that skipped some; None without a schedule, as an optimizer from
    elsewhere may be.
    """

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    nodes = jax.tree.leaves(opt_state, is_leaf=is_schedule)
    schedule = next(filter(is_schedule, nodes), None)
    return None if schedule is None else schedule.count


def global_norm(gradients: Any) -> jax.Array:
    """sqrt of the sum of all squares, float32, the last layer's first.

    XLA's CPU compiler makes gradients in the order in which they are needed first. In this order
    each layer's are made when the backward pass comes by, and what they are made of is free again;
    in the tree's order all would wait for the embedding's.
    """
    return optax.global_norm(jax.tree.leaves(gradients)[::-1])


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """optax's, with the order of `global_norm`."""
    clip = optax.clip_by_global_norm(max_norm)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        leaves, tree = jax.tree.flatten(updates)
        clipped, state = clip.update(leaves[::-1], state, params)
        return jax.tree.unflatten(tree, clipped[::-1]), state

    return optax.GradientTransformation(clip.init, update)


def _among(tree: Any, params: Any) -> Any:
    """The entries of a tree for those parameters that a transformation is given."""
    entries = dict(jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_leaf))
    return jax.tree_util.tree_map_with_path(lambda path, _: entries[path], params)


def _is_leaf(node: Any) -> bool:
    return not isinstance(node, dict)


def update_period(path: Sequence[Any], periods: tuple[int, ...]) -> int:
    """Steps between updates of the parameter at a path of the parameter tree.

    Level i of an MLP lies at segments/<segment>/mlp/<i>/..., with the layer's place before mlp
    where a segment's pattern has several; all else is updated each step.
    """
    top, *layer = (str(key.key) for key in path)
    if top != "segments":
        return 1
    del layer[: 2 if layer[1].isdigit() else 1]
    return periods[int(layer[1])] if layer[0] == "mlp" else 1


def _scaled(tx: optax.GradientTransformation, factor: float) -> optax.GradientTransformation:
    """`tx` with its updates times a factor, and the same state."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = tx.update(updates, state, params)
        return jax.tree.map(lambda u: factor * u, updates), state

    return optax.GradientTransformation(tx.init, update)


def _adamw_parts(config: OptimizerConfig, about: About) -> list[optax.GradientTransformation]:
    return [
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, about.decay_mask),
    ]


def _adamw(config: OptimizerConfig, about: About) -> optax.GradientTransformation:
    return optax.chain(*_adamw_parts(config, about))


def _muon(config: MuonConfig, about: About) -> optax.GradientTransformation:
    def labels(params: Any) -> Any:
        axes = _among(about.logical_axes, params)
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf, names: "muon" if _matrix(path, leaf, names) else "adamw",
            params,
            axes,
        )

    def matrices(updates: Any) -> Any:
        axes = _among(about.logical_axes, updates)
        return jax.tree_util.tree_map_with_path(_matrix, updates, axes)

    muon = optax.chain(
        optax.contrib.scale_by_muon(
            ns_steps=config.newton_schulz_steps,
            beta=config.momentum,
            weight_dimension_numbers=matrices,
        ),
        _scaled_by_shape(matrices),
        optax.add_decayed_weights(config.weight_decay, about.decay_mask),
    )
    return optax.partition({"muon": muon, "adamw": _adamw(config, about)}, labels)


def _matrix(path: Any, leaf: Any, axes: tuple[str | None, ...]) -> Any:
    """Inputs and outputs of a layer's matrix, for optax; None for what is not a matrix of a layer.

    By the names of its dims: what is not `embed` lies on the other side of it, dims without a
    name and layers are matrices of their own. Without names, a matrix has two dims.
    """
    if str(path[0].key) != "segments":
        return None
    dims = [d for d, name in enumerate(axes) if name not in (None, "layers")]
    if not dims and leaf.ndim == 3:  # a stock Flax layer's kernel: layers, inputs, outputs
        dims = [1, 2]
    if len(dims) < 2 or (axes[dims[0]] != "embed" and axes[dims[-1]] != "embed" and len(dims) > 2):
        return None
    split = -1 if axes[dims[-1]] == "embed" and axes[dims[0]] != "embed" else 1
    return optax.contrib.MuonDimensionNumbers(tuple(dims[:split]), tuple(dims[split:]))


def _scaled_by_shape(matrices: Callable[[Any], Any]) -> optax.GradientTransformation:
    """An orthogonal update times 0.2 sqrt(longer side), AdamW's usual root mean square."""

    def one(update: jax.Array, dims: Any) -> jax.Array:
        sides = [math.prod(update.shape[d] for d in side) for side in dims]
        return 0.2 * math.sqrt(max(sides)) * update

    return optax.stateless(lambda updates, _: jax.tree.map(one, updates, matrices(updates)))


def _adafactor(config: AdafactorConfig, about: About) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_factored_rms(
            decay_rate=config.decay_rate,
            min_dim_size_to_factor=config.min_dim_factored,
            epsilon=config.eps,
        ),
        _clip_by_rms(),
        optax.add_decayed_weights(config.weight_decay, about.decay_mask),
    )


def _clip_by_rms() -> optax.GradientTransformation:
    """Each layer's update of a parameter scaled down to a root mean square of at most 1."""

    def one(path: Any, update: jax.Array) -> jax.Array:
        stacked = str(path[0].key) == "segments"
        axes = tuple(range(int(stacked), update.ndim))
        mean = jnp.mean(jnp.square(update), axes, keepdims=True)
        return update / jnp.maximum(1.0, jnp.sqrt(mean))

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(one, updates))


register_optimizer(OptimizerConfig, _adamw)
register_optimizer(MuonConfig, _muon)
register_optimizer(AdafactorConfig, _adafactor)


def _by_width() -> optax.GradientTransformation:
    """Updates of MLPs' last matrices times the mean width over their own."""

    def is_down(path: Any) -> bool:
        return "mlp" in (str(key.key) for key in path) and str(path[-1].key) == "down"

    def update(updates: Any, _: Any) -> Any:
        leaves = jax.tree_util.tree_leaves_with_path(updates)
        shapes = [leaf.shape for path, leaf in leaves if is_down(path)]
        layers = sum(shape[0] for shape in shapes)
        mean = sum(shape[0] * shape[1] for shape in shapes) / layers
        return jax.tree_util.tree_map_with_path(
            lambda path, u: u * (mean / u.shape[1]) if is_down(path) else u, updates
        )

    return optax.stateless(update)


def make_optimizer(
    config: OptimizerConfig, num_steps: int, about: About, mlp: MLPConfig = ONE_LEVEL
) -> optax.GradientTransformation:
    """Clip by global norm, then the optimizer's direction, with a period for each MLP level.

    A level of period C is the continuum memory system's eq. 71 (arXiv 2512.24695), read as
    gradient accumulation: it changes at steps C, 2C, ... only, where theta - lr * AdamW(g)
    takes the mean g of the C gradients seen since, each clipped with the whole gradient of
    its step. Our choices where the source is silent: the mean and not the sum, so that eps
    keeps its meaning (AdamW divides any other factor out); moments and their bias correction
    count updates of the level; the learning rate is the schedule's at the step of the update.

    Eq. 71 writes the sum of the C steps. AdamW's steps have a length of about the learning rate
    whatever the gradient's, so one step on the mean moves a level about 1/C as far as that sum,
    and decays it 1/C as much in the course of a run. `mlp.period_rate="times_period"` is the
    other reading: C times the rate, for step and decay.

    Steps that are skipped for a non-finite gradient are not counted.

    Args:
      config: the optimizer.
      num_steps: length of the schedule in steps.
      about: the parameters that it updates.
      mlp: update period of each MLP level, all 1 is the plain optimizer; and the levels' rates.

    Raises:
      TypeError: nobody registered this kind of optimizer.
    """
    if type(config) not in _DIRECTIONS:
        name = type(config).__name__
        raise TypeError(
            f"no optimizer is registered for {name}; call "
            f"tlm_jax.register_optimizer({name}, direction)"
        )
    direction = _DIRECTIONS[type(config)](config, about)
    # The rate comes last, outside of accumulation, so that it follows the steps of the run.
    rate = optax.scale_by_learning_rate(learning_rate(config, num_steps))
    clip = clip_by_global_norm(config.clip_norm)
    if config.rate_by_width:
        direction = optax.chain(direction, _by_width())
    if all(period == 1 for period in mlp.periods):
        # AdamW's state is that of optax.adamw, as in the checkpoints of before.
        flat = type(config) is OptimizerConfig and not config.rate_by_width
        parts = _adamw_parts(config, about) if flat else [direction]
        return optax.chain(clip, optax.chain(*parts, rate))

    def every(period: int) -> optax.GradientTransformation:
        if period == 1:
            return direction
        factor = period if mlp.period_rate == "times_period" else 1
        return optax.MultiSteps(_scaled(direction, factor), period).gradient_transformation()

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: f"every_{update_period(path, mlp.periods)}", params
        )

    by_period = {f"every_{period}": every(period) for period in sorted({1, *mlp.periods})}
    return optax.chain(clip, optax.partition(by_period, labels), rate)

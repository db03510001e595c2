"""AdamW with clipping, warm-up and cosine decay (papers' recipe; betas and warm-up are ours)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from tlm_jax.config import OptimizerConfig
from tlm_jax.mixers import MLPConfig

ONE_LEVEL = MLPConfig()


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Step -> rate: linear to the peak in `warmup_steps`, cosine to the final rate at the end.

    Starts at peak / (warmup_steps + 1), so that the first update does something.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (config.warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(num_steps, config.warmup_steps + 1),
        end_value=config.final_learning_rate,
    )


def updates_made(opt_state: Any) -> jax.Array:
    """Updates that a state of `make_optimizer` has made: where its schedule stands, int32.

    Fewer than the steps of a run that skipped some.
    """

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    nodes = jax.tree.leaves(opt_state, is_leaf=is_schedule)
    (schedule,) = filter(is_schedule, nodes)
    return schedule.count


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


def decay_mask(decays: Any) -> Callable[[Any], Any]:
    """The mask for optax: the flags of those parameters that a transformation is given."""
    flags = dict(jax.tree_util.tree_leaves_with_path(decays))
    return lambda params: jax.tree_util.tree_map_with_path(lambda path, _: flags[path], params)


def update_period(path: Sequence[Any], periods: tuple[int, ...]) -> int:
    """Steps between updates of the parameter at a path of the parameter tree.

    Level i of an MLP lies at segments/<segment>/mlp/<i>/..., with the layer's place before mlp
    where a segment's pattern has several; all else is updated each step.
    """
    top, _, *layer = (str(key.key) for key in path)
    if layer and layer[0].isdigit():
        del layer[0]
    if top == "segments" and layer[0] == "mlp":
        return periods[int(layer[1])]
    return 1


def _scaled(tx: optax.GradientTransformation, factor: float) -> optax.GradientTransformation:
    """`tx` with its updates times a factor, and the same state."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = tx.update(updates, state, params)
        return jax.tree.map(lambda u: factor * u, updates), state

    return optax.GradientTransformation(tx.init, update)


def make_optimizer(
    config: OptimizerConfig, num_steps: int, decays: Any, mlp: MLPConfig = ONE_LEVEL
) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (arXiv 1711.05101), with a period for each MLP level.

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
      config: rates, moments, decay.
      num_steps: length of the schedule in steps.
      decays: whether weight decay acts on each parameter (`Skeleton.decays`).
      mlp: update period of each MLP level, all 1 is plain AdamW; and the levels' rates.
    """
    rate = learning_rate(config, num_steps)
    clip = clip_by_global_norm(config.clip_norm)
    mask = decay_mask(decays)
    moments = {"b1": config.beta1, "b2": config.beta2, "eps": config.eps}
    if all(period == 1 for period in mlp.periods):
        decay = {"weight_decay": config.weight_decay, "mask": mask}
        return optax.chain(clip, optax.adamw(rate, **moments, **decay))

    def every(period: int) -> optax.GradientTransformation:
        adamw = optax.chain(
            optax.scale_by_adam(**moments),
            optax.add_decayed_weights(config.weight_decay, mask),
        )
        if period == 1:
            return adamw
        if mlp.period_rate == "times_period":
            adamw = _scaled(adamw, period)
        return optax.MultiSteps(adamw, period).gradient_transformation()

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: f"every_{update_period(path, mlp.periods)}", params
        )

    by_period = {f"every_{period}": every(period) for period in sorted({1, *mlp.periods})}
    # The rate comes last, outside the accumulation, so that it follows the steps of the run.
    return optax.chain(clip, optax.partition(by_period, labels), optax.scale_by_learning_rate(rate))

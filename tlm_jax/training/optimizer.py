"""AdamW with clipping, warm-up and cosine decay (papers' recipe; betas and warm-up are ours)."""

from typing import Any

import jax
import optax

from tlm_jax.config import OptimizerConfig

NOT_DECAYED = ("scale", "bias")


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


def decay_mask(params: Any) -> Any:
    """True for parameters under weight decay, by name.

    Not by number of dims: stacked norm scales have two.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: str(path[-1].key) not in NOT_DECAYED, params
    )


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (arXiv 1711.05101)."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, num_steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )

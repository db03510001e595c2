"""A tapered vision transformer and its uniform twin classify scikit-learn's handwritten digits.

    python examples/vit.py                          # three seeds of each; extra "examples"
    python examples/vit.py --seeds 1 --steps 100

The model is a ViT (arXiv 2010.11929) with the mean over patches instead of a class token. MLP
widths fall along the cosine of arXiv 2606.23670, and parameters stay exactly equal. Everything
but the stack is stock Flax; nothing here knows language.

Shapes: B batch, H and W pixels, T tokens (patches), D model, F MLP, C classes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from tlm_jax.stack import Stack
from tlm_jax.taper import layer_widths

SIDE, PATCH, CLASSES = 8, 2, 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Trains both models with every seed and prints their accuracy on held-out digits."""

    seeds: int = 3
    """Runs per model; a seed sets the initial parameters and the order of the images."""
    steps: int = 300
    """Optimizer steps per run."""
    batch_size: int = 64
    """Images per step."""
    learning_rate: float = 3e-3
    """Peak, after a linear warm-up over a tenth of the steps and before a cosine to zero."""
    weight_decay: float = 0.1
    """Of AdamW."""
    num_layers: int = 8
    """Transformer layers."""
    d_model: int = 64
    """Width of the residual stream."""
    num_heads: int = 4
    """Attention heads per layer."""
    mlp_width: int = 128
    """Mean width of the MLPs."""
    num_segments: int = 4
    """Runs of equal layers in the tapered model; each compiles as one scan."""


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) with an MLP of the given width."""

    def __init__(self, config: Config, width: int, *, rngs: nnx.Rngs):
        D = config.d_model
        self.attention_norm = nnx.LayerNorm(D, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(config.num_heads, D, decode=False, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(D, rngs=rngs)
        self.up = nnx.Linear(D, width, rngs=rngs)
        self.down = nnx.Linear(width, D, rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        h_BTF = nnx.gelu(self.up(self.mlp_norm(x_BTD)))
        return x_BTD + self.down(h_BTF)


class ViT(nnx.Module):
    """Patches, a stack of blocks, the mean over patches, class logits."""

    def __init__(self, config: Config, widths: tuple[int, ...], *, rngs: nnx.Rngs):
        D, T, patch = config.d_model, (SIDE // PATCH) ** 2, (PATCH, PATCH)
        self.embed = nnx.Conv(1, D, kernel_size=patch, strides=patch, rngs=rngs)
        self.position_TD = nnx.Param(jax.random.normal(rngs.params(), (T, D)))
        self.blocks = Stack(widths, functools.partial(Block, config), key=rngs.params())
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.head = nnx.Linear(D, CLASSES, rngs=rngs)

    def __call__(self, images_BHW: jax.Array) -> jax.Array:
        patches = self.embed(images_BHW[..., None])
        x_BTD = patches.reshape(len(images_BHW), *self.position_TD.shape) + self.position_TD
        x_BTD = self.blocks(x_BTD)
        return self.head(self.norm(x_BTD).mean(axis=1))


@functools.partial(jax.jit, static_argnames=("config", "widths"))
def train(
    config: Config, widths: tuple[int, ...], key: jax.Array, images: jax.Array, labels: jax.Array
) -> tuple[ViT, jax.Array]:
    """A trained model, and the loss of each step; the whole run is one program."""
    init_key, data_key = jax.random.split(key)
    model = ViT(config, widths, rngs=nnx.Rngs(params=init_key))
    graphdef, params = nnx.split(model, nnx.Param)
    peak, warmup = config.learning_rate, config.steps // 10
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, config.steps)
    optimizer = optax.adamw(rate, weight_decay=config.weight_decay)

    def loss_fn(params, images_BHW, labels_B):
        logits_BC = nnx.merge(graphdef, params)(images_BHW)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BC, labels_B).mean()

    def step(state, key):
        params, opt_state = state
        chosen_B = jax.random.randint(key, (config.batch_size,), 0, len(images))
        loss, grads = jax.value_and_grad(loss_fn)(params, images[chosen_B], labels[chosen_B])
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    keys = jax.random.split(data_key, config.steps)
    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    return nnx.merge(graphdef, params), losses


@jax.jit
def accuracy(model: ViT, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of the images whose largest logit is that of their class."""
    return jnp.mean(model(images).argmax(axis=-1) == labels)


def load_data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images (N, H, W) from -1 to 1 and classes (N,): two thirds to learn from, the rest held out.

    The split is the same for every run: random, with each class in proportion.
    """
    digits = load_digits()
    train_images, test_images, train_labels, test_labels = train_test_split(
        digits.images.astype(np.float32) / 8 - 1,
        digits.target,
        test_size=1 / 3,
        stratify=digits.target,
        random_state=0,
    )
    return train_images, train_labels, test_images, test_labels


def main(config: Config) -> dict[str, list[float]]:
    """Returns the held-out accuracies of each model in percent, seed by seed."""
    train_images, train_labels, test_images, test_labels = load_data()
    L, F = config.num_layers, config.mlp_width
    models = {"tapered": layer_widths(L, F, num_segments=config.num_segments), "uniform": (F,) * L}
    print(f"data     {len(train_images):,} digits to learn from, {len(test_images)} held out")
    for name, widths in models.items():
        print(f"{name}  MLP widths {' '.join(map(str, widths))}")
    accuracies: dict[str, list[float]] = {name: [] for name in models}
    for seed in range(config.seeds):
        for name, widths in models.items():
            key = jax.random.key(seed)
            model, losses = train(config, widths, key, train_images, train_labels)
            percent = 100 * float(accuracy(model, test_images, test_labels))
            accuracies[name].append(percent)
            count = sum(leaf.size for leaf in jax.tree.leaves(model))
            print(
                f"{name}  seed {seed}  {count:,} parameters  training loss {losses[-1]:.4f}  "
                f"held-out accuracy {percent:.2f}%",
                flush=True,
            )
    seeds = "".join(f"{f'seed {seed}':>9}" for seed in range(config.seeds))
    print(f"\n{'accuracy':8}{seeds}{'mean':>9}  standard deviation")
    for name, found in accuracies.items():
        row = "".join(f"{percent:9.2f}" for percent in [*found, np.mean(found)])
        spread = np.std(found, ddof=1) if len(found) > 1 else np.nan
        print(f"{name:8}{row}{spread:9.2f}")
    return accuracies


if __name__ == "__main__":
    main(tyro.cli(Config))

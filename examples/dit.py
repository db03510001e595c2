"""A small tapered diffusion transformer and its uniform twin draw handwritten digits.

    python examples/dit.py                             # extra "examples"; writes dit_digits.png
    python examples/dit.py --steps 100 --picture quick.png

The model is a DiT with adaLN-Zero (arXiv 2212.09748), conditioned on the class and the noise
level, and learns a rectified flow (arXiv 2209.03003): from noise at t = 0 to an image at t = 1
along straight lines, whose velocity it predicts. Sampling takes Euler steps with classifier-free
guidance (arXiv 2207.12598). MLP widths fall along the cosine of arXiv 2606.23670, and parameters
stay exactly equal. Everything but the stack is stock Flax; nothing here knows language.

Shapes: B batch, N images, H and W pixels, T tokens (patches), D model, 1 broadcast.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import tyro
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from tlm_jax.stack import Stack
from tlm_jax.taper import layer_widths

SIDE, PATCH, CLASSES = 8, 2, 10
NO_CLASS = CLASSES
EULER_STEPS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Trains both models with one seed, draws with both, and writes a picture."""

    picture: str = "dit_digits.png"
    """Where the samples go: real digits and those of each model, one class per column."""
    seed: int = 0
    """Of the initial parameters, the images, the noise and the samples."""
    steps: int = 600
    """Optimizer steps per model."""
    batch_size: int = 64
    """Images per step."""
    learning_rate: float = 3e-3
    """Peak, after a linear warm-up over a tenth of the steps and before a cosine to zero."""
    guidance: float = 2.0
    """Weight w of v = v_no_class + w (v_class - v_no_class); 1 is no guidance."""
    samples: int = 20
    """Images per class; the picture shows up to six."""
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
    """Attention and an MLP of the given width; the condition scales, shifts and gates both."""

    def __init__(self, config: Config, width: int, *, rngs: nnx.Rngs):
        D = config.d_model
        self.attention_norm = nnx.LayerNorm(D, use_scale=False, use_bias=False, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(config.num_heads, D, decode=False, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(D, use_scale=False, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(D, width, rngs=rngs)
        self.down = nnx.Linear(width, D, rngs=rngs)
        self.modulation = nnx.Linear(D, 6 * D, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, condition_BD: jax.Array) -> jax.Array:
        parts_B1D = jnp.split(self.modulation(condition_BD)[:, None], 6, axis=-1)
        scale, shift, gate, mlp_scale, mlp_shift, mlp_gate = parts_B1D
        h_BTD = self.attention_norm(x_BTD) * (1 + scale) + shift
        x_BTD = x_BTD + gate * self.attention(h_BTD)
        h_BTD = self.mlp_norm(x_BTD) * (1 + mlp_scale) + mlp_shift
        return x_BTD + mlp_gate * self.down(nnx.gelu(self.up(h_BTD)))


class DiT(nnx.Module):
    """The velocity of noisy images, given their noise level and class."""

    def __init__(self, config: Config, widths: tuple[int, ...], *, rngs: nnx.Rngs):
        D, T, patch = config.d_model, (SIDE // PATCH) ** 2, (PATCH, PATCH)
        zeros = nnx.initializers.zeros
        self.embed = nnx.Conv(1, D, patch, strides=patch, rngs=rngs)
        self.position_TD = nnx.Param(jax.random.normal(rngs.params(), (T, D)))
        self.class_embed = nnx.Embed(CLASSES + 1, D, rngs=rngs)
        self.time_in, self.time_out = nnx.Linear(D, D, rngs=rngs), nnx.Linear(D, D, rngs=rngs)
        self.blocks = Stack(widths, functools.partial(Block, config), key=rngs.params())
        self.norm = nnx.LayerNorm(D, use_scale=False, use_bias=False, rngs=rngs)
        self.modulation = nnx.Linear(D, 2 * D, kernel_init=zeros, rngs=rngs)
        self.out = nnx.ConvTranspose(D, 1, patch, strides=patch, kernel_init=zeros, rngs=rngs)

    def __call__(self, image_BHW: jax.Array, t_B: jax.Array, class_B: jax.Array) -> jax.Array:
        frequencies = 1000.0 * jnp.exp(jnp.linspace(0.0, -9.0, self.time_in.in_features // 2))
        angles = t_B[:, None] * frequencies
        waves_BD = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        time_BD = self.time_out(nnx.silu(self.time_in(waves_BD)))
        condition_BD = nnx.silu(time_BD + self.class_embed(class_B))
        patches = self.embed(image_BHW[..., None])  # (B, H / 2, W / 2, D)
        x_BTD = patches.reshape(len(t_B), *self.position_TD.shape) + self.position_TD
        x_BTD = self.blocks(x_BTD, condition_BD)
        scale_B1D, shift_B1D = jnp.split(self.modulation(condition_BD)[:, None], 2, axis=-1)
        x_BTD = self.norm(x_BTD) * (1 + scale_B1D) + shift_B1D
        return self.out(x_BTD.reshape(patches.shape))[..., 0]


@functools.partial(jax.jit, static_argnames=("config", "widths"))
def train(
    config: Config, widths: tuple[int, ...], image_NHW: jax.Array, class_N: jax.Array
) -> tuple[DiT, jax.Array]:
    """A trained model, and the loss of each step; the whole run is one program."""
    init_key, data_key = jax.random.split(jax.random.key(config.seed))
    model = DiT(config, widths, rngs=nnx.Rngs(params=init_key))
    graphdef, params = nnx.split(model, nnx.Param)
    peak, warmup = config.learning_rate, config.steps // 10
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, config.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))

    def flow_loss(params, key):
        image_key, noise_key, time_key, drop_key = jax.random.split(key, 4)
        B = config.batch_size
        chosen_B = jax.random.randint(image_key, (B,), 0, len(class_N))
        drop_B = jax.random.bernoulli(drop_key, 0.1, (B,))  # the unguided velocity is learned too
        image_BHW, class_B = image_NHW[chosen_B], jnp.where(drop_B, NO_CLASS, class_N[chosen_B])
        noise_BHW = jax.random.normal(noise_key, image_BHW.shape)
        t_B = jax.nn.sigmoid(jax.random.normal(time_key, (B,)))  # logit-normal, arXiv 2403.03206
        t_B11 = t_B[:, None, None]
        x_BHW = (1 - t_B11) * noise_BHW + t_B11 * image_BHW
        velocity_BHW = nnx.merge(graphdef, params)(x_BHW, t_B, class_B)
        return jnp.mean(jnp.square(velocity_BHW - (image_BHW - noise_BHW)))

    def step(state, key):
        params, opt_state = state
        loss, grads = jax.value_and_grad(flow_loss)(params, key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    keys = jax.random.split(data_key, config.steps)
    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    return nnx.merge(graphdef, params), losses


@functools.partial(jax.jit, static_argnames="config")
def draw(config: Config, model: DiT, class_B: jax.Array) -> jax.Array:
    """One image (B, H, W) of each given class; the noise is the same for every model."""

    def euler_step(x_BHW, t):
        t_B = jnp.full(class_B.shape, t)
        free, given = (model(x_BHW, t_B, c) for c in (jnp.full_like(class_B, NO_CLASS), class_B))
        return x_BHW + (free + config.guidance * (given - free)) / EULER_STEPS, None

    noise_BHW = jax.random.normal(jax.random.key(config.seed), (len(class_B), SIDE, SIDE))
    times = jnp.arange(EULER_STEPS) / EULER_STEPS
    return jax.lax.scan(euler_step, noise_BHW, times)[0]


def write_picture(path: str, panels: dict[str, np.ndarray]) -> None:
    """Up to six rows of digits 0 to 9 per panel."""
    figure = matplotlib.figure.Figure(figsize=(9, 2.4), layout="constrained")
    for axes, (title, images) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        tiles = np.pad(images[: 6 * CLASSES], ((0, 0), (1, 1), (1, 1)), constant_values=-1)
        rows = tiles.reshape(-1, CLASSES, *tiles.shape[1:])
        axes.imshow(np.vstack([np.hstack(row) for row in rows]), cmap="gray_r")
        axes.set(title=title, xticks=[], yticks=[])
    figure.savefig(path, dpi=150)


def main(config: Config) -> dict[str, float]:
    """Returns the percentage of each model's samples that a classifier reads as asked for."""
    digits = load_digits()
    images, classes = digits.images.astype(np.float32) / 8 - 1, digits.target
    judge = KNeighborsClassifier(3).fit(images.reshape(len(images), -1), classes)
    real = np.stack([images[classes == c][: config.samples] for c in range(CLASSES)], axis=1)
    panels, read = {"real": real.reshape(-1, SIDE, SIDE)}, {}
    asked_N = np.tile(np.arange(CLASSES), config.samples)
    L, F = config.num_layers, config.mlp_width
    models = {"tapered": layer_widths(L, F, num_segments=config.num_segments), "uniform": (F,) * L}
    for name, widths in models.items():
        model, losses = train(config, widths, images, classes)
        drawn = panels[name] = np.clip(draw(config, model, asked_N), -1, 1)
        read[name] = 100 * float(np.mean(judge.predict(drawn.reshape(len(drawn), -1)) == asked_N))
        count = sum(leaf.size for leaf in jax.tree.leaves(model))
        print(f"{name}  MLP widths {' '.join(map(str, widths))}; {count:,} parameters")
        print(f"         loss {losses[-100:].mean():.4f}, {read[name]:.1f}% read as asked for")
    write_picture(config.picture, panels)
    print(f"picture  {config.picture}")
    return read


if __name__ == "__main__":
    main(tyro.cli(Config))

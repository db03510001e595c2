"""A fifth mixer, complete: the real-gated linear recurrent unit of Griffin (arXiv 2402.19427).

    python train.py --config examples/rg_lru_tiny.py --workdir runs/rg_lru
    python eval.py --checkpoint runs/rg_lru --trust_module examples/rg_lru.py

Config, module, costs and two lines of registration; tapers, scans, rematerialisation,
sharding, decoding and evaluation come with the model around it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from tlm_jax import costs
from tlm_jax.mixers import MixerConfig
from tlm_jax.models import registry
from tlm_jax.models.decoder import weight
from tlm_jax.ops import dense

C = 8.0  # Griffin's c: how sharply the recurrence gate acts


@dataclasses.dataclass(frozen=True, kw_only=True)
class RGLRUConfig(MixerConfig):
    width: int = 192
    """Channels of the recurrence, R below."""


class RGLRU(nnx.Module):
    """h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t * u_t), a_t = sigmoid(lambda)^(C r_t)."""

    def __init__(self, config: RGLRUConfig, context: registry.LayerContext, *, rngs: nnx.Rngs):
        D, R, std = context.d_model, config.width, context.std

        def matrix() -> nnx.Param:
            return weight(rngs, (D, R), ("embed", "mlp"), fan_in=D, std=std)

        self.input, self.input_gate, self.recurrence_gate = matrix(), matrix(), matrix()
        decay = jnp.linspace(0.9, 0.999, R)
        self.decay_bias = nnx.Param(jnp.log(decay / (1 - decay)), logical_axes=("mlp",))
        scale = context.out_scale
        self.out = weight(rngs, (R, D), ("mlp", "embed"), fan_in=R, std=std, scale=scale)

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> dict[str, Array]:
        R = self.out[...].shape[-2]
        return {"h": jnp.zeros((batch, R)), "segment": jnp.zeros((batch,), jnp.int32)}

    def __call__(
        self, x_BLD: Array, positions_BL: Array, document_ids_BL: Array, cache: Any = None
    ) -> tuple[Array, Any]:
        start = cache or self.init_cache(x_BLD.shape[0], 0, x_BLD.dtype)
        before_BL = jnp.concatenate([start["segment"][:, None], document_ids_BL[:, :-1]], axis=1)
        gate = jax.nn.sigmoid(dense(x_BLD, self.recurrence_gate[...]).astype(jnp.float32))
        log_a_BLR = C * gate * jax.nn.log_sigmoid(self.decay_bias[...])
        a_BLR = jnp.exp(log_a_BLR)
        # 1 - a^2, even where a rounds to 1, and above 0, where the slope of a root is infinite.
        rest_BLR = jnp.maximum(-jnp.expm1(2 * log_a_BLR), 1e-24)
        u_BLR = jax.nn.sigmoid(dense(x_BLD, self.input_gate[...])) * dense(x_BLD, self.input[...])
        b_BLR = jnp.sqrt(rest_BLR) * u_BLR.astype(jnp.float32)
        a_BLR = jnp.where((document_ids_BL == before_BL)[..., None], a_BLR, 0.0)  # a new document
        b_BLR = b_BLR.at[:, 0].add(a_BLR[:, 0] * start["h"])
        combine = lambda x, y: (x[0] * y[0], y[0] * x[1] + y[1])  # noqa: E731
        h_BLR = jax.lax.associative_scan(combine, (a_BLR, b_BLR), axis=1)[1]
        if cache is not None:
            cache = {"h": h_BLR[:, -1], "segment": document_ids_BL[:, -1]}
        return dense(h_BLR.astype(x_BLD.dtype), self.out[...]), cache


@costs.mixer_costs.register
def _costs(mixer: RGLRUConfig, d_model: int, seq_len: int) -> costs.MixerCosts:
    matrices = 4 * d_model * mixer.width
    return costs.MixerCosts(
        parameters=matrices + mixer.width, projection_flops=2 * matrices, mixing_flops=0,
        mixing_flops_full=0, cache_values=0, state_values=mixer.width,
    )  # fmt: skip


registry.register(RGLRUConfig, RGLRU)

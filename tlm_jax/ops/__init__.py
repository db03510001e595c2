"""What layers compute, for the hardware at hand.

Each op has a plain reference; some have faster versions for one kind of hardware, chosen by one
rule (`backend.Op.choose`). Models say what is computed and hold nothing for one processor.
"""

from tlm_jax.ops.activations import gelu_and_slope, swiglu
from tlm_jax.ops.attention import attend, attend_cache, self_attention
from tlm_jax.ops.backend import references, target, tracing_for
from tlm_jax.ops.cross_entropy import logits
from tlm_jax.ops.masks import ATTENTION, sees, within
from tlm_jax.ops.products import dense
from tlm_jax.ops.rotary import rotary

__all__ = [
    "ATTENTION",
    "attend",
    "attend_cache",
    "dense",
    "gelu_and_slope",
    "logits",
    "references",
    "rotary",
    "sees",
    "self_attention",
    "swiglu",
    "target",
    "tracing_for",
    "within",
]

"""Costs of layers' parts that give none, counted in their traced programs."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import jaxprs_in_params

from tlm_jax import ops
from tlm_jax.mixer_costs import MixerCosts, MLPCosts


def count_mixer(make: Callable[[], Any], d_model: int, seq_len: int) -> MixerCosts:
    """Parameters and FLOPs of a mixer, without running it.

    Every product counts as projection, in full: the program does not say which of them a causal
    kernel could leave out.

    Args:
      make: makes the module.
      d_model: width of the residual stream.
      seq_len: tokens in a sequence.
    """
    graphdef, params, *rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)

    def run(params: Any, x_BLD: jax.Array, ids_BL: jax.Array) -> jax.Array:
        y_BLD: jax.Array = nnx.merge(graphdef, params, *rest)(x_BLD, ids_BL, ids_BL, None)[0]
        return y_BLD

    def cache(length: int) -> int:
        def empty(params: Any) -> Any:
            merged = nnx.merge(graphdef, params, *rest)
            return merged.init_cache(1, length, jnp.dtype("float32"))

        leaves = jax.tree.leaves(jax.eval_shape(empty, params))
        return sum(leaf.size for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))

    x = jax.ShapeDtypeStruct((1, seq_len, d_model), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, seq_len), jnp.int32)
    with ops.references():
        flops, _ = count_products(jax.make_jaxpr(run)(params, x, ids).jaxpr)
    per_token = cache(2 * seq_len) - cache(seq_len)
    return MixerCosts(
        parameters=_size(params),
        projection_flops=flops // seq_len,
        mixing_flops=0,
        mixing_flops_full=0,
        cache_values=per_token // seq_len,
        state_values=cache(seq_len) - per_token,
    )


def count_mlp(make: Callable[[], Any], d_model: int) -> MLPCosts:
    """Parameters and FLOPs per token of an MLP, without running it."""
    graphdef, params, *rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)

    def run(params: Any, x_BLD: jax.Array) -> jax.Array:
        y_BLD: jax.Array = nnx.merge(graphdef, params, *rest)(x_BLD)
        return y_BLD

    x = jax.ShapeDtypeStruct((1, 1, d_model), jnp.float32)
    with ops.references():
        flops, _ = count_products(jax.make_jaxpr(run)(params, x).jaxpr)
    return MLPCosts(parameters=_size(params), flops=flops)


def _size(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def count_products(jaxpr: Any) -> tuple[int, int]:
    """(FLOPs, values of the results) of a traced program's products, loops multiplied out.

    A matrix product counts 2 m n k, a convolution likewise. Of a choice the cheapest branch
    counts.
    """
    flops = outputs = 0
    for eqn in jaxpr.eqns:
        inner = [count_products(sub) for sub in jaxprs_in_params(eqn.params)]
        times, size = 1, eqn.outvars[0].aval.size if eqn.outvars else 0
        match eqn.primitive.name:
            case "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                depth = math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
                flops, outputs = flops + 2 * depth * size, outputs + size
            case "conv_general_dilated":
                kernel = eqn.invars[1].aval
                features = eqn.params["dimension_numbers"].rhs_spec[0]
                flops += 2 * size * (kernel.size // kernel.shape[features])
                outputs += size
            case "scan":
                times = eqn.params["length"]
            case "cond":
                inner = [min(inner)]
        flops += times * sum(f for f, _ in inner)
        outputs += times * sum(o for _, o in inner)
    return flops, outputs

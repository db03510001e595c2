"""The decoder-only language model: embedding, segments of blocks, norm, head.

Shapes: B batch, L length, D model, V vocab.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tlm_jax.config import ModelConfig, UserError
from tlm_jax.distributed.sharding import constrain
from tlm_jax.models import segments
from tlm_jax.models.block import Block, layer_specs, scans_layers
from tlm_jax.models.layers import RMSNorm, weight

Params = dict[str, Any]


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The dtype of the layers' arithmetic; `auto` asks which backend runs."""
    name = config.compute_dtype
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


class LanguageModel(nnx.Module):
    """A stack of segments over a residual stream of constant width.

    Layer l draws its parameters from `fold_in(key, l)`, so that a tapered model
    and its uniform twin start from the same attention weights.
    """

    def __init__(self, config: ModelConfig, *, key: jax.Array):
        d, vocab, std = config.d_model, config.vocab_size, config.init_std
        self.config = config
        embed_key, head_key, layers_key = jax.random.split(key, 3)
        self.embedding = weight(
            nnx.Rngs(params=embed_key), (vocab, d), ("vocab", "embed"), fan_in=d, std=std
        )
        self.segment_specs = segments.group(layer_specs(config))
        stacks = {}
        for index, spec in enumerate(self.segment_specs):
            layer_indices = spec.start + jnp.arange(spec.length)
            keys = jax.vmap(functools.partial(jax.random.fold_in, layers_key))(layer_indices)
            stacks[f"{index:03d}"] = segments.stack(
                functools.partial(Block.from_key, config, spec.layer), keys
            )
        self.segments = nnx.Dict(stacks)
        self.final_norm = RMSNorm(d, config.norm_eps, "norm")
        self.head = (
            None
            if config.tie_embeddings
            else weight(
                nnx.Rngs(params=head_key), (d, vocab), ("embed", "vocab"), fan_in=d, std=std
            )
        )

    @property
    def head_DV(self) -> jax.Array:
        """The output matrix, float32."""
        return self.embedding[...].T if self.head is None else self.head[...]

    def __call__(
        self,
        tokens_BL: jax.Array,
        *,
        positions_BL: jax.Array | None = None,
        segment_ids_BL: jax.Array | None = None,
        cache: list[Any] | None = None,
    ) -> tuple[jax.Array, list[Any] | None]:
        """Hidden states after the final norm; multiply by `head_DV` for logits.

        Args:
          tokens_BL: int32 token ids.
          positions_BL: int32 positions within documents; None counts from 0.
          segment_ids_BL: int32 document of each token: tokens see only their own
            document, 0 is padding; None is one document a row.
          cache: from `init_cache`, to continue the tokens in it.

        Returns:
          hidden_BLD in the compute dtype, and the new cache (None without one).
        """
        config = self.config
        if positions_BL is None:
            positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
        if segment_ids_BL is None:
            segment_ids_BL = jnp.ones_like(tokens_BL)
        with jax.named_scope("embedding"):
            x_BLD = self.embedding[...][tokens_BL].astype(compute_dtype(config))
        new_cache = []
        for index, (spec, stacked) in enumerate(
            zip(self.segment_specs, self.segments.values(), strict=True)
        ):
            with jax.named_scope(f"segment_{index}"):
                x_BLD, segment_cache = segments.run_segment(
                    stacked,
                    x_BLD,
                    None if cache is None else cache[index],
                    positions_BL,
                    segment_ids_BL,
                    length=spec.length,
                    remat=config.remat,
                    scan=scans_layers(config),
                )
            new_cache.append(segment_cache)
        x_BLD = constrain(x_BLD, "batch", "sequence", None)
        return self.final_norm(x_BLD), None if cache is None else new_cache

    def logits(self, hidden_BLD: jax.Array) -> jax.Array:
        """float32 logits (B, L, V); for long sequences use `training.loss` instead."""
        head = self.head_DV.astype(hidden_BLD.dtype)
        return jnp.matmul(hidden_BLD, head, preferred_element_type=jnp.float32)

    def init_cache(self, batch: int, length: int) -> list[Any]:
        """Empty decoding state, a stacked cache per segment."""
        dtype = compute_dtype(self.config)

        def one_segment(spec: segments.SegmentSpec, stacked: Any) -> Any:
            cache = segments.layer_at(stacked, 0).init_cache(batch, length, dtype)
            return jax.tree.map(lambda a: jnp.stack([a] * spec.length), cache)

        return [
            one_segment(spec, stacked)
            for spec, stacked in zip(self.segment_specs, self.segments.values(), strict=True)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skeleton:
    """A model without its numbers: structure, shapes and logical axes.

    Parameters travel through training and checkpoints as a plain nested dict of
    arrays; `merge` makes a model of them.
    """

    config: ModelConfig
    graphdef: Any
    state: Any

    @property
    def shapes(self) -> Params:
        """`jax.ShapeDtypeStruct` of each parameter."""
        return nnx.to_pure_dict(self.state)

    @property
    def logical_axes(self) -> Params:
        """Logical axis names of each parameter; a stack's first dim is `layers`."""

        def names(path: Any, leaf: Any) -> tuple[str | None, ...]:
            axes = self._variable(path).get_metadata("logical_axes", (None,) * leaf.ndim)
            return ("layers",) * (leaf.ndim - len(axes)) + tuple(axes)

        return jax.tree_util.tree_map_with_path(names, self.shapes)

    @property
    def decays(self) -> Params:
        """Whether weight decay acts on each parameter.

        It does on matrices: what has two dims or more in a single layer. A parameter says
        otherwise by its metadata `decays` (docs/training.md lists which do).
        """

        def decays(path: Any, leaf: Any) -> bool:
            dims = leaf.ndim - (path[0].key == "segments")  # stacks have one for the layers
            return bool(self._variable(path).get_metadata("decays", dims >= 2))

        return jax.tree_util.tree_map_with_path(decays, self.shapes)

    def _variable(self, path: Any) -> Any:
        return functools.reduce(lambda node, key: node[key.key], path, self.state)

    @property
    def num_params(self) -> int:
        """Parameters in all."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.shapes))

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters; jit it with out_shardings to have them born sharded."""
        return _init(self.config, key)

    def merge(self, params: Params) -> LanguageModel:
        """The model with these parameters."""
        state = jax.tree.map(lambda leaf: leaf, self.state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self.graphdef, state)


@functools.partial(jax.jit, static_argnums=0)  # operation by operation it takes seconds
def _init(config: ModelConfig, key: jax.Array) -> Params:
    model = LanguageModel(config, key=key)
    return nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])


@functools.lru_cache(maxsize=64)
def skeleton(config: ModelConfig) -> Skeleton:
    """Traces the model's constructor without allocating anything.

    Raises:
      UserError: a parameter has no values; checkpoints cannot hold such.
    """
    abstract = nnx.eval_shape(lambda: LanguageModel(config, key=jax.random.key(0)))
    graphdef, state = nnx.split(abstract, nnx.Param)
    result = Skeleton(config=config, graphdef=graphdef, state=state)
    for path, leaf in jax.tree_util.tree_leaves_with_path(result.shapes):
        if leaf.size == 0:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(f"parameter {name} of shape {leaf.shape} is empty; make it None")
    return result

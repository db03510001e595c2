"""Memory that a train step needs on each device, from traced layers: nothing is compiled.

The state is counted exactly. What layers keep for the backward pass, and what one of them needs
while it works, is read off the program of its own forward and backward pass (`models.liveness`),
for the rows that one device has; so custom mixers and every rematerialisation policy count as what
they are. Layers are nearly linear in their width: of each kind the narrowest and the widest are
traced.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Var
from jax.sharding import AbstractMesh, AxisType

from tlm_jax import costs, ops
from tlm_jax.config import LayerSpec, RunConfig
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.mixers import ListedConfig
from tlm_jax.models import liveness, skeleton
from tlm_jax.models.decoder import Block
from tlm_jax.models.settings import compute_dtype, scans_layers
from tlm_jax.ops.cross_entropy import total_loss
from tlm_jax.stack import POLICIES
from tlm_jax.training import step
from tlm_jax.training.updates import About, make_optimizer

MEASURED = {"cpu": (15, 13), "tpu": (8, 7)}
"""Configs that were compiled, and by how many percent the estimate was off at most; see
benchmarks/plan_memory.py."""
_CODE = 35 * 2**20
"""Bytes of program per segment on a TPU, measured (docs/notes/tpu-compile.md)."""
_GAPS = 0.07
"""Share of the temporaries that a CPU's allocation adds to them, measured likewise."""
_MOST_ROWS = 4096
"""Traced; what more of them need is multiplied out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of a train step on each device, at its worst moment."""

    parameters: int
    """float32, exact."""
    optimizer: int
    """Moments and counters, exact."""
    batch: int
    """Tokens, targets, positions and document ids, exact."""
    gradients: int
    """float32: those that are complete at that moment; with parts, their sum besides."""
    weights: int
    """Copies of the layers' weights in the compute dtype."""
    kept: int
    """What layers keep for the backward pass, at that moment."""
    work: int
    """The working set at that moment: one layer's forward or backward pass, or the loss."""
    gaps: int
    """Between arrays (CPU)."""
    code: int
    """The program itself (TPU)."""
    moment: str
    """What runs at the peak."""
    kept_by_layer: tuple[int, ...]
    """What each layer keeps from its forward to its backward pass."""
    tokens: int
    """Tokens of one part of the batch on a device."""

    @property
    def total(self) -> int:
        """All of it."""
        exact = self.parameters + self.optimizer + self.batch
        return exact + self.temporary + self.gaps + self.code

    @property
    def temporary(self) -> int:
        """What lives only while the step runs."""
        return self.gradients + self.weights + self.kept + self.work


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Layer:
    """Bytes of one layer on a device."""

    kept: float
    """From its forward pass to its backward pass, without its parameters."""
    forward: float
    """Its peak while it runs."""
    backward: float
    """The most while its backward pass runs, with its gradients, without what was kept."""
    matrices: float
    """float32."""
    again: float
    """Of what is computed again, what needs no gradient from above: a loop holds it back."""


def step_memory(config: RunConfig, *, devices: int = 1, target: str = "tpu") -> StepMemory:
    """Memory of one train step on each device.

    Args:
      config: the run; its mesh is laid over the devices.
      devices: how many there are.
      target: cpu or tpu: what `auto` in the config means, and how arrays lie in memory.

    Raises:
      UserError: the mesh does not fit the devices.
    """
    if config.model.attention_kernel == "cudnn":  # cannot be traced without cuDNN; keeps as little
        model = dataclasses.replace(config.model, attention_kernel="chunked")
        config = dataclasses.replace(config, model=model)
    with ops.tracing_for(target):
        return _Estimate(config, devices).step()


class _Estimate:
    """Bytes of a run's parts on one device."""

    def __init__(self, config: RunConfig, devices: int):
        self.config, self.model = config, config.model
        shape = mesh_lib.mesh_shape(config.mesh, devices)
        axes = (AxisType.Auto,) * len(shape)
        self.mesh = AbstractMesh(shape, mesh_lib.AXES, axis_types=axes)
        self.axes = dict(zip(mesh_lib.AXES, shape, strict=True))
        self.split = self.axes["fsdp"] * self.axes["tensor"]
        """Parts that a parameter is split into."""
        shards = self.axes["data"] * self.axes["fsdp"]
        rows = -(-config.data.batch_size // (config.training.grad_accumulation * shards))
        self.rows, self.scale = min(rows, _MOST_ROWS), max(rows / _MOST_ROWS, 1.0)
        self.length = -(-config.data.seq_len // self.axes["sequence"])
        self.dtype = compute_dtype(self.model)
        self.tiled = ops.target() == "tpu"
        self.costs = costs.model_costs(self.model, config.data.seq_len)

    def step(self) -> StepMemory:
        """The moment of the peak, among the candidates."""
        parts = self.config.training.grad_accumulation
        layers = self.layers()
        in_layers = [4 * layer.parameters / self.split for layer in self.costs.layers]
        everything = 4 * self.costs.parameters / self.split
        table = everything - sum(in_layers)  # embedding, head and last norm
        stream = self.scale * self.size(self.rows, self.length, self.model.d_model)

        kept = sum(layer.kept for layer in layers)
        # Where parameters are split, the loss has the whole head and its gradient.
        heads = 2 * 4 * self.model.vocab_size * self.model.d_model
        whole = heads / self.axes["tensor"] * (1 - 1 / self.axes["fsdp"])
        moments = [("the loss", kept, table, self.loss() + layers[-1].again + whole)]
        before, after = kept, table
        for segment in reversed(self.model.segments):
            here = layers[segment.start : segment.stop]
            after += sum(in_layers[segment.start : segment.stop])
            forward = max(layer.forward for layer in here)
            moments.append(("a layer's forward pass", before, 0.0, forward))
            gathered = 0.0
            if self.axes["fsdp"] > 1:
                matrices = max(layer.matrices for layer in here)
                gathered = matrices * self.dtype.itemsize / 4 / self.axes["tensor"]
            backward = stream + gathered + max(layer.backward for layer in here)
            moments.append(("a layer's backward pass", before, after, backward))
            before -= sum(layer.kept for layer in here)
        moments.append(("the optimizer", 0.0, everything, 0.0))

        moment, held, gradients, work = max(moments, key=lambda m: sum(m[1:]))
        low = self.dtype.itemsize if self.dtype.itemsize < 4 else 0
        casts = sum(layer.matrices for layer in layers) * low / 4 / self.split
        parameters, optimizer = self.state()
        found = StepMemory(
            parameters=parameters,
            optimizer=optimizer,
            gaps=0,
            batch=round(4 * 4 * self.scale * self.rows * self.length * parts),
            gradients=round(gradients + (everything if parts > 1 else 0)),
            weights=round(casts + self.unstacked()),
            kept=round(held),
            work=round(work),
            code=_CODE * len(self.model.segments) if self.tiled else 0,
            moment=moment,
            kept_by_layer=tuple(round(layer.kept) for layer in layers),
            tokens=round(self.scale * self.rows * self.length),
        )
        gaps = 0 if self.tiled else round(_GAPS * found.temporary)
        return dataclasses.replace(found, gaps=gaps)

    def unstacked(self) -> float:
        """Copies of the weights of segments whose layers are stacked, but not run as a loop."""
        stacks = [s for s in self.model.segments if s.repeats > 1 and not scans_layers(self.model)]
        layers = [self.costs.layers[i] for s in stacks for i in range(s.start, s.stop)]
        return sum(4 * layer.parameters for layer in layers) / self.split

    def size(self, *shape: int) -> int:
        """Bytes of an array in the compute dtype."""
        return liveness.array_bytes(jax.ShapeDtypeStruct(shape, self.dtype), tiled=self.tiled)

    def state(self) -> tuple[int, int]:
        """Of parameters and of the optimizer.

        Both are linear in the depth, and a taper changes no sum: uniform models of one and two
        turns of mixers are traced.
        """
        twin, turn = self.model.uniform_twin(), self.model.mixer.turn

        def sizes(turns: int) -> tuple[int, int]:
            model = skeleton(dataclasses.replace(twin, num_layers=turns * turn))
            tx = make_optimizer(self.config.optimizer, 1, About.of(model), twin.mlp)
            state = step.abstract_state(model, tx, self.mesh)
            parameters, optimizer = (
                sum(
                    liveness.array_bytes(
                        jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype),
                        tiled=self.tiled,
                    )
                    for leaf in jax.tree.leaves(part)
                )
                for part in (state.params, state.opt_state)
            )
            return parameters, optimizer

        turns = twin.num_layers // turn
        if turns < 2 or isinstance(twin.mixer, ListedConfig):
            return sizes(turns)
        one, two = sizes(1), sizes(2)
        parameters, optimizer = (a + (turns - 1) * (b - a) for a, b in zip(one, two, strict=True))
        return parameters, optimizer

    def layers(self) -> list[_Layer]:
        """Each layer, between the narrowest and the widest of its kind."""
        kinds: dict[tuple[type, bool], list[int]] = {}
        for segment in self.model.segments:
            loops = scans_layers(self.model) and segment.repeats > 1
            for index in range(segment.start, segment.stop):
                mixer = self.model.layers[index].mixer
                kinds.setdefault((type(mixer), loops), []).append(index)
        found: dict[int, _Layer] = {}
        for (_, loops), indices in kinds.items():
            size = {i: self.costs.layers[i].parameters for i in indices}
            ends = min(indices, key=size.__getitem__), max(indices, key=size.__getitem__)
            specs = dict.fromkeys(self.model.layers[i] for i in ends)
            traced = [dataclasses.astuple(self.layer(spec, loops)) for spec in specs]
            for i in indices:
                share = (size[i] - size[ends[0]]) / max(size[ends[1]] - size[ends[0]], 1)
                values = [a + share * (b - a) for a, b in zip(traced[0], traced[-1], strict=True)]
                names = [field.name for field in dataclasses.fields(_Layer)]
                found[i] = _Layer(**dict(zip(names, values, strict=True)))
        return [found[i] for i in range(len(found))]

    def layer(self, spec: LayerSpec, loops: bool) -> _Layer:
        """Traces a block's forward and backward pass, in a loop over layers or outside."""
        spec = self.local(spec)
        abstract = nnx.eval_shape(lambda: Block(self.model, spec, rngs=nnx.Rngs(0)))
        graphdef, params, *rest = nnx.split(abstract, nnx.Param, ...)

        def block(params: Any, x: jax.Array, ids: jax.Array) -> jax.Array:
            y: jax.Array = nnx.merge(graphdef, params, *rest)(x, ids, ids)
            return y

        remat = self.model.remat
        if remat != "none":
            block = jax.checkpoint(block, policy=POLICIES[remat], prevent_cse=not loops)

        def forward(params: Any, x: jax.Array, ids: jax.Array) -> Any:
            return jax.vjp(lambda params, x: block(params, x, ids), params, x)

        def both(params: Any, x: jax.Array, ids: jax.Array, dy: jax.Array) -> Any:
            return forward(params, x, ids)[1](dy)

        shape = (self.rows, self.length)
        x = jax.ShapeDtypeStruct((*shape, self.model.d_model), self.dtype)
        ids = jax.ShapeDtypeStruct(shape, jnp.int32)
        matrices = 4 * sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
        kept = 0 if remat == "offload" else self.size(*x.shape)
        again = 0
        if loops:  # what it keeps leaves the loop, whatever could be computed again cheaply
            ahead, (_, back) = jax.make_jaxpr(forward, return_shape=True)(params, x, ids)
            held = liveness.held(ahead, tiled=self.tiled)
            given = set(ahead.jaxpr.invars)
            saved = zip(ahead.jaxpr.outvars[1:], held.results[1:], strict=True)
            kept += sum({v: n for v, n in saved if isinstance(v, Var) and v not in given}.values())
            before = held.peak
            program = jax.make_jaxpr(lambda back, dy: back(dy))(back, x)
            after = liveness.held(program, tiled=self.tiled).peak
        else:
            program = jax.make_jaxpr(both)(params, x, ids, x)
            held = liveness.held(program, cotangents=1, tiled=self.tiled)
            fine = liveness.held(program, cotangents=1, whole_calls=False, tiled=self.tiled)
            kept, again = kept + held.kept, fine.kept - held.kept
            before, after = held.before - held.kept, held.after - held.kept
        return _Layer(
            kept=self.scale * kept,
            forward=self.scale * before,
            backward=self.scale * after,
            matrices=matrices,
            again=self.scale * again,
        )

    def local(self, spec: LayerSpec) -> LayerSpec:
        """What one device of the tensor axis has of a layer; a mixer without heads stays whole."""
        tensor = self.axes["tensor"]
        if tensor == 1:
            return spec
        changes: dict[str, int] = {}
        mixer: Any = spec.mixer
        if hasattr(mixer, "heads") and hasattr(mixer, "num_heads"):
            changes["head_dim"] = mixer.heads(self.model.d_model)[-1]
            for name in ("num_heads", "num_kv_heads"):
                if heads := getattr(mixer, name, None):
                    changes[name] = max(heads // tensor, 1)
        widths = tuple(max(width // tensor, 1) for width in spec.mlp_widths)
        mixer = dataclasses.replace(mixer, **changes) if changes else mixer
        return LayerSpec(mixer=mixer, mlp_widths=widths)

    def loss(self) -> float:
        """The peak of the loss, besides the gradient of the head."""
        D, V = self.model.d_model, -(-self.model.vocab_size // self.axes["tensor"])
        shape, training = (self.rows, self.length), self.config.training
        arrays = (
            jax.ShapeDtypeStruct((*shape, D), self.dtype),
            jax.ShapeDtypeStruct((D, V), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.int32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        )

        def loss(*arrays: jax.Array) -> jax.Array:
            return total_loss(*arrays, training.loss_chunk, training.z_loss)[0]

        program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*arrays)
        return self.scale * (liveness.held(program, tiled=self.tiled).peak - 4 * D * V)

"""What a run needs on TPU slices, by formula, without a device or a compiler (`tlm plan --scale`).

One function for each number of the table. None has been compared with a TPU; benchmarks/scale.py
compares memory and communication with the TPU compiler (docs/pods.md).
"""

import dataclasses
import math

from tlm_jax import costs as costs_lib
from tlm_jax.config import MeshConfig, RunConfig
from tlm_jax.distributed import topology

SLICES = ("v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v5p:8x8x16", "v5p:8x16x16")
"""v5e-16, v5e-256, v5p-128, v5p-2048 and v5p-4096 (a v5p is named by its cores, two per chip)."""
_MOST_TENSOR = 4
CHIPS_PER_HOST = 4
"""In slices of several hosts (Google Cloud's TPU documentation)."""
_LINK_BYTES = {"v4": 6 * 45e9, "v5e": 4 * 45e9, "v5p": 6 * 90e9, "v6e": 4 * 90e9}
"""Bytes per second that a chip receives over all its links at once, by the data sheets."""
_KIND = {"v4": "TPU v4", "v5e": "TPU v5e", "v5p": "TPU v5p", "v6e": "TPU v6e"}
SAVE_RATE, LOAD_RATE = 0.49e9, 0.6e9
"""Bytes per second of a host that saves and loads: 5.2 GB in 10.7 s and 8.6 s, measured on two CPU
cores and a local disk (docs/training.md). A pod's storage is not known here."""
HEARTBEAT = 60.0
"""Seconds after which JAX gives up a process that is gone; most end within a second."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """A run on a slice. Bytes, seconds and FLOPs are those of a step."""

    config: RunConfig
    """With the mesh and the batch of this slice."""
    slice: topology.Topology
    chips: int
    costs: costs_lib.ModelCosts

    @property
    def hosts(self) -> int:
        return -(-self.chips // CHIPS_PER_HOST)

    @property
    def tokens(self) -> int:
        """Of all chips."""
        return self.config.data.batch_size * self.config.data.seq_len

    @property
    def rows(self) -> int:
        """Of one part of the batch, on a chip."""
        mesh = self.config.mesh
        parts = self.config.training.grad_accumulation
        return self.config.data.batch_size // (mesh.data * mesh.fsdp * parts)

    def memory(self) -> int:
        """Bytes on each chip at the step's worst moment: `training.memory`, which traces layers."""
        from tlm_jax.training.memory import step_memory

        return step_memory(self.config, devices=self.chips).total

    def communication(self) -> dict[str, int]:
        """Bytes of the results of collective operations on a chip, by mesh axis.

        As `tlm compile` counts them. An axis of one chip has none.
        """
        sizes = self.config.mesh.sizes
        found = {"data": self._data(), "fsdp": self._fsdp(), "tensor": self._tensor()}
        return {axis: size for axis, size in found.items() if sizes[axis] > 1}

    def _fsdp(self) -> int:
        """Weights gathered, gradients scattered, for each part of the batch.

        Each layer's matrices arrive once for the forward and once for the backward pass, and their
        gradients leave once, all in the compute dtype: (n - 1) / n of their bytes. The loss
        gathers the head for each chunk of tokens in the compute dtype, and sums its gradient in
        float32. The embedding's rows change places, forward and backward.
        """
        config, mesh, costs = self.config, self.config.mesh, self.costs
        share = (mesh.fsdp - 1) / mesh.fsdp / mesh.tensor
        layers = sum(layer.parameters - layer.norm_parameters for layer in costs.layers)
        chunks = config.data.seq_len // (config.training.loss_chunk or config.data.seq_len)
        head = config.model.vocab_size * config.model.d_model
        weights = 3 * costs.value_bytes * layers
        loss = chunks * (costs.value_bytes + costs_lib.FLOAT32_BYTES) * head
        parts = config.training.grad_accumulation
        return parts * (round(share * (weights + loss)) + 2 * self._stream())

    def _tensor(self) -> int:
        """Sums of the residual stream over the parts of each product.

        Two per layer (mixer, MLP) in the forward and two in the backward pass, and the mixer's
        where the layer is computed again; one for the embedding and one for the head's input.
        """
        per_layer = 4 if self.config.model.remat == "none" else 5
        sums = per_layer * self.config.model.num_layers + 2
        return self.config.training.grad_accumulation * sums * self._stream()

    def _data(self) -> int:
        """One sum of the gradients that a chip holds, in float32."""
        mesh = self.config.mesh
        return costs_lib.FLOAT32_BYTES * self.costs.parameters // (mesh.fsdp * mesh.tensor)

    def _stream(self) -> int:
        """Bytes of the residual stream of one part of the batch on a chip."""
        config = self.config
        return self.rows * config.data.seq_len * config.model.d_model * self.costs.value_bytes

    def compute_seconds(self) -> float:
        """All products of a step, recomputed ones included, at the data sheet's rate."""
        peak = costs_lib.peak_flops(_KIND[self.slice.chip]) or math.inf
        return self.costs.hardware_flops * self.tokens / self.chips / peak

    def communication_seconds(self) -> float:
        """The bytes of `communication` over all links of a chip at once; a sum passes twice."""
        bytes_ = self.communication()
        twice = bytes_.get("data", 0) + bytes_.get("tensor", 0)
        return (sum(bytes_.values()) + twice) / _LINK_BYTES[self.slice.chip]

    def seconds(self) -> float:
        """The roofline: products and communication at once, each at its limit."""
        return max(self.compute_seconds(), self.communication_seconds())

    def reading_rate(self) -> float:
        """Bytes of prepared tokens per second, all hosts together: two per token, or four."""
        size = 2 if self.config.model.vocab_size <= 2**16 else 4
        return size * self.tokens / self.seconds()

    def checkpoint(self) -> int:
        """Bytes: float32 parameters and two moments of each (AdamW)."""
        return 3 * costs_lib.FLOAT32_BYTES * self.costs.parameters

    def save_seconds(self) -> float:
        """Every host writes its share."""
        return self.checkpoint() / self.hosts / SAVE_RATE

    def loss_of_a_host(self) -> float:
        """Seconds that all chips lose: until the loss is noticed, loading, and half of the steps
        between two checkpoints, which are repeated. A new host and compiling are not counted."""
        load = self.checkpoint() / self.hosts / LOAD_RATE
        return HEARTBEAT + load + self.config.training.checkpoint_every / 2 * self.seconds()


def scale(config: RunConfig, name: str) -> Scale:
    """The run on a slice such as v5e:16x16, with a mesh and a batch that suit it.

    The batch is split over `fsdp`. Where it has fewer rows than the slice has chips, `tensor` takes
    up to 4 chips per row, and beyond that the batch grows along `data` (our choice).

    Raises:
      UserError: there is no such slice.
    """
    place = topology.parse(name)
    chips = math.prod(place.shape)
    fsdp = math.gcd(chips, config.data.batch_size)
    tensor = math.gcd(chips // fsdp, _MOST_TENSOR)
    data = chips // fsdp // tensor
    config = dataclasses.replace(
        config,
        mesh=MeshConfig(data=data, fsdp=fsdp, tensor=tensor),
        data=dataclasses.replace(config.data, batch_size=config.data.batch_size * data),
    )
    costs = costs_lib.model_costs(config.model, config.data.seq_len)
    return Scale(config=config, slice=place, chips=chips, costs=costs)


HEADER = (
    "slice",
    "chips",
    "data x fsdp x tensor",
    "batch",
    "GiB per chip",
    "collectives: data, GiB",
    "fsdp, GiB",
    "tensor, GiB",
    "products, ms",
    "collectives, ms",
    "reading, MB/s",
    "checkpoint, GB",
    "saving, s",
    "lost host, minutes",
    "lost host, chip-hours",
)


def row(found: Scale) -> list[str]:
    """The numbers of a slice as words, in the order of `HEADER`."""
    used, limit = found.memory(), topology.memory_limit(found.slice.chip)
    mesh, bytes_ = found.config.mesh, found.communication()
    lost = found.loss_of_a_host()
    return [
        found.slice.name,
        f"{found.chips:,}",
        f"{mesh.data}x{mesh.fsdp}x{mesh.tensor}",
        f"{found.config.data.batch_size:,}",
        f"{used / 2**30:.1f}" + ("" if used <= limit else f", too much for {limit / 2**30:.1f}"),
        *(f"{bytes_.get(axis, 0) / 2**30:.2f}" for axis in ("data", "fsdp", "tensor")),
        f"{1e3 * found.compute_seconds():,.0f}",
        f"{1e3 * found.communication_seconds():,.0f}",
        f"{found.reading_rate() / 1e6:,.1f}",
        f"{found.checkpoint() / 1e9:.1f}",
        f"{found.save_seconds():.2f}",
        f"{lost / 60:.1f}",
        f"{lost / 3600 * found.chips:.1f}",
    ]

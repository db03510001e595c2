"""Exact parameters, FLOPs and bytes of a model, layer by layer, without a device.

FLOPs are those of matrix products, 2 m n k each; norms, activations, softmax and
the embedding lookup count nothing. Causal attention is counted in two ways: as the
(L + 1) / 2 keys that a token really has ("causal"), and as all L keys, which dense
kernels compute and the usual definition of MFU counts ("full"). Layers are
summed, never multiplied, since their widths differ. `training.memory` estimates what a train
step needs while it runs.
"""

import dataclasses

from tlm_jax.config import ModelConfig
from tlm_jax.mixer_costs import (
    MixerCosts,
    MLPCosts,
    mixer_costs,
    mlp_costs,
    norm_parameters,
)

FLOAT32_BYTES = 4
_BACKWARD = 2  # a backward pass has two products for each forward one


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """Costs of one block; FLOPs and bytes are per token."""

    layer: int
    """Index from 0."""
    mlp_width: int
    d_model: int
    mixer: MixerCosts
    mlp: tuple[MLPCosts, ...]
    """One per level."""
    norm: int
    """Parameters of one norm of the stream."""

    @property
    def mlp_levels(self) -> int:
        return len(self.mlp)

    @property
    def mlp_parameters(self) -> int:
        return sum(level.parameters for level in self.mlp)

    @property
    def mlp_flops(self) -> int:
        """Forward."""
        return sum(level.flops for level in self.mlp)

    @property
    def norm_parameters(self) -> int:
        """Of the block's norms: the mixer's and one per level of the MLP."""
        return (1 + self.mlp_levels) * self.norm

    @property
    def parameters(self) -> int:
        return self.mixer.parameters + self.mlp_parameters + self.norm_parameters

    @property
    def forward_flops(self) -> int:
        """Causal."""
        return self.mixer.projection_flops + self.mixer.mixing_flops + self.mlp_flops

    @property
    def forward_flops_full(self) -> int:
        return self.mixer.projection_flops + self.mixer.mixing_flops_full + self.mlp_flops

    def recompute_flops(self, remat: str) -> int:
        """Forward FLOPs (full) that the backward pass repeats."""
        full = self.forward_flops_full
        return {
            "none": 0,
            "dots": self.mixer.mixing_flops_full,  # products with parameters are kept
            "attention": full - self.mixer.mixing_flops_full,  # with splash; plain products repeat
            "full": full,
            "offload": full,
        }[remat]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCosts:
    """Costs of a model; FLOPs and bytes are per token unless said otherwise."""

    seq_len: int
    layers: tuple[LayerCosts, ...]
    embedding_parameters: int
    head_parameters: int
    """0 if the embedding table is the head too."""
    final_norm_parameters: int
    head_flops: int
    remat: str
    value_bytes: int
    """Bytes of a value in the compute dtype."""

    @property
    def mixer_parameters(self) -> int:
        return sum(layer.mixer.parameters for layer in self.layers)

    @property
    def mlp_parameters(self) -> int:
        return sum(layer.mlp_parameters for layer in self.layers)

    @property
    def norm_parameters(self) -> int:
        """RMSNorms outside the mixers."""
        return sum(layer.norm_parameters for layer in self.layers) + self.final_norm_parameters

    @property
    def non_embedding_parameters(self) -> int:
        """All but the embedding table and the head."""
        return self.mixer_parameters + self.mlp_parameters + self.norm_parameters

    @property
    def parameters(self) -> int:
        return self.non_embedding_parameters + self.embedding_parameters + self.head_parameters

    @property
    def forward_flops(self) -> int:
        """Causal, with the head."""
        return sum(layer.forward_flops for layer in self.layers) + self.head_flops

    @property
    def forward_flops_full(self) -> int:
        """With all pairs of tokens, with the head."""
        return sum(layer.forward_flops_full for layer in self.layers) + self.head_flops

    @property
    def training_flops(self) -> int:
        """Forward and backward, causal: three times the forward pass."""
        return (1 + _BACKWARD) * self.forward_flops

    @property
    def training_flops_full(self) -> int:
        """Forward and backward with all pairs of tokens; the usual numerator of MFU."""
        return (1 + _BACKWARD) * self.forward_flops_full

    @property
    def recompute_flops(self) -> int:
        """What rematerialised layers compute again."""
        return sum(layer.recompute_flops(self.remat) for layer in self.layers)

    @property
    def hardware_flops(self) -> int:
        """`training_flops_full` and the recomputed layers."""
        return self.training_flops_full + self.recompute_flops

    @property
    def kv_cache_bytes(self) -> int:
        """What decoding keeps of each token."""
        return sum(layer.mixer.cache_values for layer in self.layers) * self.value_bytes

    @property
    def state_bytes(self) -> int:
        """What decoding keeps of each sequence, however long (counted as float32)."""
        return sum(layer.mixer.state_values for layer in self.layers) * FLOAT32_BYTES


def model_costs(config: ModelConfig, seq_len: int) -> ModelCosts:
    """Costs of a model on sequences of `seq_len` tokens.

    compute_dtype "auto" counts as bfloat16, what an accelerator uses.
    """
    table = config.vocab_size * config.d_model
    norm = norm_parameters(config.norm) * config.d_model
    return ModelCosts(
        seq_len=seq_len,
        layers=tuple(
            LayerCosts(
                layer=layer,
                mlp_width=spec.mlp_width,
                d_model=config.d_model,
                mixer=mixer_costs(spec.mixer, config.d_model, seq_len),
                mlp=tuple(mlp_costs(config.mlp, config.d_model, w) for w in spec.mlp_widths),
                norm=norm,
            )
            for layer, spec in enumerate(config.layers)
        ),
        embedding_parameters=table,
        head_parameters=0 if config.tie_embeddings else table,
        final_norm_parameters=norm,
        head_flops=2 * table,
        remat=config.remat,
        value_bytes=FLOAT32_BYTES if config.compute_dtype == "float32" else 2,
    )


_MATCHED = ("parameters", "forward_flops", "forward_flops_full", "recompute_flops")


def twin_difference(config: ModelConfig, seq_len: int = 1) -> dict[str, int]:
    """How much more the model has than its uniform twin, by name; equal entries are left out."""
    costs, twin = model_costs(config, seq_len), model_costs(config.uniform_twin(), seq_len)
    return {
        name: getattr(costs, name) - getattr(twin, name)
        for name in _MATCHED
        if getattr(costs, name) != getattr(twin, name)
    }


def assert_matched(config: ModelConfig, seq_len: int = 1) -> None:
    """Checks that a model and its uniform twin have equal parameters and FLOPs.

    Raises:
      ValueError: they differ, so that comparing them would prove nothing.
    """
    difference = twin_difference(config, seq_len)
    if difference:
        listed = ", ".join(f"{name} {value:+,}" for name, value in difference.items())
        raise ValueError(f"the model and its uniform twin are not comparable: {listed}")


# Dense bfloat16 FLOP/s of one JAX device, from the makers' data sheets (Google Cloud TPU
# system architecture pages; NVIDIA A100, H100 and H200 data sheets, without sparsity).
# Device kinds as JAX reports them; for GPUs the first matching beginning counts.
_PEAK_BFLOAT16 = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}
_PEAK_BFLOAT16_GPU = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,  # SXM
    "NVIDIA H200 NVL": 836e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str, dtype: str = "bfloat16") -> float | None:
    """Data-sheet FLOP/s of a device; None if unknown (CPUs, other dtypes).

    Args:
      device_kind: `jax.Device.device_kind`.
      dtype: compute dtype; float32 has no single figure, for its products may run in
        several bfloat16 or TF32 passes.
    """
    if dtype not in ("bfloat16", "float16"):
        return None
    if device_kind in _PEAK_BFLOAT16:
        return _PEAK_BFLOAT16[device_kind]
    matches = (v for k, v in _PEAK_BFLOAT16_GPU.items() if device_kind.startswith(k))
    return next(matches, None)

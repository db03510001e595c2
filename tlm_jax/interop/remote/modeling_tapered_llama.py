"""Llama whose layers have MLPs of unequal width, for transformers' `trust_remote_code`.

`mlp_widths` in config.json gives the width of each layer, first to last; all else is
Llama. Written by tlm-jax (Apache-2.0); needs transformers alone.
"""

import copy

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP


class TaperedLlamaConfig(LlamaConfig):
    """A Llama config with `mlp_widths`; `intermediate_size` is the widest of them."""

    model_type = "tapered_llama"


class TaperedLlamaForCausalLM(LlamaForCausalLM):
    """Llama with the MLP of each layer replaced by one of its own width."""

    config_class = TaperedLlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        widths = config.mlp_widths
        if len(widths) != config.num_hidden_layers:
            raise ValueError(
                f"mlp_widths has {len(widths)} entries and num_hidden_layers is "
                f"{config.num_hidden_layers}"
            )
        for layer, width in zip(self.model.layers, widths, strict=True):
            of_layer = copy.copy(config)
            of_layer.intermediate_size = width
            layer.mlp = LlamaMLP(of_layer)
        self.post_init()

"""The config of a Llama with a width for each layer, as vLLM's DeciLMForCausalLM reads it.

`block_configs` in config.json says of each layer how wide its MLP is. vLLM wants to read it with
dots (`block.ffn.intermediate_size`); all else is Llama. Written by tlm-jax (Apache-2.0); needs
transformers alone.
"""

from typing import Any

from transformers import LlamaConfig


class Block(dict):
    """A dict whose keys are attributes too, so that it can still be written as JSON."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(
            (name, Block(value) if isinstance(value, dict) else value)
            for name, value in values.items()
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class TaperedDeciConfig(LlamaConfig):
    """A Llama config with `block_configs`; `intermediate_size` is the widest layer's."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_configs = [Block(block) for block in block_configs]

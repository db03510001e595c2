"""GGUF files of Llama models: tensors under Hugging Face's names, dequantised to float32.

llama.cpp rotates pairs (2k, 2k + 1) of a head, so its files hold the rows of the
query and key matrices in another order; they are put back while they are read.
"""

import functools
import pathlib
import re
from typing import Any

import numpy as np

from tlm_jax.config import UserError
from tlm_jax.interop.tensors import needs_extra

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


class GgufFile:
    """One GGUF file, memory-mapped.

    Raises:
      UserError: it is not a GGUF file, or not one of a Llama model.
    """

    def __init__(self, path: pathlib.Path) -> None:
        with needs_extra():
            import gguf
        self.where = str(path)
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError) as error:
            raise UserError(f"{path} is not a whole GGUF file: {error}") from error
        architecture = self.field("general.architecture")
        if architecture != "llama":
            raise UserError(
                f"{path}: general.architecture {architecture!r} cannot be imported; llama can"
            )
        self._tensors = {_hugging_face_name(t.name): t for t in self._reader.tensors}
        self.shapes = {
            name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()
        }

    def field(self, name: str, default: Any = None) -> Any:
        """A value of the file's metadata; `{}` in the name is left to the reader."""
        found = self._reader.get_field(name)
        return default if found is None else found.contents()

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The metadata as a Hugging Face config."""
        heads = self._number("attention.head_count")
        width = self._number("embedding_length")
        head_dim = self._number("attention.key_length", width // heads)
        for name in ("attention.value_length", "rope.dimension_count"):
            self._refuse_unless(name, head_dim)
        self._refuse_unless("rope.scaling.type", "none")
        self._refuse_unless("expert_count", 0)
        self._refuse_unless("attention.sliding_window", 0)
        self._refuse_unless("attention.scale", head_dim**-0.5)
        eps = np.float32(self._number("attention.layer_norm_rms_epsilon"))
        return {
            "model_type": "llama",
            "vocab_size": self.shapes["model.embed_tokens.weight"][0],
            "hidden_size": width,
            "intermediate_size": self._number("feed_forward_length"),
            "num_hidden_layers": self._number("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._number("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "rope_theta": float(self._number("rope.freq_base", 10_000.0)),
            # The file holds a float32; 1e-05 is meant, not 9.999999747378752e-06.
            "rms_norm_eps": float(str(eps)),
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
            "max_position_embeddings": self._number("context_length"),
        }

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` (whole heads of q and k), float32."""
        from gguf import quants

        tensor = self._tensors[name]
        try:
            rows = quants.dequantize(tensor.data[start:stop], tensor.tensor_type)
        except NotImplementedError:
            raise UserError(
                f"{self.where}: {tensor.name} has type {tensor.tensor_type.name}, which gguf "
                "cannot dequantise"
            ) from None
        rows = np.asarray(rows, np.float32)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            head_dim = self.config["head_dim"]
            pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
            return pairs.swapaxes(1, 2).reshape(rows.shape)
        return rows

    def _number(self, name: str, default: Any = None) -> Any:
        value = self.field(f"llama.{name}", default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if not isinstance(value, int | float):
            raise UserError(
                f"{self.where}: llama.{name} is {value!r}; one number for all layers can be "
                "imported"
            )
        return value

    def _refuse_unless(self, name: str, expected: Any) -> None:
        value = self.field(f"llama.{name}", expected)
        if value != expected and not (
            isinstance(expected, float) and abs(value - expected) < 1e-6 * expected
        ):
            raise UserError(
                f"{self.where}: llama.{name} is {value!r}, which cannot be represented exactly "
                f"here; only {expected!r} can be imported"
            )


def _hugging_face_name(name: str) -> str:
    """The name of a tensor on Hugging Face; one that Llama does not have stays."""
    if name in _MODEL_NAMES:
        return _MODEL_NAMES[name]
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if found and found[2] in _LAYER_NAMES:
        return f"model.layers.{found[1]}.{_LAYER_NAMES[found[2]]}.weight"
    return name

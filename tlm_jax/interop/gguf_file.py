"""GGUF files of Llama models: tensors under Hugging Face's names, dequantised to float32.

Four of llama.cpp's architectures can be read: `llama`, `qwen2` and `qwen3`, whose layers are alike,
and `deci`, a `llama` which has an MLP width and numbers of heads for each layer.

In `llama` and `deci` it rotates pairs (2k, 2k + 1) of a head, so such files hold the rows of the
query and key matrices in another order; they are put back while they are read.
"""

import functools
import math
import pathlib
import re
from typing import Any

import numpy as np

from tlm_jax.config import UserError
from tlm_jax.interop import gguf_header
from tlm_jax.mixers import RopeScaling

ARCHITECTURES = ("llama", "deci", "qwen2", "qwen3")
INTERLEAVED = ("llama", "deci")
"""Those that rotate neighbours."""
ROPE_FREQS = "rope_freqs.weight"
"""What each rotary frequency is divided by: how Llama 3's scaling is stored."""
_LLAMA3_LENGTH = 8192
"""Of all Llamas from 3.1 on; files do not say it."""
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
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
        self.where, self.files = str(path), (path,)
        try:
            header = gguf_header.read(path)
        except gguf_header.DamagedError as error:
            raise UserError(f"{path} is not a whole GGUF file: {error}") from None
        self._fields = header.fields
        self._architecture = ARCHITECTURES[0]
        architecture = self.field("general.architecture")
        if architecture not in ARCHITECTURES:
            raise UserError(
                f"{path}: general.architecture {architecture!r} cannot be imported; "
                f"{', '.join(ARCHITECTURES)} can"
            )
        self._architecture = architecture
        self._tensors = {_hugging_face_name(t.name): t for t in header.tensors}
        self._rope_freqs = self._tensors.pop(ROPE_FREQS, None)
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def field(self, name: str, default: Any = None) -> Any:
        """A value of the file's metadata: a number, bool or text, or a list of them.

        Raises:
          UserError: it is missing, and an unknown key looks like it; or a text is damaged.
        """
        if name not in self._fields:
            self._refuse_lookalike(name)
            return default
        value = self._fields[name]
        try:
            if isinstance(value, bytes):
                return value.decode()
            if isinstance(value, list):
                return [text.decode() for text in value]
        except UnicodeDecodeError:
            raise UserError(f"{self.where}: metadata {name} is not valid UTF-8") from None
        return value.tolist() if isinstance(value, np.ndarray) else value

    def _refuse_lookalike(self, name: str) -> None:
        """A key with one damaged letter must not pass for one that is not there."""
        for key in self._fields.keys() - _known_keys(self._architecture):
            pairs = zip(key, name, strict=False)
            if len(key) == len(name) and sum(a != b for a, b in pairs) == 1:
                raise UserError(
                    f"{self.where}: metadata {key!r} is not known, and looks like a damaged {name}"
                )

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The metadata as a Hugging Face config."""
        num_layers = self._number("block_count")
        if num_layers > len(self.shapes):  # before a list of that length is made
            raise UserError(
                f"{self.where}: {self._architecture}.block_count is {num_layers:,}, and there are "
                f"only {len(self.shapes)} tensors"
            )
        heads = self._each("attention.head_count", num_layers)
        kv_heads = self._each("attention.head_count_kv", num_layers, heads)
        mlp_widths = self._each("feed_forward_length", num_layers)
        width = self._number("embedding_length")
        head_dim = self._number("attention.key_length", width // heads[0])
        if "model.embed_tokens.weight" not in self.shapes:
            raise UserError(f"{self.where} has no tensor token_embd.weight")
        for name in ("attention.value_length", "rope.dimension_count"):
            self._refuse_unless(name, head_dim)
        self._refuse_unless("expert_count", 0)
        self._refuse_unless("attention.sliding_window", 0)
        self._refuse_unless("attention.scale", head_dim**-0.5)
        eps = np.float32(self._number("attention.layer_norm_rms_epsilon", kind=float))
        unequal: dict[str, Any] = {}
        if len(set(mlp_widths)) > 1:
            unequal["mlp_widths"] = mlp_widths
        if len(set(zip(heads, kv_heads, strict=True))) > 1:
            unequal["layer_heads"] = [list(pair) for pair in zip(heads, kv_heads, strict=True)]
        return {
            **self._family(),
            "vocab_size": self.shapes["model.embed_tokens.weight"][0],
            "hidden_size": width,
            "intermediate_size": max(mlp_widths),
            "num_hidden_layers": num_layers,
            "num_attention_heads": heads[0],
            "num_key_value_heads": kv_heads[0],
            "head_dim": head_dim,
            **self._rope(head_dim),
            # The file holds a float32; 1e-05 is meant, not 9.999999747378752e-06.
            "rms_norm_eps": float(str(eps)),
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
            "max_position_embeddings": self._number("context_length"),
            **unequal,
        }

    def _family(self) -> dict[str, Any]:
        """model_type and biases; `llama` and `deci` have those of Qwen2 too."""
        if self._architecture not in INTERLEAVED:
            return {"model_type": self._architecture}
        names = (f"model.layers.0.self_attn.{name}_proj.bias" for name in "qo")
        queries, out = (name in self.shapes for name in names)
        kind = "qwen2" if queries and not out else "llama"
        return {"model_type": kind} | ({"attention_bias": True} if out else {})

    def _rope(self, head_dim: int) -> dict[str, Any]:
        """Base and scaling of the rotary frequencies."""
        theta = self._number("rope.freq_base", 10_000.0, float)
        found = {"rope_theta": theta}
        kind = self.field(f"{self._architecture}.rope.scaling.type", "none")
        if kind != "linear":
            self._refuse_unless("rope.scaling.type", "none")
        else:
            factor = self._number("rope.scaling.factor", kind=float)
            found["rope_scaling"] = {"rope_type": "linear", "factor": factor}
        if self._rope_freqs is None:
            return found
        factor = float(self._rope_freqs.data.max(initial=1))
        length = self._number("rope.scaling.original_context_length", _LLAMA3_LENGTH)
        known = kind == "none" and self._architecture in INTERLEAVED  # others ignore the tensor
        if known and self._rope_freqs.type.name == "F32" and math.isfinite(factor):
            scaling = RopeScaling(method="llama3", factor=factor, original_length=length)
            expected = scaling.divisors(theta, head_dim)
            freqs = self._rope_freqs.data
            if freqs.shape == (len(expected),) and np.allclose(freqs, expected, 2e-6, 0):
                spec = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
                spec |= {"factor": factor, "original_max_position_embeddings": length}
                return found | {"rope_scaling": {"rope_type": "llama3", **spec}}
        raise UserError(
            f"{self.where}: tensor {ROPE_FREQS} is not Llama 3's scaling of rotary positions, so "
            "it cannot be imported exactly"
        )

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` (whole heads of q and k), float32."""
        from gguf import quants

        tensor = self._tensors[name]
        try:
            with np.errstate(all="ignore"):  # what overflows is reported below
                rows = quants.dequantize(tensor.data[start:stop], tensor.type)
        except NotImplementedError:
            raise UserError(
                f"{self.where}: {tensor.name} has type {tensor.type.name}, which gguf "
                "cannot dequantise"
            ) from None
        rows = np.asarray(rows, np.float32)
        if not np.isfinite(rows).all():
            raise UserError(f"{self.where}: {tensor.name} holds numbers that are not finite")
        if is_rotated(name) and self._architecture in INTERLEAVED:
            pairs = rows.reshape(-1, self.config["head_dim"] // 2, 2, *rows.shape[1:])
            return pairs.swapaxes(1, 2).reshape(rows.shape)
        return rows

    def _number(self, name: str, default: Any = None, kind: type[int] | type[float] = int) -> Any:
        """A positive number of this very type: a damaged type gives other values."""
        value = self.field(f"{self._architecture}.{name}", default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if type(value) is not kind or not 0 < float(value) < math.inf:
            raise UserError(
                f"{self.where}: {self._architecture}.{name} is {value!r}; one positive "
                f"{kind.__name__} for all layers can be imported"
            )
        return value

    def _each(self, name: str, num_layers: int, default: list[int] | None = None) -> list[int]:
        """A positive number for each layer; they may differ in `deci` alone."""
        value = self.field(f"{self._architecture}.{name}", default)
        if self._architecture != "deci" or not isinstance(value, list):
            return [self._number(name, default)] * num_layers
        if len(value) != num_layers or not all(type(n) is int and n > 0 for n in value):
            raise UserError(
                f"{self.where}: deci.{name} is {value!r}; {num_layers} positive numbers, one for "
                "each layer, can be imported"
            )
        return value

    def _refuse_unless(self, name: str, expected: Any) -> None:
        value = self.field(f"{self._architecture}.{name}", expected)
        if value != expected and not (
            isinstance(expected, float)
            and isinstance(value, float)
            and abs(value - expected) < 1e-6 * expected
        ):
            raise UserError(
                f"{self.where}: {self._architecture}.{name} is {value!r}, which cannot be "
                f"represented exactly here; only {expected!r} can be imported"
            )


@functools.cache
def _known_keys(architecture: str) -> frozenset[str]:
    """Keys of the metadata of an architecture's files that the installed gguf knows."""
    from gguf.constants import Keys

    found: set[str] = set()
    groups: list[type] = [Keys]
    while groups:
        for value in vars(groups.pop()).values():
            if isinstance(value, str):
                found.add(value.replace("{arch}", architecture))
            elif isinstance(value, type):
                groups.append(value)
    return frozenset(found)


def stored_name(name: str) -> str:
    """The name that llama.cpp gives to a tensor of Llama's, as Hugging Face calls it."""
    if name == ROPE_FREQS:
        return name
    for theirs, ours in _MODEL_NAMES.items():
        if ours == name:
            return theirs
    rest, _, kind = name.rpartition(".")
    _, _, layer, rest = rest.split(".", 3)
    theirs = next(theirs for theirs, ours in _LAYER_NAMES.items() if ours == rest)
    return f"blk.{layer}.{theirs}.{kind}"


def is_rotated(name: str) -> bool:
    """Whether the rows of a tensor, by its name on Hugging Face, are dims of queries or keys."""
    return name.rpartition(".")[0].endswith((".q_proj", ".k_proj"))


def _hugging_face_name(name: str) -> str:
    """The name of a tensor on Hugging Face; one that Llama does not have stays."""
    if name in _MODEL_NAMES:
        return _MODEL_NAMES[name]
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if found and found[2] in _LAYER_NAMES:
        return f"model.layers.{found[1]}.{_LAYER_NAMES[found[2]]}.{found[3]}"
    return name

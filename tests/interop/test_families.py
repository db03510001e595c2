"""Small random models of each family, made by transformers: the same numbers, both ways."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import LLAMA, assert_bit_equal, logits, read_run

from tlm_jax.config import ModelConfig
from tlm_jax.costs import model_costs
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.interop import exporting, importing
from tlm_jax.models import sampling, skeleton

EXTRA = "needs the extra reference (transformers with torch)"
torch = pytest.importorskip("torch", reason=EXTRA)
transformers = pytest.importorskip("transformers", reason=EXTRA)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""With the length so short that positions below 60 tell frequencies of all three kinds apart."""
WINDOWS = {"use_sliding_window": True, "sliding_window": 7}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "linear": (
        "Llama",
        {"attention_bias": True, "rope_parameters": {"rope_type": "linear", "factor": 3.0}},
    ),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", WINDOWS | {"max_window_layers": 1}),
    "qwen3": ("Qwen3", {"attention_bias": True}),
    "smollm3": (
        "SmolLM3",
        WINDOWS
        | {"num_hidden_layers": 4}
        # The defaults are ids that this vocabulary does not have.
        | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
    ),
}


def _model(kind: str, folder: pathlib.Path, bpe: pathlib.Path) -> Any:
    """A random model of a family, biases and norms included, saved in a folder."""
    family, changes = FAMILIES[kind]
    values = {key: value for key, value in LLAMA.items() if key not in ("model_type", "rope_theta")}
    values |= {"initializer_range": 0.3, **changes}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**values)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder, max_shard_size="60KB" if kind == "qwen2" else "5GB")
    (folder / "tokenizer.json").write_bytes(bpe.read_bytes())
    return model


def _theirs(folder: pathlib.Path, tokens_BL: np.ndarray) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens_BL)).logits.numpy()


def _decoded(model: ModelConfig, params: Any, tokens_BL: np.ndarray) -> np.ndarray:
    """Logits after tokens 39, 41, 43 and so on, read two at a time after the first 40."""
    B, L = tokens_BL.shape
    start, advance = sampling.make_decoder(skeleton(model))
    advance = jax.jit(advance, static_argnames="prefill")
    logits_BV, state = advance(params, tokens_BL[:, :40], start(params, B, L), prefill=True)
    found = [logits_BV]
    for index in range(40, L, 2):
        logits_BV, state = advance(params, tokens_BL[:, index : index + 2], state)
        found.append(logits_BV)
    return np.asarray(jnp.stack(found, axis=1))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_there_and_back(kind: str, bpe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Logits within 1e-4 of transformers', from a cache too; exports are theirs to load again."""
    reference = _model(kind, tmp_path / "hf", bpe)
    shards = len(list((tmp_path / "hf").glob("*.safetensors")))
    assert (shards > 1) == (kind == "qwen2")
    mesh = mesh_lib.single_device_mesh()
    importing.import_model(tmp_path / "hf", tmp_path / "run", None, mesh)
    run, params = read_run(tmp_path / "run")
    assert model_costs(run.model, 60).parameters == reference.num_parameters()
    tokens = np.random.default_rng(2).integers(300, size=(2, 60))
    ours, theirs = logits(run.model, params, tokens), _theirs(tmp_path / "hf", tokens)
    assert np.abs(ours).max() > 1
    assert np.abs(ours - theirs).max() < 1e-4
    assert np.abs(_decoded(run.model, params, tokens) - ours[:, 39::2]).max() < 1e-4

    assert exporting.export_model(tmp_path / "run", tmp_path / "out") == "llama"
    before, after = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "out")
    )
    assert (before["model_type"], before["architectures"]) == (
        after["model_type"],
        after["architectures"],
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"ny tool that reads {FAMILIES[kind][0]} reads this folder" in card
    assert np.abs(_theirs(tmp_path / "out", tokens) - theirs).max() < 1e-5
    importing.import_model(tmp_path / "out", tmp_path / "back", None, mesh)
    again, back = read_run(tmp_path / "back")
    assert again.model == run.model
    assert_bit_equal(params, back)

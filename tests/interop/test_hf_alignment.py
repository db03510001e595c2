"""`tlm align --hf`: models of transformers that are not ours, and its mistakes."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from helpers import Fails

from tlm_jax import cli

torch = pytest.importorskip("torch", reason="needs the extra reference (transformers with torch)")
transformers = pytest.importorskip("transformers", reason="needs the extra reference")

SMALL: dict[str, Any] = {"vocab_size": 300, "max_position_embeddings": 64}
MODELS: dict[str, tuple[Any, int]] = {
    "gpt2": (
        transformers.GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=3, n_head=2),
        128,
    ),
    "neox": (
        transformers.GPTNeoXConfig(
            **SMALL,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=80,
        ),
        80,
    ),
    "olmo2": (
        transformers.Olmo2Config(
            **SMALL,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=48,
            pad_token_id=0,
        ),
        48,
    ),
}
"""GPT-2 with its transposed matrices, parallel branches, and a norm after the MLP; MLP widths."""


@pytest.fixture(params=MODELS)
def saved(
    request: pytest.FixtureRequest, bpe: pathlib.Path, tmp_path: pathlib.Path
) -> tuple[pathlib.Path, int]:
    """A folder with a random model and a tokenizer, and the model's MLP width."""
    config, width = MODELS[request.param]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "model")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(bpe), bos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model", width


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_equals_the_streams_that_the_model_gives_out(
    saved: tuple[pathlib.Path, int], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """rho_block from hidden_states; rho_mlp by taking the MLP's output out of the stream."""
    folder, width = saved
    text = tmp_path / "text.txt"
    text.write_text("It is a truth universally acknowledged, that a single man " * 8)
    out = tmp_path / "out"
    words = ["align", "--hf", str(folder), "--text", str(text), "--out", str(out)]
    assert cli.main([*words, "--length", "32", "--tokens", "70"]) == 0
    assert "layer" in capsys.readouterr().out
    record = json.loads((out / "alignment.json").read_text())
    assert record["mlp_widths"] == [width] * 3

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"][:70]
    rows = [[0, *ids[i : i + 31]] for i in range(0, 70, 31)]
    assert (record["tokens"], record["first_tokens"]) == (sum(map(len, rows)), len(rows))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    blocks: list[list[np.ndarray]] = [[], []]  # of layers 0 and 1; a norm follows the last
    for row in rows:
        with torch.no_grad():
            found = model(torch.tensor([row]), output_hidden_states=True).hidden_states
        streams = [h[0].double().numpy() for h in found]
        for layer in (0, 1):
            blocks[layer].append(_cosine(streams[layer + 1] - streams[layer], streams[layer]))
    for layer in (0, 1):
        every, after = np.concatenate(blocks[layer]), [c[1:] for c in blocks[layer]]
        assert record["rho"]["block"][layer] == pytest.approx(every.mean(), abs=1e-6)
        assert record["rho"]["block_after_first"][layer] == pytest.approx(
            np.concatenate(after).mean(), abs=1e-6
        )
    # Without its MLP, layer 0 adds what `block` says less what the MLP adds.
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    norm = getattr(layers[0], "post_feedforward_layernorm", None)
    muted = norm or layers[0].mlp
    muted.register_forward_hook(
        lambda _, args, output: (
            tuple(torch.zeros_like(o) for o in output)
            if isinstance(output, tuple)
            else torch.zeros_like(output)
        )
    )
    expected: dict[str, list[np.ndarray]] = {"h": [], "z": []}
    full = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for row in rows:
        with torch.no_grad():
            h, without = model(torch.tensor([row]), output_hidden_states=True).hidden_states[:2]
            whole = full(torch.tensor([row]), output_hidden_states=True).hidden_states[1]
        h, without, whole = (x[0].double().numpy() for x in (h, without, whole))
        expected["h"].append(_cosine(whole - without, h))
        expected["z"].append(_cosine(whole - without, without))
    for name, values in expected.items():
        assert record["rho"][name][0] == pytest.approx(np.concatenate(values).mean(), abs=1e-5)


def test_mistakes_are_one_line(
    saved: tuple[pathlib.Path, int], tmp_path: pathlib.Path, fails: Fails
) -> None:
    folder, _ = saved
    (tmp_path / "text.txt").write_text("It is a truth")
    (tmp_path / "empty.txt").touch()
    to = ("--out", tmp_path / "out")
    text = ("--text", tmp_path / "text.txt")
    assert "needs --checkpoint FOLDER or --hf FOLDER" in fails("align")
    assert "needs --text" in fails("align", "--hf", folder, *to)
    assert "needs --out" in fails("align", "--hf", folder, *text)
    assert "has 64 positions" in fails("align", "--hf", folder, *text, *to, "--length", "65")
    assert "empty.txt is empty" in fails(
        "align", "--hf", folder, "--text", tmp_path / "empty.txt", *to, "--length", "32"
    )
    message = fails("align", "--hf", tmp_path / "gone", *text, *to)
    assert message.startswith(f"--hf {tmp_path / 'gone'} cannot be loaded: ")
    (folder / "config.json").write_text("{}")
    assert "cannot be loaded" in fails("align", "--hf", folder, *text, *to)

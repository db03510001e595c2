"""MLP/residual alignment against plain NumPy, and `tlm align` on a run."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from helpers import only_error

from tlm_jax import cli
from tlm_jax import config as c
from tlm_jax.analysis import alignment
from tlm_jax.data import load_tokenizer
from tlm_jax.mlp import MLPConfig
from tlm_jax.models import skeleton

TRANSFORMER = c.ModelConfig(
    vocab_size=257,
    num_layers=3,
    d_model=16,
    mlp_width=32,
    taper=c.TaperConfig(multiple_of=8),
    mixer=c.AttentionConfig(num_heads=2, head_dim=6, rope_theta=100.0),
    remat="none",
)
CHAIN = dataclasses.replace(TRANSFORMER, mlp=MLPConfig(periods=(1, 2)))
MODELS = {
    "tapered": TRANSFORMER,
    "uniform": dataclasses.replace(TRANSFORMER, taper=c.TaperConfig(schedule="uniform")),
    "chain": CHAIN,
}


def _norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def _rotate(x_LHK: np.ndarray, theta: float) -> np.ndarray:
    length, _, dim = x_LHK.shape
    out = np.empty_like(x_LHK)
    for k in range(dim // 2):
        angle = np.arange(length)[:, None] * theta ** (-2 * k / dim)
        a, b = x_LHK[..., k], x_LHK[..., k + dim // 2]
        out[..., k] = a * np.cos(angle) - b * np.sin(angle)
        out[..., k + dim // 2] = b * np.cos(angle) + a * np.sin(angle)
    return out


def _reference(model: c.ModelConfig, params: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Cosines (N, L) of one text, in float64."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    h_LD = params["embedding"][tokens]
    found: dict[str, list[np.ndarray]] = {"h": [], "z": [], "block": []}
    for segment in params["segments"].values():
        for index in range(len(segment["mixer_norm"]["scale"])):
            layer = jax.tree.map(lambda a, i=index: a[i], segment)
            x = _norm(h_LD, layer["mixer_norm"]["scale"])
            mixer = layer["mixer"]
            q, k, v = (np.einsum("ld,dhk->lhk", x, mixer[n]) for n in ("query", "key", "value"))
            q, k = _rotate(q, 100.0), _rotate(k, 100.0)
            scores = np.einsum("lhk,shk->hls", q, k) / math.sqrt(q.shape[-1])
            scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            z_LD = h_LD + np.einsum("hls,shk,hkd->ld", weights, v, mixer["out"])
            y_LD = z_LD
            for level in layer["mlp"].values():
                n = _norm(y_LD, level["norm"]["scale"])
                gate = n @ level["gate"]
                y_LD = y_LD + (gate / (1 + np.exp(-gate)) * (n @ level["up"])) @ level["down"]
            branch = y_LD - z_LD
            for name, added, stream in (
                ("h", branch, h_LD),
                ("z", branch, z_LD),
                ("block", y_LD - h_LD, h_LD),
            ):
                lengths = np.linalg.norm(added, axis=1) * np.linalg.norm(stream, axis=1)
                found[name].append((added * stream).sum(1) / lengths)
            h_LD = y_LD
    return {name: np.stack(rows) for name, rows in found.items()}


@pytest.mark.parametrize("name", MODELS)
def test_equals_numpy(name: str) -> None:
    """Every layer and measure, with and without first tokens, in packed and padded rows."""
    model = MODELS[name]
    structure = skeleton(model)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: (rng.normal(size=leaf.shape) * 0.3).astype(np.float32), structure.shapes
    )
    texts = [np.random.default_rng(i).integers(257, size=n) for i, n in enumerate((7, 5, 9))]
    batch = {n: np.zeros((2, 14), np.int32) for n in ("inputs", "positions", "document_ids")}
    for row, start, segment, text in ((0, 0, 1, 0), (0, 7, 2, 1), (1, 0, 1, 2)):
        place = (row, slice(start, start + len(texts[text])))
        batch["inputs"][place] = texts[text]
        batch["positions"][place] = np.arange(len(texts[text]))
        batch["document_ids"][place] = segment
    result = alignment.align(structure, params, [batch])
    cosines = [_reference(model, params, text) for text in texts]
    assert (result.tokens, result.first_tokens) == (21, 3)
    assert result.mlp_widths == model.mlp_widths
    for key in ("h", "z", "block"):
        every = np.concatenate([c[key] for c in cosines], axis=1).mean(1)
        after = np.concatenate([c[key][:, 1:] for c in cosines], axis=1).mean(1)
        assert np.abs(every - after).max() > 1e-3
        np.testing.assert_allclose(result.rho[key], every, atol=2e-6)
        np.testing.assert_allclose(result.rho[f"{key}_after_first"], after, atol=2e-6)
        layers = np.arange(3) - 1
        r = (layers * (every - every.mean())).sum() / np.sqrt(
            (layers**2).sum() * ((every - every.mean()) ** 2).sum()
        )
        assert result.pearson[key] == pytest.approx(r, abs=1e-4)
    assert np.abs(np.subtract(result.rho["h"], result.rho["z"])).max() > 1e-3


def test_pearson() -> None:
    """A line gives 1, and what cannot be correlated gives NaN."""
    assert alignment.pearson((0.1, 0.2, 0.3)) == pytest.approx(1)
    assert alignment.pearson((3.0, -1.0)) == pytest.approx(-1)
    assert math.isnan(alignment.pearson((0.5,)))
    assert math.isnan(alignment.pearson((0.5, 0.5)))


def test_rows_of_a_text(tmp_path: pathlib.Path) -> None:
    """Every token once, after an end-of-text token in each row."""
    (tmp_path / "text.txt").write_text("abcdefghijklmnopqrst")
    tokenizer = load_tokenizer("bytes")
    batches = alignment.text_batches(tmp_path / "text.txt", tokenizer, 2, 8)
    assert [b["inputs"].shape for b in batches] == [(2, 8), (2, 8)]
    rows = np.concatenate([b["inputs"] for b in batches])
    used = np.concatenate([b["document_ids"] for b in batches])
    assert rows[:3, 0].tolist() == [256] * 3
    kept = [bytes(row[1:][mask[1:] > 0].tolist()) for row, mask in zip(rows, used, strict=True)]
    assert b"".join(kept) == b"abcdefghijklmnopqrst"
    assert not used[3].any()


@pytest.mark.parametrize("given", [False, True])
def test_align_of_a_run(
    given: bool,
    finished_run: pathlib.Path,
    text_folder: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`tlm align`: a table, a picture and JSON, on the validation split or a text."""
    words = ["align", "--checkpoint", str(finished_run), "--out", str(tmp_path / "out")]
    if given:
        words += ["--text", str(text_folder / "00.txt")]
    assert cli.main([*words, "--tokens", "1000"]) == 0
    out = capsys.readouterr().out
    assert "Pearson's correlation" in out
    assert (tmp_path / "out" / "alignment.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "out" / "alignment.json").read_text())
    assert set(record["rho"]) == set(alignment.REFERENCES)
    assert len(record["rho"]["h"]) == 4
    assert all(-1 <= value <= 1 for values in record["rho"].values() for value in values)
    assert 500 < record["tokens"] <= 1024


def test_mistakes_are_one_line(
    finished_run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A text that is not there or empty."""
    (tmp_path / "empty.txt").touch()
    for name, message in (("gone.txt", "cannot be read"), ("empty.txt", "is empty")):
        text = str(tmp_path / name)
        assert cli.main(["align", "--checkpoint", str(finished_run), "--text", text]) == 1
        assert message in only_error(capsys.readouterr().err)


def test_side_by_side_has_a_column_a_checkpoint():
    one = {
        "checkpoint": "a",
        "mlp_widths": [8, 4],
        "rho": {"h": [0.25, -0.5]},
        "pearson": {"h": -1.0},
    }
    lines = alignment.side_by_side(
        [one, one | {"checkpoint": "b", "mlp_widths": [6, 6]}]
    ).splitlines()
    assert lines[0] == "| layer | a | b |"
    assert lines[2:] == [
        "| 0 | +0.250 (8) | +0.250 (6) |",
        "| 1 | -0.500 (4) | -0.500 (6) |",
        "| Pearson r | -1.00 | -1.00 |",
    ]
    steps = alignment.side_by_side([one | {"step": 10}, one | {"step": 2000}]).splitlines()
    assert steps[0] == "| layer | a, step 10 | a, step 2,000 |"

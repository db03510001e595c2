"""A checkpoint of one mesh continues on another."""

import json
import pathlib
import shutil

import pytest
from helpers import run

CONFIG = """
from tlm_jax import config as c


def get_config():
    return c.RunConfig(
        model=c.ModelConfig(
            vocab_size=264,
            num_layers=3,
            d_model=32,
            mlp_width=64,
            taper=c.TaperConfig(schedule="explicit", widths=(80, 80, 32)),
            mixer=c.AttentionConfig(num_heads=4),
        ),
        data=c.DataConfig(path={text!r}, tokenizer="bytes", seq_len=64, batch_size=8),
        optimizer=c.OptimizerConfig(warmup_steps=2),
        training=c.TrainingConfig(
            num_steps=12,
            log_every=1,
            eval_every=0,
            eval_batches=1,
            checkpoint_every=6,
            sample_tokens=0,
        ),
    )
"""
BEFORE, END = 6, 12


def losses(folder: pathlib.Path) -> dict[int, float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["loss"] for r in map(json.loads, lines) if r["kind"] == "train"}


def test_eight_devices_then_four_or_one(text_folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """fsdp=8 goes on as fsdp=2 x tensor=2 and on one device, with the losses it would have had."""
    config, straight = tmp_path / "config.py", tmp_path / "straight"
    config.write_text(CONFIG.format(text=str(text_folder)))

    def train(folder: pathlib.Path, devices: int, *mesh: object) -> str:
        result = run("train.py", "--config", config, "--workdir", folder, *mesh, devices=devices)
        assert result.returncode == 0, result.stderr
        return result.stdout

    train(straight, 8, "--mesh.data", 1, "--mesh.fsdp", 8)
    expected = losses(straight)
    shutil.rmtree(straight / "checkpoints" / str(END))
    (straight / "metrics.jsonl").unlink()
    for devices, mesh in ((4, ("--mesh.data", 1, "--mesh.fsdp", 2, "--mesh.tensor", 2)), (1, ())):
        moved = shutil.copytree(straight, tmp_path / str(devices))
        assert f"Continuing from step {BEFORE}" in train(moved, devices, *mesh)
        assert losses(moved) == pytest.approx(
            {step: loss for step, loss in expected.items() if step > BEFORE}, abs=1e-5
        )

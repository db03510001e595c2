"""The base of the sweeps: small enough that two CPU cores train it on 8 million tokens in minutes.

Command:   tlm sweep configs/sweeps/shapes.py (or train.py --config configs/study.py for one run)
Hardware:  a CPU; no accelerator needed
Data:      DATA, a folder that `tlm prepare` made (docs/results.md has the recipe)
Expected:  docs/results.md

8 layers, 1.7M parameters besides the embeddings; the taper is the paper's, the rest our choice.
Float32 everywhere, so that the machine does not matter. FILE.py:micro is 64 wide, has 0.43M
parameters besides the embeddings and reads 4.3M tokens: for many seeds on a CPU; :WIDTHxTOKENS has
another width and that many tokens per parameter, such as :96x20 (micro is 64x10). :medium has 12
layers, 21.7M parameters besides the embeddings, bfloat16, and reads 23M tokens: for a GPU.
"""

import dataclasses
import os
import re

from tlm_jax.config import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TaperConfig,
    TrainingConfig,
    UserError,
)


def get_config(size: str = "small") -> RunConfig:
    small = RunConfig(
        name="study",
        model=ModelConfig(
            vocab_size=4096,
            num_layers=8,
            d_model=128,
            mlp_width=384,
            taper=TaperConfig(schedule="cosine", start=1.5, end=0.5, multiple_of=16),
            mixer=AttentionConfig(num_heads=4),
            remat="none",
            scan_layers=False,
            compute_dtype="float32",
        ),
        data=DataConfig(path=os.environ.get("DATA", "data/study"), seq_len=256, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=3e-3, final_learning_rate=3e-4, warmup_steps=100),
        training=TrainingConfig(
            num_steps=2000,
            log_every=10,
            eval_every=250,
            eval_batches=32,
            checkpoint_every=250,
            keep_last=1,
            sample_tokens=0,
        ),
    )
    if size == "small":
        return small
    if size == "medium":
        return medium(small)
    if size == "micro":
        return of_width(small, 64, 10)
    if found := re.fullmatch(r"(\d+)x(\d+)", size):
        return of_width(small, *map(int, found.groups()))
    raise UserError(f"unknown size {size!r}; micro, small, medium or WIDTHxTOKENS, such as 96x20")


def of_width(small: RunConfig, d_model: int, tokens_per_parameter: int) -> RunConfig:
    """Eight layers of another width: heads of 16, MLPs of three times the width, taper in eights.

    104 d_model^2 parameters besides the embeddings. The rate falls with the root of the width.
    """
    model = dataclasses.replace(
        small.model,
        d_model=d_model,
        mlp_width=3 * d_model,
        taper=dataclasses.replace(small.model.taper, multiple_of=8),
        mixer=AttentionConfig(num_heads=d_model // 16),
    )
    data = dataclasses.replace(small.data, batch_size=8)
    steps = round(tokens_per_parameter * 104 * d_model**2 / (data.batch_size * data.seq_len))
    rate = round(3e-3 * (128 / d_model) ** 0.5, 5)
    return dataclasses.replace(
        small,
        name=f"study-{d_model}x{tokens_per_parameter}",
        model=model,
        data=data,
        optimizer=OptimizerConfig(
            learning_rate=rate, final_learning_rate=rate / 10, warmup_steps=max(1, steps // 20)
        ),
        training=dataclasses.replace(
            small.training,
            num_steps=steps,
            eval_every=max(1, steps // 8),
            checkpoint_every=max(1, steps // 4),
        ),
    )


def medium(small: RunConfig) -> RunConfig:
    """Twelve times as large, on half of the text."""
    model = dataclasses.replace(
        small.model,
        num_layers=12,
        d_model=384,
        mlp_width=1056,
        mixer=AttentionConfig(num_heads=6),
        compute_dtype="bfloat16",
    )
    return dataclasses.replace(
        small,
        name="study-medium",
        model=model,
        data=dataclasses.replace(small.data, seq_len=512, batch_size=32),
        optimizer=OptimizerConfig(
            learning_rate=1.5e-3, final_learning_rate=1.5e-4, warmup_steps=200
        ),
        training=dataclasses.replace(small.training, num_steps=1400, checkpoint_every=700),
    )

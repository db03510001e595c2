"""A small tapered model that learns to find a number in noise (S-NIAH-1).

Command:   python -m benchmarks.needle        (makes the texts, trains, evaluates, draws)
Hardware:  a CPU
Expected:  S-NIAH-1 found in 94 of 100 cases or more at 256 to 512 tokens; 15 minutes on two
           cores (docs/results.md)

It proves that the needle task can be measured. What matters is the kind of texts: see
benchmarks/needle.py.
"""

from tlm_jax.config import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TaperConfig,
    TrainingConfig,
)


def get_config() -> RunConfig:
    return RunConfig(
        name="needle",
        model=ModelConfig(
            vocab_size=4096,
            num_layers=3,
            d_model=128,
            mlp_width=256,
            taper=TaperConfig(schedule="cosine", start=1.5, end=0.5, multiple_of=16),
            mixer=AttentionConfig(num_heads=4),
            remat="none",
        ),
        data=DataConfig(seq_len=512, batch_size=8, packing="best_fit"),
        optimizer=OptimizerConfig(learning_rate=2e-3, final_learning_rate=2e-4, warmup_steps=50),
        training=TrainingConfig(
            num_steps=1500,
            loss_chunk=128,
            eval_every=100,
            eval_batches=8,
            checkpoint_every=100,
            sample_tokens=0,
        ),
    )

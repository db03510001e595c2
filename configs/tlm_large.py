"""What the configs of 440M, 760M and 1.3B share; not a config itself.

From the paper's summaries: sequences of 4,096, 2^19 tokens per step, AdamW with peak learning
rate 4e-4 on a cosine and weight decay 0.1, cosine taper 1.5 to 0.5 in multiples of 16. Our
choice: the base width and tied embeddings, betas 0.9 and 0.95, clipping at 1, 2,000 warm-up
steps, final learning rate 4e-5.
"""

from tlm_jax.architectures import with_architecture
from tlm_jax.config import (
    AttentionConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TaperConfig,
    TrainingConfig,
)

SEQ_LEN = 4096
BATCH_SIZE = 128


def large(
    name: str,
    architecture: str,
    *,
    num_layers: int,
    d_model: int,
    num_heads: int,
    mlp_width: int,
    tokens: float,
) -> RunConfig:
    """A run of one size of the paper, trained on this many tokens (rounded up to whole steps)."""
    config = RunConfig(
        name=name,
        model=ModelConfig(
            vocab_size=32_000,
            num_layers=num_layers,
            d_model=d_model,
            mlp_width=mlp_width,
            taper=TaperConfig(schedule="cosine", start=1.5, end=0.5, multiple_of=16),
            mixer=AttentionConfig(num_heads=num_heads),
            tie_embeddings=True,
            remat="full",
        ),
        data=DataConfig(
            seq_len=SEQ_LEN, batch_size=BATCH_SIZE, validation_fraction=0.001, num_workers=4
        ),
        optimizer=OptimizerConfig(
            learning_rate=4e-4,
            final_learning_rate=4e-5,
            warmup_steps=2000,
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.95,
            clip_norm=1.0,
        ),
        training=TrainingConfig(
            num_steps=-(-int(tokens) // (SEQ_LEN * BATCH_SIZE)),
            eval_every=1000,
            checkpoint_every=1000,
            keep_every=10_000,
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
    return with_architecture(config, architecture)

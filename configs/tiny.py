"""A tapered model small enough to train on a laptop in minutes.

Command:   python train.py --config configs/tiny.py --workdir runs/tiny
Uniform:   the same with --model.taper.schedule uniform (equal parameters and FLOPs)
Others:    --config configs/tiny.py:gated_attention, :hope_attention or :titans
Hardware:  a CPU; no accelerator needed
Data:      the text and the 4,096-token BPE that ship with the package
Expected:  validation loss 8.83 at the start, 5.46 after 240 steps; about 3 minutes on two cores

Shape, learning rate and length are our choice; cosine 1.5 to 0.5 in multiples of
16 is the paper's taper (arXiv 2606.23670).
"""

from tlm_jax.architectures import with_architecture
from tlm_jax.config import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TaperConfig,
    TrainingConfig,
)


def get_config(architecture: str = "transformer") -> RunConfig:
    config = RunConfig(
        name="tiny",
        model=ModelConfig(
            vocab_size=4096,
            num_layers=8,
            d_model=192,
            mlp_width=512,
            taper=TaperConfig(schedule="cosine", start=1.5, end=0.5, multiple_of=16),
            mixer=AttentionConfig(num_heads=4),
            remat="none",
        ),
        data=DataConfig(seq_len=256, batch_size=8),
        optimizer=OptimizerConfig(
            learning_rate=2.5e-3, final_learning_rate=2.5e-4, warmup_steps=30
        ),
        training=TrainingConfig(num_steps=240, eval_every=60, eval_batches=16, checkpoint_every=60),
    )
    return with_architecture(config, architecture)

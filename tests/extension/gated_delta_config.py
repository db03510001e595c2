import os

from gated_delta import GatedDeltaConfig

from tlm_jax import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig


def get_config():
    return RunConfig(
        name="gated_delta",
        model=ModelConfig(
            vocab_size=257,
            num_layers=2,
            d_model=32,
            mlp_width=64,
            mixer=GatedDeltaConfig(num_heads=2, head_dim=16),
        ),
        data=DataConfig(path=os.environ.get("TEXT"), tokenizer="bytes", seq_len=32, batch_size=4),
        optimizer=OptimizerConfig(learning_rate=4e-3, final_learning_rate=4e-4, warmup_steps=2),
        training=TrainingConfig(num_steps=4, eval_every=4, checkpoint_every=4, sample_tokens=0),
    )

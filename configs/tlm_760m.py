r"""TLM 760M: 24 layers of d_model 1536, 16 heads, mean MLP width 4096, tapered 1.5 to 0.5.

Command:   python train.py --config configs/tlm_760m.py --workdir runs/tlm_760m \
             --data.path TEXT --data.tokenizer TOKENIZER
           TEXT is your corpus (the sister papers use FineWeb-Edu), TOKENIZER a
           32,000-token tokenizer.json or SentencePiece .model (the paper: 32K)
Uniform:   the same with --model.taper.schedule uniform (equal parameters and FLOPs)
Others:    --config configs/tlm_760m.py:gated_attention, :hope_attention or :titans
Hardware:  a TPU or GPU slice; parameters and batch are split over all devices.
           Widths in multiples of 128 suit TPU lanes: --model.taper.multiple_of 128
Expected:  not measured yet

Shape: depth, width and heads of the sister papers (Atlas, table 7); MLP 8/3 d_model and
32,000 tied tokens make 728.7M parameters. The paper's own shape is not known to us.
From the paper's summaries: 50B tokens, sequences of 4,096, 2^19 tokens a step, AdamW
with peak learning rate 4e-4 on a cosine and weight decay 0.1, cosine taper 1.5 to 0.5 in
multiples of 16. Our choice: the base width and tied embeddings, betas 0.9 and 0.95,
clipping at 1, 2,000 warm-up steps, final learning rate 4e-5. Perplexity depends on the
tokenizer, so compare only runs that share it.
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

TOKENS = 50_000_000_000
SEQ_LEN = 4096
BATCH_SIZE = 128


def get_config(architecture: str = "transformer") -> RunConfig:
    config = RunConfig(
        name="tlm_760m",
        model=ModelConfig(
            vocab_size=32_000,
            num_layers=24,
            d_model=1536,
            mlp_width=4096,
            taper=TaperConfig(schedule="cosine", start=1.5, end=0.5, multiple_of=16),
            mixer=AttentionConfig(num_heads=16),
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
            num_steps=-(-TOKENS // (SEQ_LEN * BATCH_SIZE)),  # rounded up: 95,368 steps
            eval_every=1000,
            checkpoint_every=1000,
            keep_every=10_000,
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
    return with_architecture(config, architecture)

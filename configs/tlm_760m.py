r"""TLM 760M: 24 layers of d_model 1536, 16 heads, mean MLP width 4096, tapered 1.5 to 0.5.

Command:   python train.py --config configs/tlm_760m.py --workdir runs/tlm_760m \
             --data.path TEXT --data.tokenizer TOKENIZER
           TEXT is your corpus (the sister papers use FineWeb-Edu), TOKENIZER a
           32,000-token tokenizer.json or SentencePiece .model (the paper: 32K)
Uniform:   the same with --model.taper.schedule uniform (equal parameters and FLOPs)
Others:    --config configs/tlm_760m.py:gated_attention, :hope_attention, :titans, :tnt or :hybrid
Hardware:  a TPU or GPU slice; parameters and batch are split over all devices.
           Widths in multiples of 128 suit TPU lanes: --model.taper.multiple_of 128
Expected:  not measured yet

Shape: depth, width and heads of the sister papers (Atlas, table 7); MLP 8/3 d_model and
32,000 tied tokens make 728.7M parameters. The paper's own shape is not known to us.
Trained on 50B tokens (the paper), 95,368 steps; configs/tlm_large.py has the rest. Perplexity
depends on the tokenizer, so compare only runs that share it.
"""

from tlm_large import large

from tlm_jax.config import RunConfig


def get_config(architecture: str = "transformer") -> RunConfig:
    return large(
        "tlm_760m",
        architecture,
        num_layers=24,
        d_model=1536,
        num_heads=16,
        mlp_width=4096,
        tokens=50e9,
    )

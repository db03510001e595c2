r"""TLM 440M: 24 layers of d_model 1024, 16 heads, mean MLP width 4096, tapered 1.5 to 0.5.

Command:   python train.py --config configs/tlm_440m.py --workdir runs/tlm_440m \
             --data.path TEXT --data.tokenizer TOKENIZER
           TEXT is your corpus (the sister papers use FineWeb-Edu), TOKENIZER a
           32,000-token tokenizer.json or SentencePiece .model (the paper: 32K)
Uniform:   the same with --model.taper.schedule uniform (equal parameters and FLOPs)
Others:    --config configs/tlm_440m.py:gated_attention, :hope_attention, :titans, :tnt or :hybrid
Hardware:  a TPU or GPU slice; parameters and batch are split over all devices.
           Widths in multiples of 128 suit TPU lanes: --model.taper.multiple_of 128
Speed:     139,000 tokens/s on one H200 (two stairs, 8 rows, remat none; docs/gpu.md)
Expected:  losses not measured yet

Shape: depth, width and heads of the sister papers' 340M (Atlas, table 7); MLP 4 d_model
and 32,000 tied tokens make 435.5M parameters. The paper's own shape is not known to us.
Trained on 30B tokens (the paper), 57,221 steps; configs/tlm_large.py has the rest. Perplexity
depends on the tokenizer, so compare only runs that share it.
"""

from tlm_large import large

from tlm_jax.config import RunConfig


def get_config(architecture: str = "transformer") -> RunConfig:
    return large(
        "tlm_440m",
        architecture,
        num_layers=24,
        d_model=1024,
        num_heads=16,
        mlp_width=4096,
        tokens=30e9,
    )

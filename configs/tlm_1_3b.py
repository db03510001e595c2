r"""TLM 1.3B: 18 layers of d_model 2048, 8 heads, mean MLP width 8192, tapered 1.5 to 0.5.

Command:   python train.py --config configs/tlm_1_3b.py --workdir runs/tlm_1_3b \
             --data.path TEXT --data.tokenizer TOKENIZER
           TEXT is your corpus (the sister papers use FineWeb-Edu), TOKENIZER a
           32,000-token tokenizer.json or SentencePiece .model (the paper: 32K)
Uniform:   the same with --model.taper.schedule uniform (equal parameters and FLOPs)
Others:    --config configs/tlm_1_3b.py:gated_attention, :hope_attention, :titans, :tnt or :hybrid
Hardware:  a TPU or GPU slice; parameters and batch are split over all devices. On v5e:4x4 a
           chip needs 7.2 of 15.75 GiB with two stairs (--model.taper.num_segments 2).
           Widths in multiples of 128 suit TPU lanes: --model.taper.multiple_of 128
Expected:  not measured yet

Shape: depth, width and heads of the sister papers (Atlas, table 7); MLP 4 d_model and
32,000 tied tokens make 1,274M parameters. The paper's own shape is not known to us.
Trained on 100B tokens (the paper), 190,735 steps; configs/tlm_large.py has the rest. Perplexity
depends on the tokenizer, so compare only runs that share it.
"""

from tlm_large import large

from tlm_jax.config import RunConfig


def get_config(architecture: str = "transformer") -> RunConfig:
    return large(
        "tlm_1_3b",
        architecture,
        num_layers=18,
        d_model=2048,
        num_heads=8,
        mlp_width=8192,
        tokens=100e9,
    )

r"""TLM 7B: 32 layers of d_model 4096, 32 heads, mean MLP width 11008, tapered 1.5 to 0.5.

Command:   python train.py --config configs/tlm_7b.py --workdir runs/tlm_7b \
             --data.path TEXT --data.tokenizer TOKENIZER
           TEXT is your corpus, TOKENIZER a 32,000-token tokenizer.json or SentencePiece .model
Uniform:   the same with --model.taper.schedule uniform (equal parameters and FLOPs)
Hardware:  a TPU or GPU slice (docs/pods.md#from-440m-to-7b); parameters and batch are split over
           all devices
Expected:  not measured; the papers have nothing of this size

Shape: Llama 7B's (arXiv 2302.13971, table 2), with tied embeddings: 6.61B parameters. 140B tokens,
20 per parameter, are our choice; configs/tlm_large.py has the rest.
"""

from tlm_large import large

from tlm_jax.config import RunConfig


def get_config(architecture: str = "transformer") -> RunConfig:
    return large(
        "tlm_7b",
        architecture,
        num_layers=32,
        d_model=4096,
        num_heads=32,
        mlp_width=11_008,
        tokens=140e9,
    )

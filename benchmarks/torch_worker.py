"""Train steps of transformers' Llama in PyTorch, one for each line of standard input (see `race`).

    X/bin/python benchmarks/torch_worker.py '{"num_layers": 12, ...}' [--compile] [--bfloat16]

Needs torch and transformers, not this package: X is an environment of its own. The model has the
shape of ours (SwiGLU, rotary positions, RMSNorm, tied embeddings, no biases), uniform, with
parameters in float32; AdamW as torch has it, gradients clipped to norm 1. Random tokens, a
document per row. On a GPU, and with --bfloat16, products are in bfloat16 (autocast); on a GPU
attention and AdamW are torch's fused ones.
"""

import json
import pathlib
import sys
import time

import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks import race


def main() -> None:
    shape = json.loads(sys.argv[1])
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["d_model"],
        intermediate_size=shape["mlp_width"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        max_position_embeddings=shape["seq_len"],
        tie_word_embeddings=True,
        use_cache=False,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.LlamaForCausalLM(config).float().to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, weight_decay=0.1, betas=(0.9, 0.95), fused=device == "cuda"
    )
    ids = torch.randint(0, shape["vocab_size"], (shape["batch_size"], shape["seq_len"])).to(device)
    forward = torch.compile(model) if "--compile" in sys.argv else model

    bfloat16 = device == "cuda" or "--bfloat16" in sys.argv

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            loss = forward(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    begin = time.perf_counter()
    step()
    wait()
    if device == "cuda":
        torch.cuda.empty_cache()  # for the others, until its turn comes
    start = {
        "compile_s": time.perf_counter() - begin,
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }

    def end() -> dict[str, float]:
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        return {"peak_mib": race.resident_mib(), "device_peak_mib": peak / 2**20}

    race.answer(step, start=start, end=end, wait=wait)


if __name__ == "__main__":
    main()

"""Greedy continuations by transformers in PyTorch, a batch for each line of standard input.

    X/bin/python benchmarks/torch_generate_worker.py FOLDER '[[1, 2, ...], ...]' NEW_TOKENS

Needs torch and transformers, not this package: X is an environment of its own. FOLDER is a model
in transformers' format, read in float32; the prompts are rows of equal length; the cache is static.
"""

import json
import pathlib
import sys

import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks import race


def main() -> None:
    folder, prompts, new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(prompts)
    written: list[list[int]] = []

    def step() -> None:
        nonlocal written
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                cache_implementation="static",
            )
        written = out[:, ids.shape[1] :].tolist()

    step()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    race.answer(
        step,
        start={"versions": versions},
        end=lambda: {"peak_mib": race.resident_mib(), "written": written},
    )


if __name__ == "__main__":
    main()

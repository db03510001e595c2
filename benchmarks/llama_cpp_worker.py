"""What llama.cpp computes with a GGUF file: logits, a greedy continuation and a text's tokens.

    X/bin/python benchmarks/llama_cpp_worker.py FILE OUT.npz < REQUEST.json

Needs llama-cpp-python and numpy, not this package: X is an environment of its own. REQUEST.json
holds `tokens`, ids to read; `text`, to be cut into tokens; and `new`, how many tokens to write.
Everything is float32, the cache included, so that what differs is the file or the program.
"""

import json
import sys
from typing import Any

import numpy as np


def answer(file: str, tokens: list[int], text: str, new: int) -> dict[str, Any]:
    """What llama.cpp makes of a file.

    Args:
      file: path of the GGUF file.
      tokens: ids to read; no BOS is put before them.
      text: cut into tokens, without special ones.
      new: how many tokens to write greedily, whatever they are.

    Returns:
      `logits` float32 (len(tokens), V); as lists of ids `written` and `tokens`; `version`.
    """
    import llama_cpp

    settings = llama_cpp.llama_cpp.llama_model_default_params

    def as_stored() -> Any:
        # Repacked weights round differently, and Q8_0 died of an illegal instruction on a virtual
        # machine (probably AMX, which it announces).
        found = settings()
        found.use_extra_bufts = False
        return found

    llama_cpp.llama_cpp.llama_model_default_params = as_stored  # Llama has no argument for it
    float32 = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(
        file,
        n_ctx=len(tokens) + new,
        n_batch=len(tokens) + new,
        n_ubatch=len(tokens) + new,
        n_gpu_layers=0,
        logits_all=True,
        type_k=float32,
        type_v=float32,
        flash_attn=False,
        verbose=False,
    )
    model.eval(tokens)
    logits = np.array(model.scores[: len(tokens)], np.float32)
    written = [int(logits[-1].argmax())]
    while len(written) < new:
        model.eval(written[-1:])
        written.append(int(model.scores[model.n_tokens - 1].argmax()))
    cut = model.tokenize(text.encode(), add_bos=False, special=False)
    return {
        "logits": logits,
        "written": written,
        "tokens": cut,
        "version": llama_cpp.__version__,
    }


def main() -> None:
    request = json.load(sys.stdin)
    found = answer(sys.argv[1], request["tokens"], request["text"], request["new"])
    np.savez(sys.argv[2], **found)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose llama_cpp.py would hide theirs
    main()

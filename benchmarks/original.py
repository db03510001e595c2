"""A published model as transformers and lm-eval read it, from its own files.

What ours is compared with: neither our import nor our export has a part in it.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from lm_eval.models.huggingface import HFLM

_CHUNK = 512
"""Positions whose logits exist at a time: all those of a long text would need gigabytes."""


class Original(HFLM):
    """lm-eval's Hugging Face backend, but logits in pieces, and added up in float64.

    How requests become tokens, and what stands before them, is lm-eval's.
    """

    def _loglikelihood_tokens(
        self, requests: list[Any], *_: Any, **__: Any
    ) -> list[tuple[float, bool]]:
        return [self._score(context, continuation) for _, context, continuation in requests]

    @torch.no_grad()
    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        tokens = torch.tensor((context + continuation)[-(self.max_length + 1) :])
        scored = min(len(continuation), len(tokens) - 1)
        hidden = self.model.model(tokens[None, :-1]).last_hidden_state[0, -scored:]
        total, greedy = 0.0, True
        for begin in range(0, scored, _CHUNK):
            logits = self.model.lm_head(hidden[begin : begin + _CHUNK]).double()
            targets = tokens[len(tokens) - scored :][begin : begin + _CHUNK]
            total += float(logits.log_softmax(-1).gather(1, targets[:, None]).sum())
            greedy &= bool((logits.argmax(-1) == targets).all())
        return total, greedy


def read(path: pathlib.Path) -> tuple[Any, Any]:
    """(model in float32, tokenizer) of a Hugging Face folder or a GGUF file."""
    source: dict[str, Any] = {"pretrained_model_name_or_path": path}
    if path.is_file():
        source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    return model.eval(), tokenizer


def unequal_weights(model: Any, path: pathlib.Path) -> int:
    """How many numbers of the model are not those that our reader finds in the file or folder."""
    from tlm_jax.interop.gguf_file import GgufFile
    from tlm_jax.interop.tensors import SafetensorsFolder

    ours: Any = GgufFile(path) if path.is_file() else SafetensorsFolder(path)
    theirs = model.state_dict()
    return sum(
        int((ours.read(name, 0, shape[0]) != theirs[name].numpy()).sum())
        for name, shape in ours.shapes.items()
    )


def cut_digits(tokenizer: Any) -> None:
    """Cuts digits off one by one, which transformers does not know of GGUF's `smollm`.

    SmolLM's own tokenizer.json does it, and llama.cpp.
    """
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])


def backend(model: Any, tokenizer: Any, max_length: int) -> Original:
    """The two behind lm-eval's interface."""
    return Original(
        pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1, max_length=max_length
    )


def chat_ids(tokenizer: Any, message: str) -> list[int]:
    """What the model reads of a user's message."""
    messages = [{"role": "user", "content": message}]
    read = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(read["input_ids"])


@torch.no_grad()
def answer(model: Any, ids: Sequence[int], num_tokens: int) -> list[int]:
    """The greedy continuation, up to what ends a text and with it."""
    written = model.generate(
        torch.tensor([list(ids)]), do_sample=False, max_new_tokens=num_tokens, use_cache=True
    )
    return written[0, len(ids) :].tolist()

"""`alignment` of any causal language model of transformers, read from its layers with hooks.

What is needed: a list of layers as long as the model is deep, each with its MLP in `mlp`,
`feed_forward` or `ffn`. That holds for GPT-2, Llama, Mistral, Qwen, Phi, GPT-NeoX, Gemma, OLMo and
most others. Where a norm follows the MLP (Gemma 2, OLMo 2), its output is the MLP's branch.

Shapes: B batch, L length, D model, N layers, R references.
"""

import contextlib
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from tlm_jax.analysis import alignment
from tlm_jax.analysis.alignment import Alignment
from tlm_jax.config import UserError

try:
    import torch
    import transformers
except ImportError as error:
    raise UserError(
        f"--hf needs PyTorch and transformers ({error}): pip install torch transformers"
    ) from None

MLPS = ("mlp", "feed_forward", "ffn")
NORMS_AFTER = ("post_feedforward_layernorm", "post_mlp_layernorm")


def measure(name: str, *, text: pathlib.Path, tokens: int, length: int) -> Alignment:
    """Measures a model in float32.

    Args:
      name: a folder of transformers, or a name on the Hugging Face hub.
      text: a file to read, in rows that each begin with the model's BOS token, if it has one.
      tokens: about how many to average over, from the start of the text.
      length: of a row.

    Raises:
      UserError: the model or the text cannot be read, or its layers have an unsupported structure.
    """
    transformers.utils.logging.disable_progress_bar()
    with _named(name):
        config = transformers.AutoConfig.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    known = getattr(config.get_text_config(), "max_position_embeddings", length)
    if length > known:
        raise UserError(f"--length {length}: {name} has {known} positions")
    try:
        ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text {text} cannot be read: {error}") from error
    if not ids:
        raise UserError(f"text {text} is empty")
    with _named(name):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    return align(model, _rows(start, ids[:tokens], length))


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Turns what transformers says of a model that it cannot load into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--hf {name} cannot be loaded: {' '.join(str(error).split())}") from None


def _rows(start: list[int], ids: list[int], length: int) -> Iterator[np.ndarray]:
    """Rows of one text, one per batch; the last is as long as what is left."""
    room = length - len(start)
    for begin in range(0, len(ids), room):
        yield np.asarray([[*start, *ids[begin : begin + room]]])


def align(model: Any, batches: Iterable[np.ndarray]) -> Alignment:
    """The alignment of a model on batches of tokens (B, L), without padding.

    Raises:
      UserError: its layers have an unsupported structure.
    """
    layers = _layers(model)
    mlps = [_mlp(layer) for layer in layers]
    before: list[Any] = [None] * len(layers)
    added: list[Any] = [None] * len(layers)
    sums_RN = np.zeros((len(alignment.REFERENCES), len(layers)))
    count = first = 0

    def enter(index: int, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        before[index] = args[0] if args else named["hidden_states"]

    def branch(index: int, output: Any) -> None:
        added[index] = _tensor(output)

    def leave(index: int, output: Any) -> None:
        h_BLD, branch_BLD, after_BLD = before[index], added[index], _tensor(output)
        pairs = (
            (branch_BLD, h_BLD),
            (branch_BLD, after_BLD - branch_BLD),
            (after_BLD - h_BLD, h_BLD),
        )
        cosines = [
            torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1) for a, b in pairs
        ]
        sums = [c.sum() for c in cosines] + [c[:, 1:].sum() for c in cosines]
        sums_RN[:, index] += torch.stack(sums).cpu().numpy()

    hooks = []
    for i, (layer, mlp) in enumerate(zip(layers, mlps, strict=True)):
        last = _child(layer, NORMS_AFTER) or mlp
        hooks += [
            layer.register_forward_pre_hook(
                lambda _, args, named, i=i: enter(i, args, named), with_kwargs=True
            ),
            last.register_forward_hook(lambda _, args, output, i=i: branch(i, output)),
            layer.register_forward_hook(lambda _, args, output, i=i: leave(i, output)),
        ]
    try:
        model.eval()
        for tokens_BL in batches:
            with torch.no_grad():
                model(torch.from_numpy(tokens_BL).to(model.device), use_cache=False)
            count += tokens_BL.size
            first += len(tokens_BL)
    finally:
        for hook in hooks:
            hook.remove()
    stream = model.config.get_text_config().hidden_size
    widths = tuple(_width(mlp, stream) for mlp in mlps)
    return alignment.mean(widths, sums_RN, count, first)


def _layers(model: Any) -> Any:
    number = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == number]
    if len(lists) != 1:
        raise UserError(
            f"{type(model).__name__} has {len(lists)} lists of {number} layers; one is needed"
        )
    return lists[0]


def _child(layer: Any, names: tuple[str, ...]) -> Any:
    return next((getattr(layer, name) for name in names if hasattr(layer, name)), None)


def _mlp(layer: Any) -> Any:
    found = _child(layer, MLPS)
    if found is None:
        raise UserError(f"{type(layer).__name__} has no {', '.join(MLPS[:-1])} or {MLPS[-1]}")
    return found


def _width(mlp: Any, stream: int) -> int:
    """What the MLP's last matrix, which writes to the stream, reads."""
    shape = [p.shape for p in mlp.parameters() if p.ndim == 2][-1]
    return int(next((n for n in shape if n != stream), stream))


def _tensor(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output

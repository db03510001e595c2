"""Exports of every architecture in transformers, through the modeling code that travels with them.

One model has all kinds of attention and a chain of MLPs, another one all kinds of memories, so that
each of ours is compiled once.
"""

import dataclasses
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import pytest
from folders import TAPERED, assert_bit_equal, read_run, write_run

from tlm_jax import config as c
from tlm_jax import mixers
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.interop import exporting, importing
from tlm_jax.models import online, skeleton

EXTRA = "needs the extra reference (transformers with torch)"
torch = pytest.importorskip("torch", reason=EXTRA)
transformers = pytest.importorskip("transformers", reason=EXTRA)

GATED = mixers.GatedAttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8)
TITANS = mixers.TitansConfig(
    num_heads=2, head_dim=8, memory_width=16, chunk=8, window=16, num_persistent=3, max_rate=0.1
)
_change = dataclasses.replace
MODELS = {
    "attention": _change(
        TAPERED,
        num_layers=4,
        taper=c.TaperConfig(start=1.25, end=0.75, multiple_of=32),
        mlp=c.MLPConfig(
            periods=(1, 4), level_taper=c.TaperConfig(start=1.5, end=0.5, multiple_of=8)
        ),
        mixer=mixers.ListedConfig(
            mixers=(
                GATED,
                _change(GATED, gate="headwise", qk_norm=True, num_heads=2),
                _change(TAPERED.mixer, num_heads=2, num_kv_heads=1),
                TAPERED.mixer,
            )
        ),
    ),
    "memory": _change(
        TAPERED,
        tie_embeddings=False,
        mixer=mixers.ListedConfig(
            mixers=(
                _change(TITANS, variant="lmm", memory_depth=3, momentum=False, conv_width=1),
                TITANS,
                _change(TITANS, variant="mal", num_persistent=0, forgetting=False),
                _change(TITANS, variant="mac", gradient_clip=None, max_rate=None),
                _change(TITANS, chunk=16, local_chunks=(4, 8), shard=24),
            )
        ),
    ),
}
PROMPT, WRITE = 21, 64


@pytest.fixture(scope="module", autouse=True)
def _remote_code_in_a_folder_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers copies remote code into a cache and imports it from there."""
    from transformers import dynamic_module_utils

    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.setattr(sys, "path", [folder, *sys.path])
        yield


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    """Operations are tiny; threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model on both sides."""

    model: c.ModelConfig
    params: Any
    folder: pathlib.Path
    theirs: Any

    def ours(self, tokens_BL: np.ndarray) -> np.ndarray:
        """Our logits; compiled for one shape."""
        return np.asarray(_forward(self.model, self.params, tokens_BL))


def _logits(config: c.ModelConfig, params: Any, tokens_BL: jax.Array) -> jax.Array:
    model = skeleton(config).merge(params)
    return model.logits(model(tokens_BL)[0])


_forward = jax.jit(_logits, static_argnums=0)


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("remote")
    model = MODELS[request.param]
    params = write_run(folder / "run", model)
    assert exporting.export_model(folder / "run", folder / "out") == "compact"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "out", trust_remote_code=True
    )
    theirs.generation_config.eos_token_id = None  # write on
    return Exported(model, params, folder, theirs.eval())


def _tokens(rows: int, length: int = PROMPT + WRITE) -> np.ndarray:
    return np.random.default_rng(2).integers(1, 257, size=(rows, length)).astype(np.int32)


def _generate(model: Any, rows: list[Any], written: int, **options: Any) -> list[list[int]]:
    """Greedy continuations of prompts of unequal length, padded on the left."""
    length = max(map(len, rows))
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for index, row in enumerate(rows):
        tokens[index, length - len(row) :] = torch.as_tensor(row)
        mask[index, length - len(row) :] = 1
    options = {"do_sample": False, "max_new_tokens": written, "pad_token_id": 0, **options}
    return model.generate(tokens, attention_mask=mask, **options)[:, length:].tolist()


def test_logits(exported: Exported) -> None:
    """Within 1e-4 of ours, and with what was padded on the right after them."""
    tokens = _tokens(2)
    ours = exported.ours(tokens)
    with torch.no_grad():
        theirs = exported.theirs(torch.from_numpy(tokens)).logits.numpy()
        more = torch.from_numpy(np.pad(tokens, ((0, 0), (0, 5))))
        padded = exported.theirs(more).logits[:, : tokens.shape[1]].numpy()
    assert np.abs(ours).max() > 1
    assert np.abs(ours - theirs).max() < 1e-4
    assert np.abs(theirs - padded).max() < 1e-4
    assert exported.theirs.num_parameters() == sum(a.size for a in jax.tree.leaves(exported.params))


def test_generation_with_a_cache(exported: Exported) -> None:
    """64 tokens, each of which is the best by our logits of all before it."""
    prompts = _tokens(2)[:, :PROMPT]
    written = _generate(exported.theirs, list(prompts), WRITE)
    tokens = np.concatenate([prompts, np.asarray(written, np.int32)], axis=1)
    best = exported.ours(tokens).argmax(-1)[:, PROMPT - 1 : -1]
    assert best.tolist() == written


def test_a_padded_batch(exported: Exported) -> None:
    """Texts of unequal length together, with a cache and in another order, as each alone."""
    model, steps, order = exported.theirs, 3, [2, 0, 1]
    texts = [row[:length] for row, length in zip(_tokens(3), (16, 33, 24), strict=True)]
    length = max(map(len, texts))
    tokens, mask = torch.zeros(3, length, dtype=torch.long), torch.zeros(3, length)
    for index, text in enumerate(texts):
        tokens[index, length - len(text) :] = torch.from_numpy(text)
        mask[index, length - len(text) :] = 1
    with torch.no_grad():
        alone = [model(torch.from_numpy(text)[None]).logits[0] for text in texts]
        out = model(tokens[:, :-steps], attention_mask=mask[:, :-steps], use_cache=True)
        parts = [out.logits]
        for step in range(length - steps, length):
            if step == length - 1:
                out.cache.reorder_cache(torch.tensor(order))
                tokens, mask = tokens[order], mask[order]
            out = model(
                tokens[:, step : step + 1], attention_mask=mask[:, : step + 1], cache=out.cache
            )
            parts.append(out.logits)
    together = torch.cat(parts[:-1], 1)
    for index, expected in enumerate(alone):
        actual = together[index, length - len(expected) :]
        assert (actual - expected[:-1]).abs().max() < 1e-4
        assert (parts[-1][order.index(index), 0] - expected[-1]).abs().max() < 1e-4


def test_generation_of_a_padded_batch(exported: Exported) -> None:
    """Prompts of unequal length together, and with beams, as alone and without a cache."""
    model = exported.theirs
    rows = [row[:length] for row, length in zip(_tokens(3), (13, 30, 21), strict=True)]
    together = _generate(model, rows, 8)
    assert together == [_generate(model, [row], 8, use_cache=False)[0] for row in rows]
    cached, whole = (
        _generate(model, rows[:2], 4, num_beams=3, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert cached == whole


def test_the_cache_goes_on(exported: Exported) -> None:
    """Tokens in parts of any length, and gradients that reach every parameter."""
    tokens = torch.from_numpy(_tokens(2)[:, :40]).long()
    whole = exported.theirs(tokens, labels=tokens)
    cache, parts = None, []
    with torch.no_grad():
        for part in tokens.split([5, 1, 19, 15], dim=1):
            out = exported.theirs(part, cache=cache, use_cache=True)
            cache = out.cache
            parts.append(out.logits)
        with pytest.raises(ValueError, match=r"must be \(2, 45\)"):
            exported.theirs(part[:, :5], cache=cache, attention_mask=torch.ones(2, 5))
        with pytest.raises(ValueError, match="pad on the left"):
            exported.theirs(part[:, :3], attention_mask=torch.tensor([[1, 0, 1], [1, 1, 1]]))
    assert (torch.cat(parts, 1) - whole.logits).abs().max() < 1e-4
    whole.loss.backward()
    without = [n for n, p in exported.theirs.named_parameters() if p.grad is None]
    exported.theirs.zero_grad()
    assert without == []


def test_what_transformers_saves_again_comes_back(exported: Exported) -> None:
    """With the modeling code, and bit-equal."""
    again = exported.folder / "again"
    exported.theirs.save_pretrained(again)
    sources = {path.name for path in again.glob("*.py")}
    assert sources == {path.name for path in (exported.folder / "out").glob("*.py")}
    importing.import_model(again, exported.folder / "back", None, mesh_lib.single_device_mesh())
    config, back = read_run(exported.folder / "back")
    assert config.model == exported.model
    assert_bit_equal(exported.params, back)


def test_updates_inside_a_text(tmp_path: pathlib.Path) -> None:
    """Hope's levels that learn while they read: logits within 1e-4 of ours, with a cache too."""
    model = _change(
        TAPERED,
        num_layers=2,
        taper=c.TaperConfig(start=1.25, end=0.75, multiple_of=32),
        mlp=c.MLPConfig(periods=(1, 4), online_chunks=(16, 8), online_learning_rate=0.02),
    )
    params = write_run(tmp_path / "run", model)
    assert exporting.export_model(tmp_path / "run", tmp_path / "out") == "compact"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True
    ).eval()
    theirs.generation_config.eos_token_id = None
    tokens = _tokens(2, 29)

    @jax.jit
    def forward(params: Any, tokens_BL: jax.Array) -> jax.Array:
        state = online.init_state(skeleton(model), params, *tokens_BL.shape)
        return online.advance(skeleton(model), params, tokens_BL, state)[0]

    ours = np.asarray(forward(params, tokens))
    whole = torch.from_numpy(tokens).long()
    with torch.inference_mode():
        logits = theirs(whole).logits
    assert np.abs(ours - logits.numpy()).max() < 1e-4
    cached = _generate(theirs, list(tokens), 12)
    assert cached == _generate(theirs, list(tokens), 12, use_cache=False)
    with pytest.raises(ValueError, match="rows without padding"):
        _generate(theirs, [tokens[0], tokens[1, :5]], 2)
    theirs.config.online = None
    with torch.no_grad():
        assert (theirs(whole).logits[:, 8:] - logits[:, 8:]).abs().max() > 0.1


def test_texts_begin_as_in_training(tmp_path: pathlib.Path) -> None:
    """AutoTokenizer puts end-of-text before a text, so that lm-eval does."""
    write_run(tmp_path / "run", _change(TAPERED, vocab_size=4096), None)
    exporting.export_model(tmp_path / "run", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    plain = tokenizer.encode("A text", add_special_tokens=False)
    assert tokenizer.encode("A text") == [tokenizer.eos_token_id, *plain]

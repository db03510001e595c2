"""The same answers as transformers and lm-eval give with the model's original files.

With TLM_SMOLLM2 the first layers of the real SmolLM2-135M from its GGUF file (test_transformers has
all of them), else a small random Llama whose BOS, EOS and end-of-text differ.
"""

import json
import os
import pathlib
from typing import Any

import jax
import pytest
from folders import first_layers, read_run
from test_special_tokens import BOS, EOS, _folder

from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.evaluation.generation import Generator
from tlm_jax.evaluation.harness import HarnessModel
from tlm_jax.evaluation.journal import Journal
from tlm_jax.evaluation.scoring import Scorer
from tlm_jax.interop import exporting, importing
from tlm_jax.models import skeleton
from tlm_jax.models.sampling import SamplingConfig
from tlm_jax.training import restore

EXTRA = "needs the extras reference (transformers with torch) and eval"
pytest.importorskip("torch", reason=EXTRA)
pytest.importorskip("transformers", reason=EXTRA)
pytest.importorskip("lm_eval", reason=EXTRA)

SMOLLM2 = pathlib.Path(os.environ.get("TLM_SMOLLM2", ""))
TEXT = "It is a truth universally acknowledged, that in 1813 a single man must want a wife. " * 3
PAIRS = (("", "It is a truth"), ("Of 12 cats,", " 7 slept"), ("A", " wife"))


def _instances(kind: str, requests: list[Any]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, r, i, ("task", i, 1)) for i, r in enumerate(requests)]


@pytest.mark.usefixtures("gguf_files_read_once")
def test_the_original_answers_the_same(bpe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Whole texts, empty contexts and a chat: nats to 1e-3, answers token by token.

    Our import, and transformers' reading of what we export again.
    """
    from benchmarks import original

    if SMOLLM2.is_file():
        file = first_layers(SMOLLM2, 4, tmp_path / "model.gguf")
    else:
        file = _folder(tmp_path / "hf", bpe, max_position_embeddings=512)
        for name in ("config.json", "generation_config.json"):
            values = json.loads((file / name).read_text())
            values |= {"bos_token_id": BOS, "eos_token_id": [EOS, 17]}
            (file / name).write_text(json.dumps(values))
    importing.import_model(file, tmp_path / "run", None, mesh_lib.single_device_mesh())
    exporting.export_model(tmp_path / "run", tmp_path / "out")

    config, params = read_run(tmp_path / "run")
    _, saved = restore.saved_metadata(tmp_path / "run", None)
    tokenizer, model = restore.model_tokenizer(config, saved), skeleton(config.model)
    mesh, length = mesh_lib.single_device_mesh(), config.data.seq_len
    with jax.set_mesh(mesh):
        ours: Any = HarnessModel(
            Scorer(model, params, mesh, max_length=length, batch_tokens=1),
            Generator(model, params, tokenizer, mesh, max_length=length),
            tokenizer,
            prefix=restore.document_prefix(saved, tokenizer),
            journal=Journal(None, {}),
            advance=lambda *_: None,
        )
        whole = ours.loglikelihood_rolling(_instances("loglikelihood_rolling", [(TEXT,)]))
        pairs = ours.loglikelihood(_instances("loglikelihood", list(PAIRS)))
        ids = restore.prompt_ids(tmp_path, saved, tokenizer, "Who are you?", as_chat=True)
        how = SamplingConfig(temperature=0.0)
        *_, ((*written,),) = restore.continuations(
            model, params, tokenizer, ids, how, num_tokens=40, num_samples=1, seed=0
        )

    for path in (file, tmp_path / "out"):
        their_model, their_tokenizer = original.read(path)
        if path.suffix == ".gguf":
            original.cut_digits(their_tokenizer)
        theirs: Any = original.backend(their_model, their_tokenizer, length)
        assert theirs.prefix_token_id == ours.prefix_token_id == BOS
        expected = theirs.loglikelihood_rolling(_instances("loglikelihood_rolling", [(TEXT,)]))
        assert whole == pytest.approx(expected, abs=1e-3)
        for mine, other in zip(
            pairs, theirs.loglikelihood(_instances("loglikelihood", list(PAIRS))), strict=True
        ):
            assert mine[0] == pytest.approx(other[0], abs=1e-3)
            assert mine[1] == other[1]
        assert original.chat_ids(their_tokenizer, "Who are you?") == ids
        answer = original.answer(their_model, ids, 40)
        if answer[-1] in tokenizer.end_ids:
            answer.pop()
        assert written == answer
        assert their_tokenizer.decode(answer, skip_special_tokens=True) == tokenizer.decode(written)

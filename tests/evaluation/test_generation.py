"""Greedy continuations in batches equal those of each prompt alone."""

import jax
import jax.numpy as jnp
import pytest
from test_scoring import MODELS, VOCAB, model_config

from tlm_jax.data.tokenizers import Tokenizer
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.evaluation.generation import Generator
from tlm_jax.models import sampling, skeleton

LETTERS = Tokenizer(
    name="letters",
    vocab_size=VOCAB,
    eot_id=VOCAB - 1,
    fingerprint="letters",
    prefix_ids=(),
    encode=lambda text: [ord(c) - 32 for c in text],
    encode_prompt=lambda text: [ord(c) - 32 for c in text],
    encode_batch=lambda texts: [[ord(c) - 32 for c in text] for text in texts],
    decode=lambda ids: "".join(chr(32 + i) for i in ids),
    token_of=lambda i: chr(32 + i),
    id_of=lambda token: ord(token) - 32,
)
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [1], [30, 2, 17, 4, 5, 6, 7], [60, 59, 58]]


@pytest.mark.parametrize("name", MODELS)
def test_equals_one_prompt_at_a_time(name: str) -> None:
    """Filling up on the left, or batches of equal length, change nothing."""
    model = skeleton(model_config(**MODELS[name]))
    params = jax.tree.map(lambda a: 3 * a, model.init(jax.random.key(2)))
    how = sampling.SamplingConfig(temperature=0.0)
    prompts = PROMPTS if name in ("attention", "gated") else PROMPTS[::2]
    expected = []
    sample = jax.jit(sampling.make_sampler(model, how, num_tokens=20, vocab_size=VOCAB))
    for prompt in prompts:
        tokens = sample(params, jnp.asarray([prompt], jnp.int32), jax.random.key(0))[0].tolist()
        end = tokens.index(VOCAB - 1) if VOCAB - 1 in tokens else 20
        expected.append(LETTERS.decode(tokens[:end]))
    mesh = mesh_lib.single_device_mesh()
    with jax.set_mesh(mesh):
        generator = Generator(model, params, LETTERS, mesh, max_length=64)
        answers = dict(
            generator.generate(prompts, max_tokens=[20] * len(prompts), stops=[[]] * len(prompts))
        )
        assert [answers[i] for i in range(len(prompts))] == expected
        stop = expected[0][5:7]
        ((_, cut),) = generator.generate(prompts[:1], max_tokens=[20], stops=[[stop]])
        assert cut == expected[0][: expected[0].index(stop)]
        ((_, short),) = generator.generate(prompts[:1], max_tokens=[3], stops=[["absent"]])
        assert short == expected[0][:3]

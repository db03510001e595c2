"""Log-likelihoods: by hand, against separate full passes, on meshes, within memory."""

import dataclasses
import functools
import math
import os
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlm_jax.config import MeshConfig, ModelConfig, RunConfig, TaperConfig, UserError
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.distributed import sharding
from tlm_jax.evaluation import scoring
from tlm_jax.evaluation.requests import Request
from tlm_jax.evaluation.scoring import Scorer
from tlm_jax.mixers import AttentionConfig, GatedAttentionConfig, TitansConfig
from tlm_jax.mlp import MLPConfig
from tlm_jax.models import online, skeleton

VOCAB = 64
TITANS = TitansConfig(variant="mag", num_heads=2, memory_width=16, chunk=8, window=16)
MODELS = {
    "attention": {"mixer": AttentionConfig(num_heads=4, num_kv_heads=2)},
    "gated": {"mixer": GatedAttentionConfig(num_heads=4)},
    "titans": {"mixer": TITANS},
    "hope, online": {
        "mixer": AttentionConfig(num_heads=4),
        "mlp": MLPConfig(periods=(1, 2), online_chunks=(8, 16), online_learning_rate=0.01),
    },
}


def model_config(**changes) -> ModelConfig:
    defaults = {
        "vocab_size": VOCAB,
        "num_layers": 2,
        "d_model": 32,
        "mlp_width": 64,
        "taper": TaperConfig(schedule="linear", multiple_of=16),
    }
    return ModelConfig(**(defaults | changes))


def questions() -> list[Request]:
    """Three choices after each of six contexts, some short, and a single request.

    Of few different lengths, because `alone` compiles for each.
    """
    rng = random.Random(0)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCAB) for _ in range(n))

    requests = []
    for question in range(6):
        context = tokens((3, 40)[question % 2])
        requests += [
            Request(context=context, continuation=tokens(n), question=question) for n in (1, 9, 9)
        ]
    return [*requests, Request(context=tokens(40), continuation=tokens(9), question=99)]


def score(model, params, requests, **options) -> list:
    mesh = mesh_lib.single_device_mesh()
    with jax.set_mesh(mesh):
        scorer = Scorer(model, params, mesh, **({"max_length": 512} | options))
        answers = dict(scorer.score(requests))
    return [answers[i] for i in range(len(requests))]


def test_by_hand() -> None:
    """A model whose next token depends on the last one alone, with a table of probabilities.

    Guards against being off by one: a continuation's first token is predicted by the last
    token of the context.
    """
    table = np.array([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75], [0.25, 0.5, 0.25]])
    config = model_config(vocab_size=3, d_model=4, mixer=AttentionConfig(num_heads=1))
    config = dataclasses.replace(config, tie_embeddings=False, norm_eps=1e-30)
    model = skeleton(config)
    params = model.init(jax.random.key(0))
    params = jax.tree.map(jnp.array, params)
    for segment in params["segments"].values():  # layers that add nothing
        segment["mixer"]["out"] = jnp.zeros_like(segment["mixer"]["out"])
        for level in segment["mlp"].values():
            level["down"] = jnp.zeros_like(level["down"])
    # The norm of a unit vector e_a in 4 dims is 2 e_a; the head turns it into log table[a].
    params["embedding"] = jnp.eye(3, 4)
    params["head"] = jnp.zeros((4, 3)).at[:3].set(np.log(table) / 2)
    requests = [
        Request(context=(0, 1), continuation=(2, 1)),  # 1 -> 2 -> 1
        Request(context=(2,), continuation=(0,), question=1),
        Request(context=(1, 1, 0), continuation=(0, 0, 1), question=2),
    ]
    first, second, third = score(model, params, requests)
    assert first.log_likelihood == pytest.approx(math.log(0.75 * 0.5), abs=1e-5)
    assert first.is_greedy
    assert second.log_likelihood == pytest.approx(math.log(0.25), abs=1e-5)
    assert not second.is_greedy
    assert third.log_likelihood == pytest.approx(math.log(0.5 * 0.5 * 0.25), abs=1e-5)
    assert not third.is_greedy


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens):
    whole = skeleton(config).merge(params)
    return whole.logits(whole(tokens)[0])[0]


def alone(model, params, request: Request) -> tuple[float, bool]:
    """One pass over the whole request by itself, with nothing shared or filled up."""
    tokens = jnp.asarray([request.tokens[:-1]], jnp.int32)
    n = len(request.continuation)
    if model.config.mlp.online_chunks:
        batch = {
            "inputs": tokens,
            "targets": jnp.asarray([request.tokens[1:]], jnp.int32),
            "positions": jnp.arange(tokens.shape[1])[None],
            "document_ids": jnp.ones_like(tokens),
        }
        nll, _, _ = jax.jit(lambda p, b: online.online_losses(model, p, b, chunk=0))(params, batch)
        return -float(np.asarray(nll)[0, -n:].sum()), False
    logits = np.asarray(logits_of(model.config, params, tokens), np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    rows = logits[-n:]
    picked = [row[t] for row, t in zip(rows, request.continuation, strict=True)]
    return sum(picked), list(rows.argmax(-1)) == list(request.continuation)


@pytest.mark.parametrize("name", MODELS)
def test_equals_separate_passes(name: str) -> None:
    """Sharing, packing and filling change nothing beyond rounding."""
    model = skeleton(model_config(**MODELS[name]))
    params = model.init(jax.random.key(1))
    requests = questions()
    some = requests if "online" not in name else requests[1::6]
    # A greedy continuation among them, so that both answers occur.
    if "online" not in name:
        best = alone_greedy(model, params, some[0].context)
        some = [*some, Request(context=some[0].context, continuation=best, question=1000)]
    answers = score(model, params, some, batch_tokens=1024)
    for request, answer in zip(some, answers, strict=True):
        expected, greedy = alone(model, params, request)
        assert answer.log_likelihood == pytest.approx(expected, abs=2e-4)
        if "online" not in name:
            assert answer.is_greedy == greedy
    assert "online" in name or answers[-1].is_greedy


def alone_greedy(model, params, context: tuple[int, ...]) -> tuple[int, ...]:
    tokens = list(context)
    for _ in range(2):
        logits = logits_of(model.config, params, jnp.asarray([tokens], jnp.int32))
        tokens.append(int(jnp.argmax(logits[-1])))
    return tuple(tokens[len(context) :])


def test_a_mesh_of_eight_gives_the_same() -> None:
    """Rows over data and fsdp, heads and MLP units over tensor."""
    config = RunConfig(
        model=model_config(**MODELS["attention"]), mesh=MeshConfig(data=2, fsdp=2, tensor=2)
    )
    model = skeleton(config.model)
    params = model.init(jax.random.key(1))
    expected = score(model, params, questions())
    mesh = mesh_lib.make_mesh(config)
    with jax.set_mesh(mesh):
        where = sharding.param_shardings(model.shapes, model.logical_axes, mesh)
        scorer = Scorer(model, jax.device_put(params, where), mesh, max_length=512)
        answers = dict(scorer.score(questions()))
    for index, answer in enumerate(expected):
        assert answers[index].log_likelihood == pytest.approx(answer.log_likelihood, abs=1e-4)
        assert answers[index].is_greedy == answer.is_greedy


def test_devices_that_share_rows_do_not_talk() -> None:
    """Without collectives, a busy machine cannot make one device wait for another in vain."""
    model = skeleton(model_config(**MODELS["attention"]))
    mesh = mesh_lib.device_mesh(MeshConfig(data=4))
    assert mesh.shape["data"] == 4
    with jax.set_mesh(mesh):
        where = sharding.param_shardings(model.shapes, model.logical_axes, mesh)
        params = jax.device_put(model.init(jax.random.key(1)), where)
        scorer = Scorer(model, params, mesh, max_length=512)
        list(scorer.score(questions()))
        for program in scorer.programs.values():
            text = program.as_text()
            assert "all-reduce" not in text
            assert "all-gather" not in text


def test_batches_shrink_to_the_memory() -> None:
    """A limit below what a batch needs halves it; one below a row's need is an error."""
    model = skeleton(model_config(**MODELS["attention"]))
    params = model.init(jax.random.key(1))
    mesh = mesh_lib.single_device_mesh()
    with jax.set_mesh(mesh):
        free = Scorer(model, params, mesh, max_length=512, batch_tokens=1024)
        expected = dict(free.score(questions()))
        (program,) = free.programs.values()
        limit = 2 * program.memory_analysis().temp_size_in_bytes
        scorer = Scorer(model, params, mesh, max_length=512, batch_tokens=8192, memory_limit=limit)
        answers = dict(scorer.score(questions()))
        assert scorer.batch_tokens < 8192
        for index, answer in expected.items():
            assert answers[index].log_likelihood == pytest.approx(answer.log_likelihood, abs=1e-4)
        tiny = Scorer(model, params, mesh, max_length=512, memory_limit=1000)
        with pytest.raises(UserError, match=r"a row of 512 tokens needs .* smaller --max_length"):
            dict(tiny.score(questions()))


@pytest.mark.parametrize("name", ["attention", "titans"])
def test_an_answer_does_not_depend_on_which_are_wanted(name: str) -> None:
    """What a resumed evaluation still asks for has the bits that it would have had before."""
    model = skeleton(model_config(**MODELS[name]))
    params = model.init(jax.random.key(1))
    mesh = mesh_lib.single_device_mesh()
    with jax.set_mesh(mesh):
        scorer = Scorer(model, params, mesh, max_length=512, batch_tokens=512)
        every = dict(scorer.score(questions()))
        assert sorted(every) == list(range(19))
        for wanted in ([0], [3, 18], range(0, 19, 2)):
            found = dict(scorer.score(questions(), wanted))
            assert found == {index: every[index] for index in wanted}


def test_longer_requests_lose_their_beginning() -> None:
    """A request beyond max_length is scored as one with the tokens before that left out."""
    model = skeleton(model_config(**MODELS["attention"]))
    params = model.init(jax.random.key(1))
    tokens = tuple(random.Random(3).randrange(VOCAB) for _ in range(60))
    long = Request(context=tokens[:55], continuation=tokens[55:])
    short = Request(context=tokens[60 - 21 : 55], continuation=tokens[55:], question=1)
    one, other = score(model, params, [long, short], max_length=20)
    assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-5)


def test_cached_files_count_as_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page cache that fills the machine, which sysconf counts as used, leaves room for rows."""
    monkeypatch.setattr(os, "sysconf", lambda name: 0)
    assert scoring._free_memory(jax.devices()[0]) > 1 << 20

"""Decoding with a cache: one pass's values, no array of tokens by tokens, no silent overrun."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import arrays_in
from test_language_model import LENGTH, logits, parameters, random_taper, small, tokens

from tlm_jax import ops
from tlm_jax.config import AttentionConfig, TaperConfig
from tlm_jax.evaluation import generation
from tlm_jax.mixers import MixerConfig, TitansConfig
from tlm_jax.models import skeleton


@pytest.mark.parametrize("chunks", [[1] * LENGTH, [7, 1, 16]])
def test_decoding_with_a_cache_equals_the_full_pass(chunks: list[int]):
    config = random_taper(0)
    params, ids = parameters(config), np.asarray(tokens())

    @jax.jit
    def decode(ids, positions, cache):
        model = skeleton(config).merge(params)
        hidden, cache = model(ids, positions_BL=positions, cache=cache)
        return model.logits(hidden), cache

    cache, parts, done = skeleton(config).merge(params).init_cache(2, LENGTH + 3), [], 0
    for size in chunks:
        positions = np.tile(np.arange(done, done + size, dtype=np.int32), (2, 1))
        part, cache = decode(ids[:, done : done + size], positions, cache)
        parts.append(np.asarray(part))
        done += size
    full = logits(config, params, ids)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", [AttentionConfig(num_heads=2), TitansConfig(num_heads=2)])
def test_prefill_holds_no_array_of_tokens_by_tokens(mixer: MixerConfig) -> None:
    """Of 2,048 tokens on a TPU; without `prefill` there are scores against the whole cache."""
    length = 2048
    uniform = TaperConfig(schedule="uniform")
    model = skeleton(small(mixer=mixer, taper=uniform, remat="full"))

    def shapes(*, prefill: bool) -> list[tuple[int, ...]]:
        def run(params: Any, ids: Any) -> Any:
            built = model.merge(params)
            cache = built.init_cache(1, length + 64)
            return built(ids, cache=cache, prefill=prefill)

        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        with ops.tracing_for("tpu"):
            jaxpr = jax.make_jaxpr(run)(model.shapes, ids).jaxpr
        return [a for a in arrays_in(jaxpr) if sum(size >= length for size in a.shape) > 1]

    assert not shapes(prefill=True)
    assert shapes(prefill=False)


def test_tokens_beyond_the_cache_are_refused_or_nan():
    """One call that is too long has a message; a step too many is never silently wrong."""
    config = random_taper(0)
    params, ids = parameters(config), tokens()

    @jax.jit
    def begin(ids):
        model = skeleton(config).merge(params)
        return model(ids, cache=model.init_cache(2, 20))

    @jax.jit
    def go_on(ids, cache):
        model = skeleton(config).merge(params)
        return model(ids, positions_BL=jnp.full((2, 1), 20), cache=cache)

    with pytest.raises(ValueError, match="24 tokens do not fit a cache of 20; make a longer cache"):
        begin(ids)
    hidden, cache = begin(ids[:, :20])
    assert bool(np.isfinite(hidden).all())
    hidden, _ = go_on(ids[:, 20:21], cache)
    assert bool(np.isnan(hidden).all())


@pytest.mark.parametrize("scan", [True, False])
def test_tokens_are_written_where_the_cache_lies(scan: bool) -> None:
    """A token costs no copy of the caches, whose size is that of all tokens to come."""
    uniform = TaperConfig(schedule="uniform")
    model = skeleton(small(taper=uniform, scan_layers=scan))
    params = jax.jit(model.init)(jax.random.key(0))
    ids, lengths = tokens(), np.full((2,), LENGTH, np.int32)
    begin = functools.partial(generation._begin, model, 64, room=16_384)
    token, state = jax.jit(begin)(params, ids, lengths)
    caches = sum(x.nbytes for x in jax.tree.leaves(state))
    step = jax.jit(functools.partial(generation._continue, model, 64), donate_argnums=2)
    needed = step.lower(params, token, state).compile().memory_analysis()
    assert needed.alias_size_in_bytes >= caches
    assert needed.temp_size_in_bytes < caches / 2

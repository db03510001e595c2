"""Attention's kernels against a plain float32 einsum, and lowered for what is not here.

Shapes: B batch, L length, H query heads, N key/value heads, K head dim.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jaxprs import arrays_in, equations

from tlm_jax.ops import _gpu, rows, self_attention
from tlm_jax.ops import attention as attention_ops
from tlm_jax.ops.attention import SELF_ATTENTION

B, L, H, N, K = 2, 256, 4, 2, 16
INTERPRETED = dataclasses.replace(
    SELF_ATTENTION,
    versions=tuple(
        dataclasses.replace(v, function=functools.partial(v.function, interpret=True))
        if v.name == "splash"
        else v
        for v in SELF_ATTENTION.versions
    ),
)
"""With Pallas interpreting what a TPU would run."""


def inputs(dtype: str = "float32", L: int = L) -> list[jax.Array]:
    """q, k, v and document ids: two documents and padding in the first row, one in the other."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (B, L, H, K), (B, L, N, K), (B, L, N, K)
    qkv = [jax.random.normal(k, s, jnp.dtype(dtype)) for k, s in zip(keys, shapes, strict=True)]
    document_ids = np.ones((B, L), np.int32)
    document_ids[0, 90:] = 2
    document_ids[0, 240:] = 0
    return [*qkv, jnp.asarray(document_ids)]


def plain(q, k, v, document_ids, window=None) -> jax.Array:
    """By the definition, one head at a time as it were."""
    k, v = (jnp.repeat(x, H // N, axis=2) for x in (k, v))
    scores = jnp.einsum("blhk,bshk->bhls", q, k, precision="highest") / jnp.sqrt(K)
    same = document_ids[:, :, None] == document_ids[:, None, :]
    seen = same & jnp.tri(q.shape[1], dtype=bool)
    if window is not None:
        seen &= ~jnp.tri(q.shape[1], k=-window, dtype=bool)
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhls,bshk->blhk", weights, v, precision="highest")


def values_and_gradients(attention, q, k, v, document_ids):
    def loss(q, k, v):
        y = attention(q, k, v, document_ids) * (document_ids > 0)[:, :, None, None]
        return jnp.sum(jnp.sin(y)), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return y, grads


def assert_same(found, expected) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("kernel", ["reference", "xla", "chunked", "splash"])
def test_equals_the_definition(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents apart, grouped heads, gradients; Pallas interprets what a TPU would run."""
    monkeypatch.setattr(attention_ops, "SELF_ATTENTION", INTERPRETED)
    attention = functools.partial(self_attention, kernel=kernel)
    assert_same(values_and_gradients(attention, *inputs()), values_and_gradients(plain, *inputs()))


@pytest.mark.parametrize(
    ("kernel", "window"), [("reference", 7), ("xla", 1), ("xla", 100), ("chunked", 7),
                           ("chunked", 100), ("splash", 100)]
)  # fmt: skip
def test_windows(kernel: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with the last tokens only, which leaves out whole blocks and chunks of keys."""
    monkeypatch.setattr(attention_ops, "SELF_ATTENTION", INTERPRETED)
    attention = functools.partial(self_attention, kernel=kernel, window=window)
    args = inputs(L=256 if kernel == "splash" else 640)
    expected = values_and_gradients(functools.partial(plain, window=window), *args)
    assert_same(values_and_gradients(attention, *args), expected)


def test_a_window_bounds_the_scores() -> None:
    """On accelerators no array of a row's queries by its keys; cudnn, which has none, says so."""
    attention = functools.partial(self_attention, kernel="chunked", window=64)
    program = jax.make_jaxpr(functools.partial(values_and_gradients, attention))(*inputs(L=2048))
    shapes = [array.shape for array in arrays_in(program.jaxpr)]
    scores = {shape[-1] for shape in shapes if shape[-2:-1] == (H // N * 256,)}
    assert scores == {K, 1, 64 + 256 - 1}
    facts = {"length": 512, "parts": 1, "head_dim": 64, "dtype": "bfloat16"}
    assert SELF_ATTENTION.choose(target="gpu", window=64, **facts).name == "chunked"
    with pytest.raises(ValueError, match="has no windows"):
        self_attention(*inputs(), window=64, kernel="cudnn")


@pytest.mark.parametrize(
    ("length", "blocks"), [(100, 1), (128, 1), (512, 4), (640, 4), (1024, 4), (2048, 4), (8192, 8)]
)
def test_blocks_of_queries(length: int, blocks: int) -> None:
    """Their number, and the same as the definition however long they are."""
    attention = functools.partial(self_attention, kernel="xla")
    shapes = jax.eval_shape(functools.partial(inputs, L=length))
    names = [e.primitive.name for e in jax.make_jaxpr(attention)(*shapes).eqns]
    assert names.count("custom_vjp_call") == blocks
    if length in (640, 1024):
        args = inputs(L=length)
        found = values_and_gradients(attention, *args)
        assert_same(found, values_and_gradients(plain, *args))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_that_see_nothing_have_the_gradients_of_autodiff(dtype: str) -> None:
    """Such a row is the mean of the values, whatever queries and keys are."""
    q, k, v, _ = inputs(dtype, L=32)
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, (B, 32, 32)).at[:, 3:20:4].set(False)

    def by_softmax(q, k, v, mask):
        k, v = (jnp.repeat(x, H // N, axis=2) for x in (k, v))
        scores = jnp.einsum("blhk,bshk->bhls", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None], scores * K**-0.5, jnp.finfo(jnp.float32).min)
        return jnp.einsum("bhls,bshk->blhk", jax.nn.softmax(scores), v)

    def results(attention, q, k, v):
        def loss(q, k, v):
            y = attention(q, k, v, mask)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    (dq, dk, dv), y = results(attention_ops.attend, q, k, v)
    expected = results(by_softmax, *(x.astype(jnp.float32) for x in (q, k, v)))
    for found, wanted in zip((dq, dk, dv, y), jax.tree.leaves(expected), strict=True):
        atol = 2e-5 if dtype == "float32" else 2e-2
        np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=atol)
    assert not dq[:, 3:20:4].any()
    assert jnp.abs(dv).max() > 0
    if dtype == "float32":  # a query that sees nothing leaves keys alone
        changed, _ = results(attention_ops.attend, q.at[:, 3:20:4].mul(7.0), k, v)
        np.testing.assert_array_equal(changed[1], dk)


@pytest.mark.parametrize("length", [100, 300, 512])
def test_chunks_of_any_length(length: int) -> None:
    """Several chunks, the last one not full."""
    args = inputs(L=length)
    found = values_and_gradients(functools.partial(self_attention, kernel="chunked"), *args)
    assert_same(found, values_and_gradients(plain, *args))


def test_heads_that_do_not_divide_are_not_split() -> None:
    """Three key/value heads over two devices: six query heads could be split, but not theirs."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (2, 64, heads, K))
        for key, heads in zip(keys, (6, 3, 3), strict=True)
    )
    ids = jnp.ones((2, 64), jnp.int32)
    expected = self_attention(q, k, v, ids, kernel="reference")
    axes = ("data", "fsdp", "sequence", "tensor")
    mesh = jax.make_mesh((2, 1, 2, 2), axes, axis_types=(AxisType.Auto,) * 4)
    with jax.set_mesh(mesh):
        found = jax.jit(functools.partial(self_attention, kernel="chunked"))(q, k, v, ids)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("kernel", "window"), [("chunked", None), ("splash", None), ("chunked", 100), ("splash", 100)]
)
def test_on_a_mesh(kernel: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, heads and the queries of a row on different devices."""
    monkeypatch.setattr(attention_ops, "SELF_ATTENTION", INTERPRETED)
    attention = functools.partial(self_attention, kernel=kernel, window=window)
    expected = values_and_gradients(functools.partial(plain, window=window), *inputs())
    axes = ("data", "fsdp", "sequence", "tensor")
    mesh = jax.make_mesh((2, 1, 2, 2), axes, axis_types=(AxisType.Auto,) * 4)
    with jax.set_mesh(mesh):
        assert_same(values_and_gradients(attention, *inputs()), expected)


@pytest.mark.parametrize("written", [5, 128, 129, 700, 1024])
@pytest.mark.parametrize("new", [1, 5])
def test_a_cache_is_read_as_far_as_it_is_written(written: int, new: int) -> None:
    """The same as over all slots, even if NaN is in those that were never written."""
    S = 1024
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (B, length, heads, K))
        for key, length, heads in zip(keys, (new, S, S), (H, N, N), strict=True)
    )
    query_index = written - new + jnp.arange(new)
    mask = jnp.broadcast_to(query_index[:, None] >= jnp.arange(S), (B, new, S))
    expected = attention_ops.attend(q, k, v, mask)
    unread = -(-written // 128) * 128
    k, v = (x.at[:, unread:].set(jnp.nan).transpose(0, 2, 1, 3) for x in (k, v))
    found = jax.jit(attention_ops.attend_cache)(q, k, v, mask, jnp.int32(written))
    np.testing.assert_allclose(found, expected, atol=2e-6)


def traced(kernel: str, L: int = L) -> Any:
    attention = functools.partial(self_attention, kernel=kernel)
    gradients = jax.jit(functools.partial(values_and_gradients, attention))
    return gradients.trace(*inputs("bfloat16", L))


def lowered(platform: str, kernel: str) -> str:
    return traced(kernel).lower(lowering_platforms=(platform,)).as_text()


@pytest.fixture
def as_if_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks for a GPU and its cuDNN cannot be met here; all that follows them is real."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda _: True)


def test_splash_is_lowered_for_tpu() -> None:
    assert lowered("tpu", "splash").count("tpu_custom_call") >= 3  # forward, dq, and dk with dv


@pytest.mark.usefixtures("as_if_cudnn")
def test_cudnn_is_lowered_for_gpu() -> None:
    """The causal kernel and the packed one, forward and backward."""
    text = lowered("cuda", "cudnn")
    for name in ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"):
        assert len(re.findall(rf"@{re.escape(name)}\(", text)) == 2, name
    assert text.count("PADDING_CAUSAL") == 2


@pytest.mark.parametrize("kernel", ["splash", "cudnn", "chunked"])
@pytest.mark.usefixtures("as_if_cudnn")
def test_no_array_of_queries_by_keys(kernel: str) -> None:
    """In neither pass, the loops and choices inside included."""
    length = 2048

    def sizes(kernel: str) -> set[tuple[int, ...]]:
        return {a.shape[-2:] for a in arrays_in(traced(kernel, length).jaxpr.jaxpr)}

    assert (length, length) in sizes("reference")
    assert (length, length) not in sizes(kernel)


def test_documents_as_cudnn_wants_them() -> None:
    ids = jnp.asarray([[1, 1, 2, 2, 2, 0], [5, 5, 5, 5, 5, 5], [1, 2, 3, 4, 4, 0]])
    begins = rows.begins(ids)
    offsets, lengths = _gpu.packed_bounds(begins, 5)
    np.testing.assert_array_equal(
        lengths, [[2, 3, 1, -1, -1], [6, -1, -1, -1, -1], [1, 1, 1, 2, 1]]
    )
    np.testing.assert_array_equal(
        offsets, [[0, 2, 5, -1, -1, -1], [0, -1, -1, -1, -1, -1], [0, 1, 2, 3, 5, -1]]
    )


@pytest.mark.parametrize(
    ("documents", "length", "kind"),
    [(1, 66, 0), (2, 66, 1), (32, 66, 1), (33, 66, 2), (33, 1024, 3), (64, 1024, 3), (65, 1024, 2)],
)
def test_cudnn_takes_what_the_rows_need(
    documents: int, length: int, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the row with the most documents, with stand-ins for kernels that run nowhere here."""
    q = jnp.ones((2, length, 1, 8))
    monkeypatch.setattr(_gpu, "_causal", lambda q, k, v, _: q * 0)
    monkeypatch.setattr(_gpu, "_packed", lambda q, k, v, _, most: q * (1 if most == 32 else 3))
    ids = np.ones((2, length), np.int32)
    ids[1] = np.arange(length) * documents // length

    def attention() -> jax.Array:
        return _gpu.cudnn(q, q, q, jnp.asarray(ids), otherwise=lambda q, k, v: q * 2)

    np.testing.assert_array_equal(jax.jit(attention)(), q * kind)
    number = rows.kind_on_host(ids)
    assert number == jax.jit(rows.kind)(ids)
    with rows.of_kind(number):
        program = jax.jit(attention).trace()
        assert not equations(program.jaxpr.jaxpr, "cond")
        np.testing.assert_array_equal(jax.jit(attention)(), q * kind)
    assert rows.describe(number, length).startswith(
        {0: "one document", 1: "up to 32 documents", 2: "more than", 3: "up to 64"}[kind]
    )


@pytest.mark.parametrize(
    ("target", "length", "head_dim", "dtype", "kernel"),
    [
        ("cpu", 256, 64, "float32", "xla"),
        ("tpu", 256, 64, "bfloat16", "splash"),
        ("tpu", 200, 64, "bfloat16", "chunked"),
        ("gpu", 200, 64, "bfloat16", "cudnn"),
        ("gpu", 200, 64, "float32", "chunked"),
        ("gpu", 200, 256, "bfloat16", "chunked"),
    ],
)
def test_auto(target: str, length: int, head_dim: int, dtype: str, kernel: str) -> None:
    facts = {"length": length, "head_dim": head_dim, "target": target, "dtype": dtype}
    assert SELF_ATTENTION.choose("auto", **facts).name == kernel
    assert SELF_ATTENTION.choose("reference", **facts).name == "reference"


def test_what_a_kernel_cannot_do_is_said() -> None:
    short = [x[:, :200] for x in inputs()]
    with pytest.raises(ValueError, match=r"multiples of 128 tokens per device, and has 200 on 1"):
        self_attention(*short, kernel="splash")
    with pytest.raises(
        ValueError, match=r"unknown attention kernel 'flash'; known: splash, cudnn, chunked, xla"
    ):
        self_attention(*inputs(), kernel="flash")

"""The stack with layers that know nothing of language, and the examples built on it."""

import ast
import functools
import itertools
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import ROOT

from tlm_jax import segments
from tlm_jax.stack import POLICIES, Stack

DIM = 8


@pytest.fixture(params=["graph", "tree"])
def _nnx_mode(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both of Flax's ways to hold modules."""
    graph = request.param == "graph"
    with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
        yield


class Layer(nnx.Module):
    """x + conditioned stock MLP."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(DIM, rngs=rngs)
        self.condition = nnx.Linear(DIM, DIM, rngs=rngs)
        self.up = nnx.Linear(DIM, width, rngs=rngs)
        self.down = nnx.Linear(width, DIM, rngs=rngs)

    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        h = self.norm(x) * (1 + self.condition(condition))
        return x + self.down(nnx.tanh(self.up(h)))


SPECS = (24, 24, 16, 8, 16, 8, 8)  # a stack of two, twice a pattern of two, a single layer


def stack(specs, make=Layer, *, seed=0) -> Stack:
    return jax.jit(lambda key: Stack(specs, make, key=key))(jax.random.key(seed))


@functools.cache
def parameters():
    return nnx.to_pure_dict(nnx.split(stack(SPECS), nnx.Param)[1])


def model(**options) -> Stack:
    """A stack of `SPECS`, always with the same parameters."""
    abstract = nnx.eval_shape(lambda: Stack(SPECS, Layer, key=jax.random.key(0), **options))
    graphdef, state = nnx.split(abstract, nnx.Param)
    nnx.replace_by_pure_dict(state, parameters())
    return nnx.merge(graphdef, state)


def inputs() -> tuple[jax.Array, jax.Array]:
    return tuple(jax.random.normal(jax.random.key(seed), (3, DIM)) for seed in (1, 2))


def value_and_grads(**options):
    graphdef, params = nnx.split(model(**options), nnx.Param)

    def loss(params):
        y = nnx.merge(graphdef, params)(*inputs())
        return jnp.sum(jnp.square(y)), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return y, nnx.to_pure_dict(grads)


@functools.cache
def unrolled():
    return value_and_grads(scan=False)


def agree(found) -> None:
    (y, grads), (expected, expected_grads) = found, unrolled()
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    for (path, grad), other in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True
    ):
        assert np.abs(other).max() > 0, path
        np.testing.assert_allclose(grad, other, rtol=1e-4, atol=1e-5, err_msg=str(path))


PATTERNS = [
    ((16,), [(1, 1)]),
    ((16,) * 4, [(4, 1)]),
    ((24, 24, 16, 8, 8), [(2, 1), (1, 1), (2, 1)]),
    ((16, 16, 8) * 3, [(3, 3)]),
    ((24, 8, 24, 8, 16, 8, 16, 8), [(2, 2), (2, 2)]),
    ((32, 16, 16, 8) * 2 + (8,), [(2, 4), (1, 1)]),
]


@pytest.mark.parametrize(("specs", "expected"), PATTERNS)
def test_layout(specs, expected):
    """A pattern that repeats is one segment; segments cover the layers in order."""
    layout = segments.group(specs)
    assert [(s.repeats, len(s.pattern)) for s in layout] == expected
    assert sum((s.pattern * s.repeats for s in layout), ()) == specs
    assert [s.start for s in layout[1:]] == [s.stop for s in layout[:-1]]


@pytest.mark.parametrize("specs", ["aab" * 4, "ababcdcd", "aaaabbc", "abcabcabd", "abba"])
def test_no_other_cut_has_fewer_bodies(specs: str):
    """Against every way of cutting a list of layers into repeated patterns."""

    @functools.cache
    def fewest(rest: str) -> tuple[int, int]:
        choices = [(0, 0)] if not rest else []
        for period in range(1, len(rest) + 1):
            pattern = rest[:period]
            repeats = 1
            while rest.startswith(pattern * repeats):
                bodies, cuts = fewest(rest[period * repeats :])
                choices.append((bodies + period, cuts + 1))
                repeats += 1
        return min(choices)

    found = segments.group(specs)
    bodies = sum(len(s.pattern) for s in found)
    assert bodies == fewest(specs)[0]


@pytest.mark.usefixtures("_nnx_mode")
def test_scanned_equals_unrolled_in_both_modes_of_flax():
    agree(value_and_grads())


@pytest.mark.parametrize("remat", POLICIES)
def test_rematerialised_equals_unrolled(remat: str):
    agree(value_and_grads(remat=remat))


@pytest.mark.usefixtures("_nnx_mode")
def test_layers_run_in_order_of_depth():
    """`layer(i)` by hand, one after the other, is what the stack computes."""
    layers, (x, condition) = model(), inputs()
    found = layers(x, condition)
    for index, width in enumerate(SPECS):
        layer = layers.layer(index)
        assert layer.up.kernel.shape == (DIM, width)
        x = layer(x, condition)
    np.testing.assert_allclose(found, x, rtol=1e-5, atol=1e-6)
    for outside in (-1, len(SPECS)):
        with pytest.raises(IndexError):
            layers.layer(outside)


@pytest.mark.parametrize("scan", [True, False])
def test_fold_takes_and_gives_one_value_per_layer(scan: bool):
    layers, (x, condition), count = model(scan=scan), inputs(), len(SPECS)
    given = {"index": jnp.arange(count), "pair": jnp.arange(2 * count).reshape(count, 2)}

    def body(layer, x, given):
        return layer(x, condition), (layer.up.bias.shape[-1] + given["index"], given["pair"], x)

    y, outputs = layers.fold(body, x, layers.per_segment(given))
    numbers, pairs, before = layers.per_layer(outputs)
    np.testing.assert_array_equal(numbers, np.asarray(SPECS) + np.arange(count))
    np.testing.assert_array_equal(pairs, given["pair"])
    for index in range(count):
        np.testing.assert_allclose(before[index], x, rtol=1e-5, atol=1e-6)
        x = layers.layer(index)(x, condition)
    np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-6)


class Dropout(nnx.Module):
    """A stock layer without parameters, whose key is an argument."""

    def __init__(self, _: int, *, rngs: nnx.Rngs):
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x: jax.Array, key: jax.Array) -> jax.Array:
        return self.dropout(x, rngs=key)


@pytest.mark.parametrize("scan", [True, False])
def test_layers_without_parameters_run_with_keys_of_their_own(scan: bool):
    layers = Stack((0, 0, 0, 1), Dropout, key=jax.random.key(0), scan=scan)
    keys, x = jax.random.split(jax.random.key(3), 4), jnp.ones((64, DIM))
    found, _ = layers.fold(lambda layer, x, key: (layer(x, key), None), x, layers.per_segment(keys))
    for key in keys:
        x = nnx.Dropout(0.5)(x, rngs=key)
    assert 0 < jnp.count_nonzero(x) < x.size / 8
    np.testing.assert_array_equal(found, x)


def test_a_layers_parameters_depend_on_its_index_and_the_key_alone():
    """So twins of different shape start equal wherever shapes are equal."""
    tapered, uniform = stack((24, 24, 16, 8, 8)), stack((16,) * 5)
    for index in range(5):
        ours, theirs = tapered.layer(index), uniform.layer(index)
        np.testing.assert_array_equal(ours.condition.kernel[...], theirs.condition.kernel[...])
        alone = Layer(16, rngs=nnx.Rngs(params=jax.random.fold_in(jax.random.key(0), index)))
        np.testing.assert_allclose(alone.up.kernel[...], theirs.up.kernel[...], rtol=1e-6)
    kernels = [uniform.layer(index).up.kernel[...] for index in range(5)]
    assert all(np.abs(np.subtract(a, b)).max() > 0.1 for a, b in itertools.pairwise(kernels))
    other = stack((16,) * 5, seed=1).layer(0)
    assert np.abs(np.subtract(other.up.kernel[...], kernels[0])).max() > 0.1


def test_stacking_does_not_change_the_scale_of_stock_initialisers():
    """With the layers counted into the fan-in, the deviation would be a quarter of this."""
    layers = stack((64,) * 16, lambda width, rngs: nnx.Linear(width, 256, rngs=rngs))
    kernels = np.stack([layers.layer(index).kernel[...] for index in range(16)])
    assert kernels.shape == (16, 64, 256)
    np.testing.assert_allclose(kernels.std(axis=(1, 2)), 1 / 8, rtol=0.05)


def test_bad_arguments():
    with pytest.raises(ValueError, match="at least one layer"):
        Stack((), Layer, key=jax.random.key(0))
    with pytest.raises(ValueError, match="unknown remat 'some'; known: none, full, dots"):
        Stack((8,), Layer, key=jax.random.key(0), remat="some")


SMALL = {"steps": 3, "batch_size": 8, "num_layers": 2, "d_model": 16, "num_heads": 2}


@pytest.mark.parametrize("name", ["vit", "dit"])
def test_examples_import_no_language_model_code(name: str):
    source = (ROOT / "examples" / f"{name}.py").read_text()
    assert len(source.splitlines()) <= 200
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    ours = {node.module for node in imports if node.module.startswith("tlm_jax")}
    assert ours == {"tlm_jax.stack", "tlm_jax.taper"}


def test_vit(capsys: pytest.CaptureFixture[str]):
    from examples import vit

    config = vit.Config(**SMALL, seeds=2, mlp_width=32, num_segments=2)
    accuracies = vit.main(config)
    assert {name: len(found) for name, found in accuracies.items()} == {"tapered": 2, "uniform": 2}
    assert all(0 <= percent <= 100 for found in accuracies.values() for percent in found)
    lines = [line for line in capsys.readouterr().out.splitlines() if "parameters" in line]
    assert len({line.split()[3] for line in lines}) == 1, "twins are of equal size"


def test_dit(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    from examples import dit

    picture = tmp_path / "digits.png"
    config = dit.Config(**SMALL, mlp_width=32, num_segments=2, samples=2, picture=str(picture))
    dit.main(config)
    assert picture.read_bytes().startswith(b"\x89PNG")
    lines = [line for line in capsys.readouterr().out.splitlines() if "parameters" in line]
    assert len(lines) == 2
    assert len({line.split("; ")[1] for line in lines}) == 1, "twins are of equal size"


class Recording(nnx.Module):
    """A layer whose cache has its own width and takes what went through."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.scale, self.width = nnx.Param(jax.random.normal(rngs.params(), ())), width

    def init_cache(self) -> jax.Array:
        return jnp.zeros((self.width,))

    def decode(self, x: jax.Array, cache: jax.Array, shift: float) -> tuple[jax.Array, jax.Array]:
        x = x * self.scale[...] + shift
        return x, cache + x


@pytest.mark.parametrize("specs", [(3, 3, 2), (1, 2, 1, 2, 1, 2, 3), (2, 1, 3)])
@pytest.mark.parametrize("scan", [True, False])
def test_every_layer_decodes_with_its_own_cache(specs: tuple[int, ...], scan: bool) -> None:
    """One by one and in loops, patterns of several layers too."""
    layers = Stack(specs, Recording, key=jax.random.key(0), scan=scan)
    assert [cache.shape for cache in layers.init_cache()] == [(width,) for width in specs]
    filled = [cache + number for number, cache in enumerate(layers.init_cache())]
    x, expected = jnp.ones(()), []
    for index, cache in enumerate(filled):
        x, cache = layers.layer(index).decode(x, cache, 0.5)
        expected.append(cache)
    for in_loops in (False, True):
        found, caches = layers.decode(jnp.ones(()), filled, 0.5, in_loops=in_loops)
        np.testing.assert_allclose(found, x, rtol=1e-6)
        for one, other in zip(caches, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)

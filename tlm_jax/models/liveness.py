"""How much memory a traced program holds at a time, without compiling it.

A program is walked in the order in which it was traced. What a compiler would fuse (elementwise
operations, broadcasts, slices) takes no memory unless a product, a loop or a kernel reads it or
it is a result; everything else is allocated where it is made and freed after its last use.
The order, the fusion and the layout that a compiler really chooses are its own business, so
that all of this is an estimate.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxprs_in_params

from tlm_jax.validation import round_up

_ALIASES = frozenset(
    [
        "reshape",
        "squeeze",
        "expand_dims",
        "name",
        "stop_gradient",
        "optimization_barrier",
        "copy",
        "copy_p",
        "reduce_precision",
        "sharding_constraint",
        "bitcast_convert_type",
    ]
)
"""Results take the place of operands, one for one."""
_REDUCTIONS = frozenset(
    [
        "reduce_sum",
        "reduce_max",
        "reduce_min",
        "reduce_and",
        "reduce_or",
        "reduce_prod",
        "argmax",
        "argmin",
    ]
)
"""Allocate their results and read what is fused into them."""
_ALLOCATES = frozenset(
    [
        "dot_general",
        "conv_general_dilated",
        "scan",
        "while",
        "cond",
        "pallas_call",
        "custom_call",
        "gather",
        "scatter",
        "scatter-add",
        "sort",
        "cumsum",
        "cumprod",
        "cummax",
        "cumlogsumexp",
        "dynamic_update_slice",
        "reduce_window",
        "fft",
        "cholesky",
        "triangular_solve",
        "top_k",
        "random_bits",
        "shard_map",
        "ragged_dot",
        "dot_product_attention_fwd",
        "dot_product_attention_bwd",
    ]
)
"""Allocate their results and need their operands in memory."""
_COSTLY = frozenset(
    [
        "exp",
        "log",
        "tanh",
        "erf",
        "logistic",
        "pow",
        "sin",
        "cos",
        "div",
        "rsqrt",
        "exp2",
        "log1p",
        "expm1",
    ]
)
"""Elementwise, but not computed twice for two readers."""
_LOOPS = frozenset({"scan", "while", "cond", "pallas_call"})


@dataclasses.dataclass(kw_only=True, eq=False)
class _Value:
    """An array of the program."""

    size: int
    """Bytes."""
    stacked: int
    """Bytes if a loop puts it into a stack, where what products and kernels give stays as it is."""
    made: int = -1
    """Node that makes it; -1 are arguments."""
    allocated: bool = False


@dataclasses.dataclass(kw_only=True, eq=False)
class _Node:
    """An operation, with those of inlined functions in their place."""

    name: str
    reads: list[_Value]
    makes: list[_Value]
    inner: int = 0
    """Bytes that a loop's body holds besides its operands and results."""
    depends: bool = False
    """On the cotangents: it belongs to the backward pass."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes that a program holds besides its arguments."""

    peak: int
    """The peak, results included."""
    results: tuple[int, ...]
    """Each of the results, if a loop stacks them."""
    kept: int = 0
    """Where its second part begins (`held`)."""
    before: int = 0
    """The peak of the first part."""
    after: int = 0
    """The peak of the second."""


def held(
    program: ClosedJaxpr, *, cotangents: int = 0, whole_calls: bool = True, tiled: bool = False
) -> Held:
    """Memory of a traced program.

    Args:
      program: of `jax.make_jaxpr`.
      whole_calls: a function that reads one belongs to the second part from its beginning, such as
        a rematerialised layer with its recomputation; False looks at each operation in it.
      tiled: see `array_bytes`.
      cotangents: so many of the last arguments are cotangents; the second part of the program
        begins at the first operation that reads one.
    """
    walk = _Walk(tiled=tiled, whole_calls=whole_calls)
    env = {v: walk.value(v.aval) for v in program.jaxpr.invars}
    late = [env[v] for v in program.jaxpr.invars[len(program.jaxpr.invars) - cotangents :]]
    outs = walk.inline(program.jaxpr, env, late=set(late) if cotangents else set(), depends=False)
    return _measure(walk.nodes, outs, in_place=tiled)


class _Walk:
    """Lists a program's operations, functions inlined."""

    def __init__(self, *, tiled: bool, whole_calls: bool) -> None:
        self.nodes: list[_Node] = []
        self.tiled, self.whole_calls = tiled, whole_calls

    def value(self, aval: Any, made: int = -1, *, row_major: bool = False) -> _Value:
        """An array of the program."""
        size = array_bytes(aval, tiled=self.tiled, row_major=row_major)
        return _Value(size=size, stacked=size, made=made)

    def inline(
        self, jaxpr: Jaxpr, env: dict[Any, _Value], *, late: set[_Value], depends: bool
    ) -> list[_Value | None]:
        """Adds the operations of `jaxpr`; returns its results."""

        def read(atom: Any) -> _Value | None:
            if isinstance(atom, Literal):
                return None
            if atom not in env:  # a constant
                env[atom] = self.value(atom.aval)
            return env[atom]

        for eqn in jaxpr.eqns:
            given = [read(atom) for atom in eqn.invars]
            reads = [v for v in given if v is not None]
            here = depends or any(v in late for v in reads)
            inner = list(jaxprs_in_params(eqn.params))
            name, inlined = eqn.primitive.name, False
            if name in _ALIASES and len(eqn.outvars) == len(given) and all(given):
                results: list[Any] = given
            elif inner and name not in _LOOPS and name not in _ALLOCATES:
                sub, inlined = inner[0], True
                body = dict(zip(sub.invars, given[len(given) - len(sub.invars) :], strict=True))
                results = self.inline(
                    sub,
                    {k: v for k, v in body.items() if v is not None},
                    late=late,
                    depends=here and self.whole_calls,
                )
            else:
                results = self._node(eqn, reads, inner, here)
            for var, value in zip(eqn.outvars, results, strict=True):
                env[var] = value if value is not None else self.value(var.aval)
                if here and not (inlined and not self.whole_calls):
                    late.add(env[var])
        return [read(atom) for atom in jaxpr.outvars]

    def _node(
        self, eqn: Any, reads: list[_Value], inner: Iterable[Any], depends: bool
    ) -> list[_Value]:
        name = eqn.primitive.name
        pallas = name == "pallas_call"
        makes = [self.value(v.aval, len(self.nodes), row_major=pallas) for v in eqn.outvars]
        if pallas:  # operands lie as the kernel wants them
            for atom, value in zip(
                [a for a in eqn.invars if not isinstance(a, Literal)], reads, strict=True
            ):
                value.size = max(value.size, self.value(atom.aval, row_major=True).size)
        if name == "dot_general":
            makes[0].stacked = array_bytes(eqn.outvars[0].aval, tiled=self.tiled, row_major=True)
        body = 0
        if not pallas:
            body = max((_body(sub, self.tiled) for sub in inner), default=0)
        self.nodes.append(_Node(name=name, reads=reads, makes=makes, inner=body, depends=depends))
        return makes


def _body(jaxpr: Jaxpr, tiled: bool) -> int:
    """What one iteration of a loop holds besides operands and results of the loop."""
    walk = _Walk(tiled=tiled, whole_calls=True)
    env = {v: walk.value(v.aval) for v in jaxpr.invars}
    outs = walk.inline(jaxpr, env, late=set(), depends=False)
    return _measure(walk.nodes, outs, in_place=tiled).peak


def _measure(nodes: list[_Node], outs: list[_Value | None], *, in_place: bool) -> Held:
    results = [v for v in outs if v is not None]
    nodes = _needed(nodes, results)
    made_by = {id(v): node for node in nodes for v in node.makes}
    readers: dict[int, int] = {}
    for node in nodes:
        for v in {id(v): v for v in node.reads}.values():
            readers[id(v)] = readers.get(id(v), 0) + 1
            if node.name in _ALLOCATES:
                v.allocated = True
    for node in nodes:
        if node.name in _ALLOCATES or node.name in _REDUCTIONS:
            for v in node.makes:
                v.allocated = True
        elif node.name in _COSTLY and readers.get(id(node.makes[0]), 0) > 1:
            node.makes[0].allocated = True
    for v in results:
        v.allocated = True

    memo: dict[int, list[_Value]] = {}

    def sources(v: _Value) -> list[_Value]:
        """What lies in memory that computing `v` on the way reads."""
        if v.allocated or id(v) not in made_by:
            return [v]
        if id(v) not in memo:
            found = {id(s): s for r in made_by[id(v)].reads for s in sources(r)}
            memo[id(v)] = list(found.values())
        return memo[id(v)]

    real = [n for n in nodes if any(v.allocated for v in n.makes)]
    last: dict[int, int] = {}
    uses: list[list[_Value]] = []
    for time, node in enumerate(real):
        found = {id(s): s for r in node.reads for s in sources(r)}
        uses.append(list(found.values()))
        for key in found:
            last[key] = time
    for v in results:
        last[id(v)] = len(real)

    live = peak = kept = before = after = 0
    in_second = False
    alive: dict[int, _Value] = {}
    for time, node in enumerate(real):
        if node.depends and not in_second:
            in_second, kept = True, live
        dying = [v for v in uses[time] if last[id(v)] == time and id(v) in alive]
        new = [v for v in node.makes if v.allocated and id(v) not in alive]
        size = sum(v.size for v in new)
        reused = 0
        if in_place and node.name not in _ALLOCATES:
            reused = max((v.size for v in dying if v.size <= size), default=0)
        top = live + size - reused + node.inner
        peak = max(peak, top)
        if in_second:
            after = max(after, top)
        else:
            before = max(before, top)
        for v in new:
            if id(v) in last:
                alive[id(v)] = v
                live += v.size
        for v in dying:
            live -= v.size
            del alive[id(v)]
    sizes = tuple(0 if v is None else v.stacked for v in outs)
    return Held(peak=peak, results=sizes, kept=kept, before=before, after=after)


def _needed(nodes: list[_Node], results: list[_Value]) -> list[_Node]:
    """The operations that results depend on."""
    wanted = {id(v) for v in results}
    kept = []
    for node in reversed(nodes):
        if any(id(v) in wanted for v in node.makes):
            kept.append(node)
            wanted |= {id(v) for v in node.reads}
    return kept[::-1]


def array_bytes(aval: Any, *, tiled: bool = False, row_major: bool = False) -> int:
    """Bytes of an array.

    Args:
      aval: what has a shape and a dtype.
      tiled: False is a CPU, which computes in float32 at least; True is a TPU's memory, where an
        array lies in tiles of 8 x 128 elements, and the compiler takes the two dims that leave the
        least of them empty.
      row_major: the last two dims instead, as kernels want their operands.
    """
    shape = tuple(getattr(aval, "shape", ()))
    item = getattr(getattr(aval, "dtype", None), "itemsize", 4)
    if not tiled and jnp.issubdtype(getattr(aval, "dtype", jnp.int32), jnp.floating):
        item = max(item, 4)
    size = math.prod(shape)
    if tiled and len(shape) > 1 and size:
        rows, last = round_up(shape[-2], 8), round_up(shape[-1], 128)
        if row_major:
            return item * size // (shape[-2] * shape[-1]) * rows * last
        filled = (
            math.prod(
                round_up(n, 128 if i == lane else 8 if i == row else 1) for i, n in enumerate(shape)
            )
            for lane in range(len(shape))
            for row in range(len(shape))
            if row != lane
        )
        return item * min(filled)
    return item * size

"""What tests that read programs share."""

from collections.abc import Iterator
from typing import Any

from jax.extend.core import jaxprs_in_params


def arrays_in(jaxpr: Any) -> Iterator[Any]:
    """Abstract values of all results in a jaxpr, inner ones included."""
    for eqn in _all(jaxpr):
        yield from (v.aval for v in eqn.outvars if hasattr(v.aval, "shape"))


def equations(jaxpr: Any, primitive: str) -> list[Any]:
    """Those of a jaxpr and its inner ones that call a primitive."""
    return [eqn for eqn in _all(jaxpr) if eqn.primitive.name == primitive]


def _all(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from _all(inner)

"""What tests that read programs share."""

from collections.abc import Iterator
from typing import Any

from jax.extend.core import jaxprs_in_params


def arrays_in(jaxpr: Any) -> Iterator[Any]:
    """Abstract values of all results in a jaxpr, inner ones included."""
    for eqn in jaxpr.eqns:
        yield from (v.aval for v in eqn.outvars if hasattr(v.aval, "shape"))
        for inner in jaxprs_in_params(eqn.params):
            yield from arrays_in(inner)

"""The processes of a job compare what they were started with, before they work together.

Processes that differ would silently train a model that nobody asked for, or wait for each other
forever. They compare through JAX's coordination service and not on their
devices, so that no difference can make the comparison itself hang.
"""

import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Mapping, Sequence

import tlm_jax
from tlm_jax.config import UserError
from tlm_jax.validation import some

_SECONDS = 24 * 3600
"""Another process may still be tokenising its text; JAX itself notices a dead one."""
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_SHOWN = 4


def code_version() -> dict[str, str]:
    """Versions of this package and of those that decide what it computes, and a hash of its source.

    The source and not its git revision: that says nothing of changes that are not committed, and
    an installed package has none.
    """
    root = pathlib.Path(tlm_jax.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    versions = {f"version of {name}": importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "version of tlm_jax": tlm_jax.__version__,
        "hash of tlm_jax's source": digest.hexdigest()[:12],
        **versions,
    }


def require_equal(topic: str, facts: Mapping[str, str]) -> None:
    """Ends the job in all of its processes unless all come here with the same facts.

    Does nothing in a job of one process. Every process must call it with the same topics in the
    same order.

    Args:
      topic: tells several comparisons of a job apart.
      facts: values by name, as they are to be shown.

    Raises:
      UserError: in every process, what differs and on which.
    """
    import jax
    from jax._src import distributed  # JAX has no public name for it; Orbax does the same

    state = distributed.global_state
    client = state.client
    if client is None or state.num_processes == 1:
        return
    key = f"tlm_jax/{topic}"

    def get(name: str) -> str:
        return client.blocking_key_value_get(f"{key}/{name}", _SECONDS * 1000)

    client.key_value_set(f"{key}/{state.process_id}", json.dumps(dict(facts)))
    if state.process_id == 0:
        lines = differences([json.loads(get(str(i))) for i in range(state.num_processes)])
        client.key_value_set(f"{key}/verdict", json.dumps(lines))
    else:
        lines = json.loads(get("verdict"))
    if lines:
        jax.distributed.shutdown()  # all leave together; otherwise the last are taken for dead
        raise UserError(
            f"the processes of this job differ: {some(lines, _SHOWN)}; start all of them "
            " with the same command, code and data"
        )


def differences(facts: Sequence[Mapping[str, str]]) -> list[str]:
    """Lines `name: value on process 0, value on process 1` for what is not equal.

    Args:
      facts: of each process, the first one's first.
    """
    lines = []
    for name in dict.fromkeys(name for of_one in facts for name in of_one):
        where: dict[str, list[int]] = {}
        for index, of_one in enumerate(facts):
            where.setdefault(of_one.get(name, "absent"), []).append(index)
        if len(where) > 1:
            values = (f"{value} on {_listed(indices)}" for value, indices in where.items())
            lines.append(f"{name}: {', '.join(values)}")
    return lines


def _listed(indices: Sequence[int]) -> str:
    if len(indices) == 1:
        return f"process {indices[0]}"
    if len(indices) > _SHOWN:
        return f"process {indices[0]} and {len(indices) - 1} others"
    return f"processes {', '.join(map(str, indices[:-1]))} and {indices[-1]}"

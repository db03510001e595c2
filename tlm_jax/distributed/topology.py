"""TPU slices that this machine does not have: their devices, as the compiler knows them."""

import dataclasses
import importlib.util
import os
import re

from tlm_jax.config import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """A TPU slice by name, such as v5e:16x16 (chips along each side), or several of them."""

    chip: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As it is written: v5e:16x16."""
        return f"{self.chip}:{'x'.join(map(str, self.shape))}"


_SIDES = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}
_USABLE_GIB = {"v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25}
"""Memory that the compiler gives to programs on each chip, as its refusals say."""
_MORE = {"v4": {"chip_config_name": "megacore"}}
"""A v4 chip's two cores are one device, as they are by default where there are such chips."""


def parse(name: str, slices: int = 1) -> Topology:
    """Reads a name such as v5e:4x4 or v5p:4x4x4.

    Raises:
      UserError: no such kind of chip, or not as many sides as its slices have.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if match is None or match[1] not in _SIDES:
        raise UserError(
            f"topology {name!r} is not CHIP:AxB or CHIP:AxBxC with chip {', '.join(_SIDES)}; "
            "for example v5e:4x4 or v5p:2x2x1"
        )
    shape = tuple(int(n) for n in match[2].split("x"))
    if len(shape) != _SIDES[match[1]]:
        example = "x".join(["2"] * _SIDES[match[1]])
        raise UserError(
            f"topology {name!r}: slices of {match[1]} have {_SIDES[match[1]]} sides, such as "
            f"{match[1]}:{example}"
        )
    return Topology(chip=match[1], shape=shape, slices=slices)


def memory_limit(chip: str) -> int:
    """Bytes that a program may use on a chip."""
    return int(_USABLE_GIB[chip] * 2**30)


def prepare_environment() -> None:
    """Lets the TPU compiler load where there is no TPU; to be called before jax is imported.

    Raises:
      UserError: it is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("tlm compile needs the TPU compiler: pip install 'tlm-jax[tpu]'")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is opened: no lock is needed
    # What the compiler would complain of not finding.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")


def devices(topology: Topology) -> list:
    """The slice's devices: enough to compile for, not to run on.

    Raises:
      UserError: the compiler knows no such slice.
    """
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(
            platform="tpu",
            topology_name=topology.name,
            **({"num_slices": topology.slices} if topology.slices > 1 else {}),
            **_MORE.get(topology.chip, {}),
        )
        return list(described.devices)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"there is no TPU slice {topology.name} ({reason})") from error

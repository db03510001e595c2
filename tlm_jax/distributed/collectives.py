"""The communication of a compiled program between devices, read from its HLO text."""

import collections
import dataclasses
import math
import re

from tlm_jax.distributed.hlo import ARRAY, walk

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "bf16": 2} | {
    f"{kind}{bits}": max(1, bits // 8) for kind in "suf" for bits in (4, 8, 16, 32, 64)
}
_COLLECTIVE = re.compile(rf" = (.+?) ({'|'.join(KINDS)})(-start)?\(")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collectives:
    """One kind of collective operation in one run of a program."""

    kind: str
    count: int
    """Operations, those in loops as often as they run."""
    bytes: int
    """Of their results on a device."""


def collectives(hlo: str) -> tuple[Collectives, ...]:
    """Counts the collective operations of a compiled program (`Compiled.as_text()`).

    An operation inside a loop counts as often as the loop runs; see `hlo.walk`.
    """
    counts: collections.Counter[str] = collections.Counter()
    sizes: collections.Counter[str] = collections.Counter()
    for lines, times in walk(hlo):
        for found in filter(None, map(_COLLECTIVE.search, lines)):
            counts[found[2]] += times
            sizes[found[2]] += times * _result_bytes(found[1], started=bool(found[3]))
    return tuple(
        Collectives(kind=kind, count=counts[kind], bytes=sizes[kind])
        for kind in KINDS
        if counts[kind]
    )


def _result_bytes(shape: str, *, started: bool) -> int:
    """Bytes of an operation's result; one that only starts gives (operands, results, ...)."""
    arrays = [
        _BYTES.get(kind, 1) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in ARRAY.findall(shape)
    ]
    return max(arrays, default=0) if started else sum(arrays)

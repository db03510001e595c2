"""What a compiled program sends between devices, read from its HLO text."""

import collections
import dataclasses
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "bf16": 2} | {
    f"{kind}{bits}": max(1, bits // 8) for kind in "suf" for bits in (4, 8, 16, 32, 64)
}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]+\d+(?:e\d+m\d+\w*)?|pred)\[([\d,]*)\]")
_COLLECTIVE = re.compile(rf" = (.+?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|branch_computations)=\{?([^,{}]+(?:, ?%[^,{}]+)*)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r" while\(.*condition=%?([\w.\-]+)")
_LESS_THAN = re.compile(r"^ *ROOT .* compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT")


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

    An operation inside a loop counts as often as the loop runs. Where the compiler does not say
    how often (it does not for TPUs), the loop's condition does: scans, and the loops in which a
    TPU takes apart a product whose operand is gathered, count from 0 up to a constant. Any other
    loop counts once. Of a branch, both sides count.
    """
    bodies, entry = _computations(hlo)
    counts: collections.Counter[str] = collections.Counter()
    sizes: collections.Counter[str] = collections.Counter()

    def visit(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            if found := _COLLECTIVE.search(line):
                counts[found[2]] += times
                sizes[found[2]] += times * _result_bytes(found[1], started=bool(found[3]))
            trips = _trips(line, bodies)
            for called in _CALLED.findall(line):
                for word in called.split(","):
                    visit(word.strip().lstrip("%"), times * trips)

    visit(entry, 1)
    return tuple(
        Collectives(kind=kind, count=counts[kind], bytes=sizes[kind])
        for kind in KINDS
        if counts[kind]
    )


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """How often the computations run that an operation calls."""
    if known := _TRIPS.search(line):
        return int(known[1])
    loop = _CONDITION.search(line)
    condition = bodies.get(loop[1], []) if loop else []
    for compare in filter(None, map(_LESS_THAN.match, condition)):
        for other in condition:
            if found := re.match(rf" *%?{re.escape(compare[1])} = .* constant\((\d+)\)", other):
                return int(found[1])
    return 1


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation by name, and the name of the one that is run."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        if opening := _COMPUTATION.match(line):
            current = bodies.setdefault(opening[2], [])
            entry = opening[2] if opening[1] else entry
        elif current is not None:
            current.append(line)
    return bodies, entry


def _result_bytes(shape: str, *, started: bool) -> int:
    """Bytes of an operation's result; one that only starts gives (operands, results, ...)."""
    arrays = [
        _BYTES.get(kind, 1) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in _ARRAY.findall(shape)
    ]
    return max(arrays, default=0) if started else sum(arrays)

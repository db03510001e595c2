"""Programs as XLA writes them down: what runs, and how often."""

import re
from collections.abc import Iterator

ARRAY = re.compile(r"\b([a-z]+\d+(?:e\d+m\d+\w*)?|pred)\[([\d,]*)\]")
"""Kind of number and dims of an array, as in bf16[8,128]."""
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|branch_computations|true_computation|false_computation)"
    r"=\{?([^,{}]+(?:, ?%[^,{}]+)*)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r" while\(.*condition=%?([\w.\-]+)")
_LESS_THAN = re.compile(r"^ *ROOT .* compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT")


def walk(hlo: str) -> Iterator[tuple[list[str], int]]:
    """The lines of each computation that a program calls, and how often that call runs.

    A computation in a loop runs as often as the loop. Where the compiler does not say how often
    (it does not for TPUs, nor before it has compiled), the loop's condition does: scans, and the
    loops in which a TPU takes apart a product whose operand is gathered, count from 0 up to a
    constant. Any other loop counts once. Of a branch, both sides count.
    """
    bodies, entry = _computations(hlo)

    def visit(name: str, times: int) -> Iterator[tuple[list[str], int]]:
        lines = bodies.get(name, [])
        yield lines, times
        for line in lines:
            for called in _CALLED.findall(line):
                trips = _trips(line, bodies)
                for word in called.split(","):
                    yield from visit(word.strip().lstrip("%"), times * trips)

    yield from visit(entry, 1)


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

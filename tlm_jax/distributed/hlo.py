"""Programs as XLA writes them down: what runs, and how often."""

import re
from collections.abc import Iterator, Sequence

ARRAY = re.compile(r"\b([a-z]+\d+(?:e\d+m\d+\w*)?|pred)\[([\d,]*)\]")
"""Kind of number and dims of an array, as in bf16[8,128]."""
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|branch_computations|true_computation|false_computation)"
    r"=\{?([^,{}]+(?:, ?%[^,{}]+)*)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_LESS_THAN = re.compile(r"^ *ROOT .* compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT")
_COMMENT = re.compile(r"/\*.*?\*/")


def walk(hlo: str) -> Iterator[tuple[list[str], int]]:
    """The lines of each computation that a program calls, and how often that call runs.

    A computation in a loop runs as often as the loop. Where the compiler does not say how often
    (it does not for TPUs, nor before it has compiled), the loop's condition does: scans, and the
    loops in which a TPU takes apart a product whose operand is gathered, count from 0 up to a
    constant, the latter in steps of two. Any other loop counts once. Of a branch, both sides count.
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
    loop = _LOOP.search(line)
    condition = bodies.get(loop[1], []) if loop else []
    for compare in filter(None, map(_LESS_THAN.match, condition)):
        limit = _constant(compare[2], condition)
        if loop and limit is not None:
            return -(-limit // _increment(compare[1], condition, bodies.get(loop[2], [])))
    return 1


def _increment(counter: str, condition: Sequence[str], body: Sequence[str]) -> int:
    """By how much a loop's counter grows each time: an element of the tuple that goes round."""
    element = re.search(r"get-tuple-element\(.*index=(\d+)", _line(counter, condition))
    after = re.search(r" tuple\((.*?)\)", next((x for x in body if x.lstrip()[:5] == "ROOT "), ""))
    if element is None or after is None:
        return 1
    next_counter = _names(after[1])[int(element[1])]
    added = re.search(r" add\((.*?)\)", _line(next_counter, body))
    found = [_constant(name, body) for name in _names(added[1])] if added else []
    return next((value for value in found if value), 1)


def _names(operands: str) -> list[str]:
    """Of an operation's operands."""
    return [word.strip().lstrip("%") for word in _COMMENT.sub("", operands).split(",")]


def _constant(name: str, lines: Sequence[str]) -> int | None:
    """The value of an integer constant, or None for anything else."""
    found = re.search(r" constant\((\d+)\)", _line(name, lines))
    return int(found[1]) if found else None


def _line(name: str, lines: Sequence[str]) -> str:
    """The line that gives a value its name."""
    found = (line for line in lines if re.match(rf" *%?{re.escape(name)} = ", line))
    return next(found, "")


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

"""Segments: runs of layers that repeat, found in a list of layer specs. Standard library only.

The one place where layers are grouped. A segment repeats a pattern of layers: one layer in the
usual stack of equal neighbours, several where kinds of layers take turns. Each segment is stored
stacked and runs as one scan, so that a program contains as many copies of a layer as its
segments' patterns have layers.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

Spec = TypeVar("Spec", bound=Hashable)
_LONGEST_PATTERN = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment(Generic[Spec]):
    """Layers `start` to `start + length`: the pattern, `repeats` times."""

    start: int
    repeats: int
    pattern: tuple[Spec, ...]

    @property
    def length(self) -> int:
        """Layers of the segment."""
        return self.repeats * len(self.pattern)

    @property
    def stop(self) -> int:
        """One past the last layer."""
        return self.start + self.length

    def layers(self, place: int) -> range:
        """Indices of the layers that stand at a place of the pattern, one per repeat."""
        return range(self.start + place, self.stop, len(self.pattern))


def group(layers: Sequence[Spec]) -> tuple[Segment[Spec], ...]:
    """The fewest layer bodies, in the fewest segments, that make up a list of layers.

    Considers patterns of up to 8 layers, repeated as often as they follow one another. Equal
    neighbours are a pattern of one.

    Args:
      layers: one hashable spec per layer, compared by value.
    """
    number = {spec: index for index, spec in reversed(list(enumerate(layers)))}
    ids = [number[spec] for spec in layers]
    count = len(ids)
    periods = range(1, min(_LONGEST_PATTERN, count) + 1)
    # best[i]: (bodies, segments) of layers i and later, and the first segment's (period, repeats).
    best: list[tuple[tuple[int, int], int, int]] = [((0, 0), 0, 0)] * (count + 1)
    equal = dict.fromkeys(periods, 0)  # layers from i on that equal the one a period later
    for i in range(count - 1, -1, -1):
        found = []
        for period in periods:
            same = i + period < count and ids[i] == ids[i + period]
            equal[period] = equal[period] + 1 if same else 0
            repeats = equal[period] // period + 1
            if period == 1 or repeats > 1:
                bodies, segments = best[i + period * repeats][0]
                found.append(((bodies + period, segments + 1), period, repeats))
        best[i] = min(found)
    result, start = [], 0
    while start < count:
        _, period, repeats = best[start]
        pattern = tuple(layers[start : start + period])
        result.append(Segment(start=start, repeats=repeats, pattern=pattern))
        start += period * repeats
    return tuple(result)

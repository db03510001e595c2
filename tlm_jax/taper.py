"""Width schedules and segments: the idea of tapered language models.

A taper moves width (of MLPs, say) from late layers to early ones along a curve
and keeps the sum, so that a tapered model and its uniform twin have the same
parameters and FLOPs (arXiv 2606.23670, section 3: monotone and mean-preserving).
This module works in whole multiples of `multiple_of`, called units, so every
budget is exact. It imports nothing but the standard library.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from tlm_jax import _fit, shapes
from tlm_jax.segments import group
from tlm_jax.validation import round_up

Schedule = Literal[
    "uniform", "linear", "cosine", "sigmoid", "groups", "explicit",
    "openelm", "delight", "middle", "crown", "frame", "bottleneck",
]  # fmt: skip
Third = Literal["early", "middle", "late"]

_THIRDS = ("early", "middle", "late")
_MOST_FITTED, _MOST_STAIRS = 1_000, 10_000  # some seconds, and 32 MB (our choice)
_DECIMALS = 9  # of a unit; removes the noise of cos() so that ties are ties


class TaperError(ValueError):
    """A taper that cannot exist.

    Attributes:
      suggestion: keyword arguments of `layer_widths`; merged over the failed
        request they give one that works.
    """

    def __init__(self, message: str, suggestion: dict[str, Any]) -> None:
        super().__init__(message)
        self.suggestion = suggestion


class _Impossible(Exception):
    """Why a request fails, with suggestions to try in this order."""

    def __init__(self, problem: str, candidates: Iterable[dict[str, Any]] = ()) -> None:
        super().__init__(problem)
        self.candidates = candidates


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Request:
    """The arguments of `layer_widths`; `_solve` says whether they can be had."""

    num_layers: int
    base_width: int
    schedule: Schedule
    start: float
    end: float
    steepness: float
    heavy: Third
    widths: tuple[int, ...]
    multiple_of: int
    num_segments: int | None

    @property
    def budget(self) -> int:
        return self.num_layers * self.base_width


def layer_widths(
    num_layers: int,
    base_width: int,
    schedule: Schedule = "cosine",
    start: float = 1.5,
    end: float = 0.5,
    *,
    steepness: float = 10.0,
    heavy: Third = "early",
    widths: Sequence[int] = (),
    multiple_of: int = 16,
    num_segments: int | None = None,
) -> tuple[int, ...]:
    """Width of each layer, summing to exactly `num_layers * base_width`.

    With x = l / (L - 1) from 0 at the first layer to 1 at the last, the curves are
    base * (end + (start - end) * f(x)), where f is
      linear: 1 - x (the paper's eq. 4),
      cosine: (1 + cos(pi x)) / 2 (the paper's schedule),
      sigmoid: sigma(-k (x - 1/2)), but 1 in the first layer and 0 in the last (eq. 6, which is
        not rescaled; k = steepness, in the paper 10).
    Widths are the multiples of `multiple_of` nearest the curve that keep the sum, the
    order (never increasing if start > end, never decreasing if start < end) and the
    rounded ends; where the curve allows it, layer l and layer L-1-l mirror each other
    (w_l + w_{L-1-l} = 2 base).

    Args:
      num_layers: depth L.
      base_width: mean width.
      schedule: a curve above; `uniform`; `groups` (one third of the depth `start` times
        the base, the rest sharing what is left: the paper's first experiment, with our
        factors); a shape of related work (see `shapes`), which has no start and end; or
        `explicit`. A uniform model needs no multiples, so `uniform`, and a
        curve from 1 to 1, ignore `multiple_of`.
      start: first width over base (groups: that of the heavy third).
      end: last width over base (groups: not used). A curve keeps the mean only if
        start + end = 2, within what rounding absorbs (one unit per layer).
      steepness: k of the sigmoid.
      heavy: third of the depth that groups widens.
      widths: the result itself, for explicit; checked.
      multiple_of: the unit.
      num_segments: if the taper has more distinct widths than this, use the least-squares
        approximation by at most so many stairs with the same sum, each within one unit of the
        curve's range; its ends are not pinned (see `_fit.best_stairs`).

    Raises:
      TaperError: no such widths; the message and its `suggestion` say what would work.
    """
    return _layer_widths(
        _Request(
            num_layers=num_layers,
            base_width=base_width,
            schedule=schedule,
            start=start,
            end=end,
            steepness=steepness,
            heavy=heavy,
            widths=tuple(widths),
            multiple_of=multiple_of,
            num_segments=num_segments,
        )
    )


@functools.lru_cache(maxsize=1024)
def _layer_widths(request: _Request) -> tuple[int, ...]:
    try:
        return _solve(request)
    except _Impossible as error:
        for suggestion in itertools.chain(error.candidates, _fallbacks(request)):
            try:
                _solve(dataclasses.replace(request, **suggestion))
            except _Impossible:
                continue
            changes = ", ".join(f"{name}={value!r}" for name, value in suggestion.items())
            raise TaperError(f"{error}; use {changes}", suggestion) from None
        raise TaperError(str(error), {}) from None


def _fallbacks(r: _Request) -> Iterator[dict[str, Any]]:
    """Suggestions of last resort, from near the request to far from it."""
    legal = {"num_layers": 2, "base_width": 1, "multiple_of": 1}
    valid = {name: least for name, least in legal.items() if getattr(r, name) < least}
    ratios = {"start": 1.5, "end": 0.5}
    for stairs in ({}, {"num_segments": None}):
        for change in ({}, {"multiple_of": 1}, ratios, ratios | {"multiple_of": 1}):
            yield valid | change | stairs
        yield valid | {"schedule": "uniform"} | stairs


def _solve(r: _Request) -> tuple[int, ...]:
    """The widths of a request, or `_Impossible`."""
    _check_numbers(r)
    if r.schedule == "uniform" or (r.schedule in shapes.CURVES and r.start == r.end == 1):
        return (r.base_width,) * r.num_layers
    if r.schedule == "explicit":
        exact = _check_explicit(r)
        ideal: list[float] = [w / r.multiple_of for w in exact]
    else:
        if r.budget % r.multiple_of:
            raise _Impossible(
                f"num_layers={r.num_layers} * base_width={r.base_width} = {r.budget} is not a "
                f"multiple of multiple_of={r.multiple_of}",
                _nearby_bases(r),
            )
        solvers = {"groups": _groups, **dict.fromkeys(shapes.CURVES, _curve)}
        ideal, exact = solvers.get(r.schedule, _shape)(r)
    if r.num_segments is None or len(group(exact)) <= r.num_segments:
        return exact
    return _approximate(r, ideal, exact)


def _check_numbers(r: _Request) -> None:
    for name in ("num_layers", "base_width", "multiple_of"):
        value = getattr(r, name)
        if value < 1:
            raise _Impossible(f"{name}={value} must be at least 1")
    for name in ("start", "end") if r.schedule in shapes.CURVES else ():
        value = getattr(r, name)
        if not 0 < value < math.inf:
            raise _Impossible(f"{name}={value} must be positive and finite", _ratios(r))
    k = r.num_segments
    if k is not None and not 1 <= k <= r.num_layers:
        nearest = min(max(k, 1), r.num_layers)
        raise _Impossible(
            f"num_segments={k} must lie between 1 and num_layers={r.num_layers}",
            [{"num_segments": nearest}, {"num_segments": None}],
        )
    if r.schedule not in ("uniform", "groups", "explicit", *shapes.CURVES, *shapes.SHAPES):
        raise _Impossible(f"unknown schedule {r.schedule!r}", [{"schedule": "cosine"}])
    if r.schedule == "groups" and r.heavy not in _THIRDS:
        raise _Impossible(f"heavy={r.heavy!r} is not one of {_THIRDS}", [{"heavy": "early"}])
    if r.schedule == "sigmoid" and not 1e-6 <= r.steepness < math.inf:
        raise _Impossible(
            f"steepness={r.steepness} must be positive and finite", [{"steepness": 10.0}]
        )


def _check_explicit(r: _Request) -> tuple[int, ...]:
    count, total, budget = len(r.widths), sum(r.widths), r.budget // r.multiple_of
    same_mean = {"base_width": total // count} if count and total % count == 0 else {}
    if count != r.num_layers:
        as_many = {"num_layers": count}
        raise _Impossible(
            f"widths has {count} entries but num_layers={r.num_layers}",
            [as_many, as_many | same_mean, {"schedule": "cosine"}],
        )
    # The same proportions in whole units.
    scale = budget / max(total, 1)
    wanted = [max(w * scale, 1.0) for w in r.widths]
    scaled = _fit.nearest([round(u) for u in wanted], wanted, budget, 1, None)
    repaired = [{"widths": tuple(u * r.multiple_of for u in scaled)}] if scaled else []
    bad = [w for w in r.widths if w < 1 or w % r.multiple_of]
    if bad:
        raise _Impossible(
            f"width {bad[0]} is not a positive multiple of multiple_of={r.multiple_of}", repaired
        )
    if total != r.budget:
        raise _Impossible(
            f"widths sum to {total} but must sum to num_layers={r.num_layers} * "
            f"base_width={r.base_width} = {r.budget}",
            [same_mean, *repaired],
        )
    return r.widths


def _groups(r: _Request) -> tuple[list[float], tuple[int, ...]]:
    """One third `start` wide, the others sharing the rest (papers give no factors)."""
    layers, unit = r.num_layers, r.multiple_of
    if layers < 3:
        raise _Impossible(
            f"groups needs at least 3 layers, not num_layers={layers}",
            [{"num_layers": 3}, {"num_layers": 3, "base_width": round_up(r.base_width, unit)}],
        )
    # Depths that 3 does not divide: sizes differ by one and mirror, 2+3+2 or 3+2+3.
    bounds = [(2 * i * layers + 3) // 6 for i in range(4)]
    which = _THIRDS.index(r.heavy)
    inside = range(bounds[which], bounds[which + 1])
    others = [layer for layer in range(layers) if layer not in inside]
    rest_ratio = (layers - len(inside) * r.start) / len(others)
    defaults = [{"start": 1.5}, {"start": 1.5, "multiple_of": 1}, *_nearby_bases(r)]
    if not (r.start > 0 and rest_ratio > 0):
        raise _Impossible(
            f"start={r.start} for {len(inside)} of {layers} layers must lie between 0 and "
            f"{layers / len(inside):.4g}, so that the others keep some width",
            defaults,
        )
    heavy_units = math.floor(round(r.start * r.base_width / unit, _DECIMALS) + 0.5)
    each, extra = divmod(r.budget // unit - len(inside) * heavy_units, len(others))
    if heavy_units < 1 or each < 1:
        raise _Impossible(
            f"start={r.start} with base_width={r.base_width} leaves a layer narrower than "
            f"multiple_of={unit}",
            [*_nearby_bases(r), *defaults],
        )
    # What does not divide goes to the layers on the heavy side, so that depth stays in order.
    centre = (inside.start + inside.stop - 1) / 2
    side = 1 if r.start >= 1 else -1
    fuller = set(sorted(others, key=lambda layer: side * abs(layer - centre))[:extra])
    units = [heavy_units if i in inside else each + (i in fuller) for i in range(layers)]
    ratios = [r.start if i in inside else rest_ratio for i in range(layers)]
    return [x * r.base_width / unit for x in ratios], tuple(u * unit for u in units)


def _shape(r: _Request) -> tuple[list[float], tuple[int, ...]]:
    """A shape of related work."""
    ideal, units = shapes.units(r.schedule, r.num_layers, r.budget // r.multiple_of)
    if units is None:
        raise _Impossible(
            f"base_width={r.base_width} leaves a layer narrower than multiple_of={r.multiple_of}",
            _nearby_bases(r),
        )
    return ideal, tuple(u * r.multiple_of for u in units)


def _curve(r: _Request) -> tuple[list[float], tuple[int, ...]]:
    """The ideal curve in units, and the widths on it."""
    if r.num_layers < 2:
        raise _Impossible(
            f"num_layers={r.num_layers} cannot run from start={r.start} to end={r.end}",
            [{"num_layers": 2}, {"start": 1.0, "end": 1.0}],
        )
    scale = r.base_width / r.multiple_of
    high, low = max(r.start, r.end), min(r.start, r.end)
    shape, last = shapes.CURVES[r.schedule], r.num_layers - 1
    falling = [low + (high - low) * shape(i / last, r.steepness) for i in range(last + 1)]
    ideal = [round(x * scale, _DECIMALS) for x in falling]
    # Halves round up in the early half and down in the late one: rounding mirrors.
    near = [math.floor(u + 0.5) if 2 * i <= last else math.ceil(u - 0.5)
            for i, u in enumerate(ideal)]  # fmt: skip
    if near[-1] < 1:
        raise _Impossible(
            f"the narrowest layer, {low} * base_width={r.base_width}, rounds to 0 multiples of "
            f"multiple_of={r.multiple_of}",
            [*_nearby_bases(r), *({"multiple_of": m} for m in _halvings(r.multiple_of))],
        )
    interior = _fit.nearest(
        near[1:-1], ideal[1:-1], r.budget // r.multiple_of - near[0] - near[-1], near[-1], near[0]
    )
    if interior is None:
        mean = sum(falling) / len(falling)
        if abs(mean - 1) > 1e-9:
            raise _Impossible(
                f"a {r.schedule} curve from start={r.start} to end={r.end} has mean {mean:.6g}, "
                f"not 1, so it cannot sum to {r.budget}",
                _ratios(r),
            )
        raise _Impossible(
            f"base_width={r.base_width} is too coarse in multiples of {r.multiple_of} for "
            f"start={r.start}, end={r.end} and the sum {r.budget}",
            _nearby_bases(r),
        )
    units = [near[0], *interior, near[-1]]
    if r.start < r.end:
        ideal.reverse()
        units.reverse()
    return ideal, tuple(u * r.multiple_of for u in units)


def _approximate(r: _Request, ideal: list[float], exact: tuple[int, ...]) -> tuple[int, ...]:
    """At most `num_segments` stairs nearest the ideal curve, with the exact budget."""
    assert r.num_segments is not None
    if r.num_layers > _MOST_FITTED or r.num_segments * r.num_layers > _MOST_STAIRS:
        raise _Impossible(
            f"num_segments={r.num_segments} for num_layers={r.num_layers} would take too long to "
            f"find: at most {_MOST_FITTED} layers, and {_MOST_STAIRS} as their product, are fitted",
            [{"num_segments": None}],
        )
    falls = all(a >= b for a, b in itertools.pairwise(exact))
    rises = all(a <= b for a, b in itertools.pairwise(exact))
    if not (falls or rises):
        raise _Impossible(
            f"num_segments={r.num_segments} is less than the {len(group(exact))} of these "
            "widths, which go both up and down",
            [{"num_segments": len(group(exact))}],
        )
    curve = ideal if falls else ideal[::-1]
    units = _fit.best_stairs(tuple(curve), r.num_segments, r.budget // r.multiple_of)
    if units is None:
        raise _Impossible(
            f"num_segments={r.num_segments} cannot sum to {r.budget} in multiples of "
            f"{r.multiple_of}",
            [{"num_segments": 2}],  # of neighbouring heights, which make up any sum
        )
    return tuple(u * r.multiple_of for u in (units if falls else units[::-1]))


def _ratios(r: _Request) -> Iterator[dict[str, Any]]:
    """Start and end that keep the mean: the start as asked, then the end, then the paper's."""
    for name, other in (("end", r.start), ("start", r.end)):
        if 0 < other < 2:
            yield {name: round(2 - other, _DECIMALS)}
    yield {"start": 1.5, "end": 0.5}


def _nearby_bases(r: _Request) -> Iterator[dict[str, Any]]:
    """Base widths that give a sum in whole units, nearest first."""
    step = r.multiple_of // math.gcd(r.num_layers, r.multiple_of)
    middle = round(r.base_width / step)
    for i in range(33):
        for index in (middle + i, middle - i) if i else (middle,):
            if index > 0:
                yield {"base_width": index * step}
    smallest = min(r.start, r.end) if r.schedule in shapes.CURVES else 0.5
    yield {"base_width": round_up(math.ceil(r.multiple_of / smallest), 2 * r.multiple_of)}


def _halvings(value: int) -> Iterator[int]:
    while value > 1:
        value //= 2
        yield value

"""Width schedules: golden values, properties of random requests, optimality by brute force."""

import itertools
import math
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tlm_jax._fit import _EPSILON, best_stairs
from tlm_jax.segments import group
from tlm_jax.taper import TaperError, layer_widths

CURVES = ("linear", "cosine", "sigmoid")
# Computed from the paper's formula: 24 layers, mean 4096, cosine 1.5/0.5, multiples of 16.
COSINE_24 = (
    *(6144, 6128, 6064, 5968, 5840, 5680, 5488, 5280, 5040, 4784, 4512, 4240),
    *(3952, 3680, 3408, 3152, 2912, 2704, 2512, 2352, 2224, 2128, 2064, 2048),
)


def test_cosine_golden() -> None:
    assert layer_widths(24, 4096) == COSINE_24
    assert layer_widths(24, 4096, start=0.5, end=1.5) == COSINE_24[::-1]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", (144, 128, 112, 96, 80, 64, 48)),
        # (1 + cos(pi l/6)) / 2 = 1, .933, .75, .5, .25, .067, 0
        ("cosine", (144, 138, 120, 96, 72, 54, 48)),
        # sigma(10/3) = .966, sigma(5/3) = .841 at x = 1/6, 1/3
        ("sigmoid", (144, 141, 129, 96, 63, 51, 48)),
    ],
)
def test_each_curve_by_hand(schedule: Any, expected: tuple[int, ...]) -> None:
    multiple = 16 if schedule == "linear" else 1
    assert layer_widths(7, 96, schedule, multiple_of=multiple) == expected


def test_sigmoid_is_the_paper_s_and_not_rescaled() -> None:
    """Eq. 6 of arXiv 2606.23670, k = 10, by hand: only the end layers are pinned."""
    widths = layer_widths(24, 4096, "sigmoid", multiple_of=1)
    assert (widths[0], widths[-1]) == (6144, 2048)
    # 2048 + 4096 / (1 + exp(10 (l/23 - 1/2))): sigma(4.5652) = .98970, sigma(4.1304) = .98418.
    assert widths[1:3] == (6102, 6079)
    for layer in range(1, 23):
        exact = 2048 + 4096 / (1 + math.exp(10 * (layer / 23 - 0.5)))
        assert abs(widths[layer] - exact) <= 0.5
    assert sum(widths) == 24 * 4096
    assert layer_widths(24, 4096, "sigmoid")[:3] == (6144, 6096, 6080)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("openelm", (0.5, 1.375, 2.25, 3.125, 4.0)),  # 0.5 to 4.0 in equal steps
        ("delight", (2.0, 2.25, 2.5, 2.75, 3.0)),
        ("middle", (0.0, 1.0, 1.0, 1.0, 0.0)),  # at x = 0, 1/4, 1/2, 3/4, 1
        ("crown", (0.5, 1.0, 1.5, 1.0, 0.5)),
        ("frame", (1.5, 1.0, 0.5, 1.0, 1.5)),
        ("bottleneck", (1.0, 0.3 ** (1 / 3), 0.3 ** (2 / 3), 0.3, 1.0)),
    ],
)
def test_shapes_of_related_work(shape: Any, expected: tuple[float, ...]) -> None:
    """The papers' proportions at an exact budget; no layer is left without width."""
    widths = layer_widths(5, 9000, shape, multiple_of=1)
    assert sum(widths) == 5 * 9000
    for width, part in zip(widths, expected, strict=True):
        assert abs(width - 45000 * part / sum(expected)) <= max(1, 45000 * 1e-3)
        assert width >= 1
    coarse = layer_widths(24, 64, shape, multiple_of=16)
    assert sum(coarse) == 24 * 64
    assert min(coarse) >= 16
    assert all(width % 16 == 0 for width in coarse)


def test_a_shape_needs_a_unit_for_every_layer() -> None:
    with pytest.raises(TaperError, match="leaves a layer narrower than multiple_of=16") as error:
        layer_widths(8, 8, "crown")
    assert layer_widths(8, schedule="crown", **{"base_width": 8} | error.value.suggestion)


def test_steeper_sigmoid_changes_more_in_the_middle() -> None:
    flat, steep = (layer_widths(12, 4096, "sigmoid", steepness=k) for k in (5.0, 20.0))
    assert steep[5] - steep[6] > flat[5] - flat[6]
    assert steep[1] > flat[1]
    assert layer_widths(4, 64, "sigmoid", steepness=1e6) == (96, 96, 32, 32)


@pytest.mark.parametrize(
    ("heavy", "expected"),
    [
        ("early", (96, 96, 48, 48, 48, 48)),
        ("middle", (48, 48, 96, 96, 48, 48)),
        ("late", (48, 48, 48, 48, 96, 96)),
    ],
)
def test_groups(heavy: Any, expected: tuple[int, ...]) -> None:
    assert layer_widths(6, 64, "groups", heavy=heavy) == expected


def test_groups_of_unequal_thirds() -> None:
    # 8 layers in 3+2+3; five light layers share (8 - 3*1.5) * 704 = 2464 = 154 units of 16.
    widths = layer_widths(8, 704, "groups")
    assert widths == (1056,) * 3 + (31 * 16,) * 4 + (30 * 16,)
    assert layer_widths(8, 704, "groups", heavy="late") == widths[::-1]
    assert group(layer_widths(7, 640, "groups", heavy="middle"))[1].length == 3


def test_uniform_needs_no_multiple() -> None:
    assert layer_widths(3, 17, "uniform") == (17, 17, 17)
    assert layer_widths(3, 17, "cosine", 1.0, 1.0) == (17, 17, 17)
    assert layer_widths(1, 17, "uniform") == (17,)


def test_explicit() -> None:
    assert layer_widths(3, 32, "explicit", widths=(48, 16, 32)) == (48, 16, 32)
    assert layer_widths(3, 32, "explicit", widths=[64, 16, 16]) == (64, 16, 16)
    with pytest.raises(TaperError, match=r"sum to 112 but must sum to .* = 96"):
        layer_widths(3, 32, "explicit", widths=(64, 32, 16))


def _request(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"num_layers": 12, "base_width": 512}
    return base | changes


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (_request(num_layers=3, base_width=17), "51 is not a multiple of multiple_of=16"),
        (_request(end=0.6), r"mean 1\.05, not 1.*use end=0\.5$"),
        (_request(start=2.5), "use start=1.5"),
        (_request(num_layers=10_000, num_segments=4), "num_segments=4 for num_layers=10000 would"),
        (
            _request(num_layers=500, num_segments=100, base_width=8192),
            "num_segments=100 for num_layers=500 would",
        ),
        (_request(end=0.0), "end=0.0 must be positive"),
        (_request(start=math.nan), "start=nan"),
        (_request(num_layers=1), "num_layers=1 cannot run"),
        (_request(num_layers=0), "num_layers=0 must be at least 1"),
        (_request(num_segments=13), "num_segments=13 must lie between 1 and num_layers=12"),
        (_request(num_segments=0), "num_segments=0 .*use num_segments=1"),
        (_request(base_width=12), "rounds to 0 multiples"),
        (_request(schedule="cubic"), "unknown schedule 'cubic'"),
        (_request(schedule="groups", start=3.1), r"between 0 and 3, "),
        (_request(schedule="groups", heavy="left"), "heavy='left'"),
        (_request(schedule="sigmoid", steepness=0.0), "steepness=0.0"),
        (_request(schedule="explicit", widths=(16,) * 11), "11 entries but num_layers=12"),
        (_request(schedule="explicit", widths=(500,) + (512,) * 11), "width 500 is not"),
        (
            _request(base_width=500, num_segments=1),
            "num_segments=1 cannot sum to 6000 .*; use num_segments=2$",
        ),
        (_request(schedule="groups", heavy="middle", num_segments=2), "use num_segments=3"),
    ],
)
def test_errors_name_the_numbers_and_a_way_out(request_: dict[str, Any], words: str) -> None:
    with pytest.raises(TaperError, match=words) as caught:
        layer_widths(**request_)
    assert "\n" not in str(caught.value)
    _check(request_ | caught.value.suggestion)


def _check(request: dict[str, Any]) -> tuple[int, ...]:
    """Asserts what every answer must satisfy; raises TaperError if there is none."""
    widths = layer_widths(**request)
    r = {"schedule": "cosine", "start": 1.5, "end": 0.5, "multiple_of": 16} | request
    layers, base, unit, stairs = (
        r["num_layers"],
        r["base_width"],
        r["multiple_of"],
        group(widths),
    )
    assert len(widths) == layers
    assert sum(widths) == layers * base
    assert sum(s.length for s in stairs) == layers
    assert [w for s in stairs for w in s.pattern * s.repeats] == list(widths)
    assert all(a.stop == b.start and a.pattern != b.pattern for a, b in itertools.pairwise(stairs))
    uniform = r["schedule"] == "uniform" or (
        r["schedule"] in CURVES and r["start"] == r["end"] == 1
    )
    if uniform:
        assert set(widths) == {base}
        return widths
    assert all(w > 0 and w % unit == 0 for w in widths)
    limit = r.get("num_segments")
    assert limit is None or len(stairs) <= limit
    if r["schedule"] in CURVES:
        sign = 1 if r["start"] >= r["end"] else -1
        assert all(sign * a >= sign * b for a, b in itertools.pairwise(widths))
        low, high = sorted((r["start"] * base, r["end"] * base))
        assert all(low - unit - 1e-6 <= w <= high + unit + 1e-6 for w in widths)
        exact = layer_widths(**(request | {"num_segments": None}))
        if limit is None or limit >= len(group(exact)):
            assert widths == exact
            for width, ratio in ((widths[0], r["start"]), (widths[-1], r["end"])):
                assert abs(width - ratio * base) <= unit / 2 + 1e-6
            if abs(r["start"] + r["end"] - 2) < 1e-12 and base % unit == 0:
                mirrored = [2 * base - w for w in reversed(widths)]
                assert list(widths) == mirrored
    if r["schedule"] == "explicit" and limit is None:
        assert widths == tuple(r["widths"])
    return widths


_BASES = st.one_of(st.integers(0, 400), st.integers(1, 300).map(lambda n: 32 * n))
_RATIOS = st.one_of(
    st.sampled_from([1.5, 1.25, 1.75, 0.5, 1.0, 0.0, -0.5]),
    st.floats(0.05, 2.2).map(lambda x: round(x, 3)),
)


@st.composite
def _requests(draw: st.DrawFn) -> dict[str, Any]:
    layers = draw(st.integers(0, 26))
    start = draw(_RATIOS)
    schedule = draw(st.sampled_from([*CURVES, *CURVES, "uniform", "groups", "explicit"]))
    request = {
        "num_layers": layers,
        "base_width": draw(_BASES),
        "schedule": schedule,
        "start": start,
        "end": draw(st.one_of(st.just(round(2 - start, 6)), _RATIOS)),
        "steepness": draw(st.sampled_from([0.01, 5.0, 10.0, 1000.0])),
        "heavy": draw(st.sampled_from(["early", "middle", "late"])),
        "multiple_of": draw(st.sampled_from([16, 16, 1, 8, 12, 128])),
        "num_segments": draw(st.one_of(st.none(), st.integers(0, 9))),
    }
    if schedule == "explicit":
        request["widths"] = tuple(
            draw(st.lists(st.integers(0, 20).map(lambda n: n * 16), max_size=layers + 1))
        )
    return request


@settings(max_examples=3000, deadline=None)
@given(_requests())
def test_every_request_is_met_or_answered_with_one_that_is(request: dict[str, Any]) -> None:
    try:
        _check(request)
    except TaperError as error:
        suggestion = error.suggestion
    else:
        return
    assert suggestion
    _check(request | suggestion)  # a TaperError here fails the test


@settings(max_examples=300, deadline=None)
@given(
    st.integers(2, 40),
    st.integers(1, 60).map(lambda n: 128 * n),
    st.sampled_from(CURVES),
    st.sampled_from([0.25, 0.375, 0.5, 0.625, 0.75]),
)
def test_published_ratios_always_work(layers: int, base: int, schedule: Any, end: float) -> None:
    _check(
        {"num_layers": layers, "base_width": base, "schedule": schedule}
        | {"start": 2 - end, "end": end}
    )


def _squares(widths: Any, ideal: Any) -> float:
    return sum((w - u) ** 2 for w, u in zip(widths, ideal, strict=True))


def _ideal_linear(layers: int, base: float, start: float, end: float) -> list[float]:
    return [base * (start + (end - start) * i / (layers - 1)) for i in range(layers)]


@pytest.mark.parametrize("layers", [3, 4, 5, 6])
@pytest.mark.parametrize("unit", [3, 4, 7])
@pytest.mark.parametrize("end", [0.4, 0.5, 0.52])
def test_exact_widths_are_the_nearest_possible(layers: int, unit: int, end: float) -> None:
    tried = 0
    for base in range(unit, 8 * unit):
        try:
            widths = layer_widths(layers, base, "linear", 1.5, end, multiple_of=unit)
        except TaperError:
            continue
        tried += 1
        ideal = _ideal_linear(layers, base, 1.5, end)
        steps = range(widths[-1], widths[0] + 1, unit)
        best = min(
            _squares((widths[0], *inner, widths[-1]), ideal)
            for inner in itertools.product(steps, repeat=layers - 2)
            if sum(inner) == layers * base - widths[0] - widths[-1]
        )
        assert _squares(widths, ideal) == pytest.approx(best, abs=1e-6)
    assert tried


def _brute_stairs(ideal: tuple[float, ...], count: int, total: int) -> float | None:
    """Least cost of at most `count` stairs within one unit of the curve's range."""
    low, high = ideal[-1] - 1 - _EPSILON, ideal[0] + 1 + _EPSILON
    heights = [h for h in range(1, total + 1) if low <= h <= high]
    falling = itertools.combinations_with_replacement(heights[::-1], len(ideal))
    costs = [
        _squares(stairs, ideal)
        for stairs in falling
        if sum(stairs) == total and len(set(stairs)) <= count
    ]
    return min(costs, default=None)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(0.2, 5), min_size=2, max_size=6), st.integers(1, 4), st.integers(-2, 2))
@example([1.0, 1.5, 1.5, 3.999999999999999], 2, 0)  # a stair at the very edge of the range
def test_stairs_are_optimal(values: list[float], count: int, shift: int) -> None:
    ideal = tuple(sorted(values, reverse=True))
    count = min(count, len(ideal))
    total = max(round(sum(ideal)) + shift, 1)
    found, expected = best_stairs(ideal, count, total), _brute_stairs(ideal, count, total)
    if found is None:
        assert expected is None
    else:
        assert sum(found) == total
        assert len(group(found)) <= count
        assert list(found) == sorted(found, reverse=True)
        assert _squares(found, ideal) == pytest.approx(expected, abs=1e-4)


def test_few_stairs_stay_near_the_curve() -> None:
    """31 is prime: two stairs of whole units would have to be 38 and 7 where start is 12."""
    assert layer_widths(31, 1024, multiple_of=128, num_segments=2) == (1024,) * 31
    three = layer_widths(31, 1024, multiple_of=128, num_segments=3)
    assert len(group(three)) == 3
    assert max(three) <= 1.5 * 1024 + 128
    assert min(three) >= 0.5 * 1024 - 128


@pytest.mark.parametrize("schedule", CURVES)
@pytest.mark.parametrize("unit", [16, 128])
@pytest.mark.parametrize(("layers", "limit_s"), [(24, 0.3), (96, 2.0)])
def test_stairs_are_quick_and_as_many_as_asked(
    schedule: Any, unit: int, layers: int, limit_s: float
) -> None:
    best_stairs.cache_clear()
    began = time.process_time()
    widths = layer_widths(layers, 2048, schedule, multiple_of=unit, num_segments=8)
    assert time.process_time() - began < limit_s
    assert len(group(widths)) == 8
    assert sum(widths) == layers * 2048


def test_more_stairs_fit_better_up_to_the_exact_taper() -> None:
    ideal = layer_widths(24, 4096)
    errors = [
        _squares(layer_widths(24, 4096, num_segments=k), ideal) for k in (1, 2, 3, 4, 6, 8, 12, 24)
    ]
    assert errors == sorted(errors, reverse=True)
    assert layer_widths(24, 4096, num_segments=1) == (4096,) * 24
    assert errors[-1] == 0

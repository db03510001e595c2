"""Whole numbers nearest a falling curve with an exact sum: free, or in a few stairs.

Fewer distinct widths mean fewer scanned segments and so less to compile; the
paper has nothing of the kind (our choice). The search for stairs is exact. A stair of n
layers and height c costs SSE + n (c - mean)^2, with SSE the spread of the curve
within it, and the heights must use up the budget. From a partial solution with
i layers done and R units of the budget too many or too few, the rest costs at least

    (least SSE of the layers from i on in the stairs left) + R^2 / (L - i)

because heights that absorb R do so best in equal parts. Partial solutions whose
cost plus this bound exceeds a limit are dropped; the limit grows until a solution
is found, which is then the best there is.
"""

import functools
import itertools
import math
from collections.abc import Sequence

_EPSILON = 1e-7  # of squared units; above the noise of the sums


def nearest(
    near: Sequence[int], ideal: Sequence[float], total: int, low: int, high: int | None
) -> list[int] | None:
    """Least-squares whole numbers in [low, high] with sum `total`, from the nearest ones.

    Greedy steps of one are optimal, for the cost is convex and separable; going up from
    the front and down from the back keeps a falling order. None if a number would end
    more than one from its ideal, unless `high` is None (no limit).
    """
    units = list(near)
    gap = total - sum(units)
    step = 1 if gap > 0 else -1
    if high is not None and abs(gap) > len(units):
        return None  # more than rounding can absorb

    def cost(i: int) -> tuple[float, int]:
        return step * (units[i] - ideal[i]), step * i

    for _ in range(abs(gap)):
        allowed = [
            i
            for i, u in enumerate(units)
            if u + step >= low
            and (high is None or (u + step <= high and abs(u + step - ideal[i]) <= 1 + 1e-9))
        ]
        if not allowed:
            return None
        units[min(allowed, key=cost)] += step
    return units


@functools.lru_cache(maxsize=256)
def best_stairs(ideal: tuple[float, ...], count: int, total: int) -> tuple[int, ...] | None:
    """Least-squares stairs: whole positive heights, strictly falling, with a given sum.

    Args:
      ideal: non-increasing curve, one value a layer, in units.
      count: stairs wanted; fewer where exactly this many cannot have the sum.
      total: sum of the result over layers, in units.

    Returns:
      One height a layer, or None if even one stair cannot have the sum.
    """
    for stairs in range(min(count, len(ideal)), 0, -1):
        result = _Search(ideal, stairs, total).run()
        if result is not None:
            return result
    return None


class _Search:
    """One search for exactly `count` stairs."""

    def __init__(self, ideal: tuple[float, ...], count: int, total: int) -> None:
        self.layers, self.count, self.total = len(ideal), count, total
        self.sums = [0.0, *itertools.accumulate(ideal)]
        self.squares = [0.0, *itertools.accumulate(u * u for u in ideal)]
        self.highest = ideal[0]
        size = self.layers
        self.spread = [
            [self._spread(a, b) if b > a else 0.0 for b in range(size + 1)] for a in range(size)
        ]
        # rest[k][i]: least SSE of layers i.. in exactly k stairs of any real heights.
        self.rest = [[math.inf] * size + [0.0]]
        for k in range(1, count + 1):
            before = self.rest[-1]
            self.rest.append(
                [
                    min(
                        (self.spread[i][j] + before[j] for j in range(i + 1, size - k + 2)),
                        default=math.inf,
                    )
                    for i in range(size)
                ]
                + [math.inf]
            )

    def _spread(self, a: int, b: int) -> float:
        """Sum of squared distances of layers a..b-1 from their mean."""
        part = self.sums[b] - self.sums[a]
        return max(self.squares[b] - self.squares[a] - part * part / (b - a), 0.0)

    def run(self) -> tuple[int, ...] | None:
        least = self.count * (self.count + 1) // 2 + self.layers - self.count
        if self.total < least or (self.count == 1 and self.total % self.layers):
            return None  # too few units for stairs of different heights
        floor = self.rest[self.count][0] + (self.total - self.sums[-1]) ** 2 / self.layers
        # No falling positive heights with this sum can be farther off than this.
        ceiling = float(self.layers) * (max(self.highest, self.total) + 1) ** 2
        slack = 0.25
        while True:
            result = self._within(floor + slack)
            if result is not None or slack > ceiling:
                return result
            slack *= 2

    def _within(self, limit: float) -> tuple[int, ...] | None:
        """The best stairs that cost at most `limit`; None if none do."""
        # State (layers done, units used, last height) -> (cost, state before).
        states: dict[tuple[int, int, int], float] = {(0, 0, self.total + 1): 0.0}
        history: list[dict[tuple[int, int, int], tuple[int, int, int]]] = []
        for left in range(self.count - 1, -1, -1):
            found: dict[tuple[int, int, int], float] = {}
            origin: dict[tuple[int, int, int], tuple[int, int, int]] = {}
            for state, cost in states.items():
                self._extend(state, cost, left, limit, found, origin)
            states = found
            history.append(origin)
        if not states:
            return None
        state = min(states, key=lambda s: (round(states[s], 6), s))
        heights: list[int] = []
        for origin in reversed(history):
            before = origin[state]
            heights = [state[2]] * (state[0] - before[0]) + heights
            state = before
        return tuple(heights)

    def _extend(
        self,
        state: tuple[int, int, int],
        cost: float,
        left: int,
        limit: float,
        found: dict[tuple[int, int, int], float],
        origin: dict[tuple[int, int, int], tuple[int, int, int]],
    ) -> None:
        """Adds every next stair that can still lead below the limit."""
        done, used, last = state
        rest = self.rest[left]
        stops = (self.layers,) if left == 0 else range(done + 1, self.layers - left + 1)
        for stop in stops:
            room = limit - cost - self.spread[done][stop] - rest[stop] + _EPSILON
            if room < 0:
                continue
            n = stop - done
            mean = (self.sums[stop] - self.sums[done]) / n
            reach = math.sqrt(room / n)
            lowest = max(math.ceil(mean - reach), left + 1)
            for height in range(lowest, min(math.floor(mean + reach), last - 1) + 1):
                now = used + n * height
                if left == 0:
                    if now != self.total:
                        continue
                    bound = 0.0
                else:
                    missing = self.total - now - (self.sums[-1] - self.sums[stop])
                    bound = missing * missing / (self.layers - stop)
                price = n * (height - mean) ** 2
                if price + bound > room:
                    continue
                key = (stop, now, height)
                value = cost + self.spread[done][stop] + price
                if value < found.get(key, math.inf) - _EPSILON / 100:
                    found[key] = value
                    origin[key] = state

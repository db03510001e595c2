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
_TIE = 1e-5  # costs that differ by less are equal


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
    """Least-squares stairs of at most `count` whole heights, falling, with a given sum.

    Heights are positive and lie within one unit of the curve's range, for where the sum is hard
    to make up of few stairs, a stair far off the curve would do it too.

    Args:
      ideal: non-increasing curve, one value per layer, in units.
      count: most stairs.
      total: sum of the result over layers, in units.

    Returns:
      One height per layer, or None if no such stairs have the sum.
    """
    best, cost = None, math.inf
    for stairs in range(min(count, len(ideal)), 0, -1):  # of equally good ones the most stairs
        found = _Search(ideal, stairs, total).run(below=cost - _TIE)
        if found is not None:
            best, cost = found
    return best


class _Search:
    """One search for exactly `count` stairs."""

    def __init__(self, ideal: tuple[float, ...], count: int, total: int) -> None:
        self.layers, self.count, self.total = len(ideal), count, total
        self.sums = [0.0, *itertools.accumulate(ideal)]
        self.squares = [0.0, *itertools.accumulate(u * u for u in ideal)]
        self.low = max(math.ceil(ideal[-1] - 1 - _EPSILON), 1)
        self.high = math.floor(ideal[0] + 1 + _EPSILON)
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

    def run(self, below: float) -> tuple[tuple[int, ...], float] | None:
        """The best stairs and their cost, if that is below a limit."""
        floor = self.rest[self.count][0] + (self.total - self.sums[-1]) ** 2 / self.layers
        # No heights between these can be farther off than this.
        most = min(below, float(self.layers) * (self.high - self.low + 2) ** 2)
        slack = 0.25
        while floor < most:
            result = self._within(min(floor + slack, most))
            if result is not None or floor + slack >= most:
                return result
            slack *= 2
        return None

    def _within(self, limit: float) -> tuple[tuple[int, ...], float] | None:
        """The best stairs that cost at most `limit`, and their cost; None if none do."""
        # State (layers done, units used, last height) -> (cost, state before).
        states: dict[tuple[int, int, int], float] = {(0, 0, self.high + 1): 0.0}
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
        cost = states[state]
        heights: list[int] = []
        for origin in reversed(history):
            before = origin[state]
            heights = [state[2]] * (state[0] - before[0]) + heights
            state = before
        return tuple(heights), cost

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
            after = self.layers - stop
            lowest = max(math.ceil(mean - reach), self.low)
            for height in range(lowest, min(math.floor(mean + reach), last - 1) + 1):
                now = used + n * height
                if not after * self.low <= self.total - now <= after * height:
                    continue  # the layers after it cannot make up the sum
                missing = self.total - now - (self.sums[-1] - self.sums[stop])
                bound = missing * missing / after if after else 0.0
                price = n * (height - mean) ** 2
                if price + bound > room:
                    continue
                key = (stop, now, height)
                value = cost + self.spread[done][stop] + price
                if value < found.get(key, math.inf) - _EPSILON / 100:
                    found[key] = value
                    origin[key] = state

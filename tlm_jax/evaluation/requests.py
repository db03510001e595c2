"""What is asked of a model: log-likelihoods of continuations, packed into rows.

The requests of one question mostly begin alike (choices after one context). Laid out in one row,
their common beginning is a trunk that is read once, and each continues as a branch that sees the
trunk and itself (`branches.BRANCH`). Rows are filled with as many questions as fit. Nothing here
needs jax.

Legend: B rows, L row length, P parts of equally many rows (one per device), N scored tokens of
a part.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tlm_jax.branches import BRANCH
from tlm_jax.validation import round_up

ROW_LENGTH = 512
"""Rows of packed questions; longer ones for what does not fit."""
LEAST_SHARED = 8
"""A trunk is shared where that saves at least this many tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Token ids whose log-likelihood is wanted."""

    context: tuple[int, ...]
    """Tokens before; at least one."""
    continuation: tuple[int, ...]
    """Tokens to score; at least one."""
    question: int = 0
    """Requests of equal number may share their beginning."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Both; the model reads all but the last one, which is only predicted."""
        return self.context + self.continuation

    def cut(self, max_length: int) -> "Request":
        """The request with at most `max_length` tokens to read: the beginning is cut off.

        A continuation that is longer itself keeps the tokens that then have one before them.
        """
        tokens = self.tokens[-(max_length + 1) :]
        scored = min(len(self.continuation), len(tokens) - 1)
        return dataclasses.replace(self, context=tokens[:-scored], continuation=tokens[-scored:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Likelihood:
    """The answer to a request."""

    log_likelihood: float
    """Nats, summed over the continuation."""
    is_greedy: bool
    """Every token of the continuation is the likeliest one where it stands."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Requests (by their keys) and the number of tokens that they begin with in common."""

    members: tuple[int, ...]
    trunk: int
    size: int
    """Tokens to read: the trunk and all branches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of one length, and where in them the scored tokens are predicted."""

    arrays: dict[str, np.ndarray]
    """int32 (B, L): inputs, targets, positions, document_ids."""
    at_PN: np.ndarray
    """int32: scored positions among the flattened rows of each part, 0 where there are fewer."""
    spans: tuple[tuple[int, int, int, int], ...]
    """(request, part, begin, end): its positions in `at_PN`."""

    def answers(
        self, nll_PN: np.ndarray, greedy_PN: np.ndarray
    ) -> Iterator[tuple[int, Likelihood]]:
        """The answers of the requests in the batch."""
        for key, part, begin, end in self.spans:
            total = np.sum(nll_PN[part, begin:end], dtype=np.float64)
            greedy = np.all(greedy_PN[part, begin:end] > 0)
            yield key, Likelihood(log_likelihood=-float(total), is_greedy=bool(greedy))


def make_batches(
    requests: Mapping[int, Request], *, pack: bool, batch_tokens: int, parts: int = 1
) -> Iterator[Batch]:
    """Lays out requests in batches of few shapes, longest rows first.

    Longest first, so that what does not fit into memory fails at once.

    Args:
      requests: by any key; no longer than the model allows.
      pack: share trunks and fill rows; False gives each request a row from its start, for
        models to which it matters where in a row a token stands.
      batch_tokens: most tokens of a batch, approximately.
      parts: of a batch, for as many devices that share it.
    """
    rows = _pack(_groups(requests)) if pack else _one_by_one(requests)
    for length, run in itertools.groupby(rows, key=lambda row: row[0]):
        alike = [groups for _, groups in run]
        number = round_up(max(1, batch_tokens // length), parts)
        for start in range(0, len(alike), number):
            yield _fill(requests, alike[start : start + number], number, length, parts)


_Row = tuple[int, list[Group]]


def _one_by_one(requests: Mapping[int, Request]) -> list[_Row]:
    groups = [Group(members=(k,), trunk=0, size=len(r.tokens) - 1) for k, r in requests.items()]
    return sorted(((_row_length(g.size, 64), [g]) for g in groups), key=lambda row: -row[0])


def _row_length(size: int, least: int) -> int:
    """`least` times 1, 1.5, 2, 3, 4, 6, ..., so that there are few lengths."""
    length = least
    while length < size:
        length = length * 3 // 2 if length & (length - 1) == 0 else length * 4 // 3
    return length


def _groups(requests: Mapping[int, Request]) -> list[Group]:
    groups = []
    ordered = sorted(requests, key=lambda k: (requests[k].question, k))
    for _, run in itertools.groupby(ordered, key=lambda k: requests[k].question):
        members = tuple(run)
        some = [requests[k] for k in members]
        trunk = _common(some)
        if trunk * (len(members) - 1) < LEAST_SHARED:
            groups += [
                Group(members=(k,), trunk=0, size=len(requests[k].tokens) - 1) for k in members
            ]
        else:
            size = trunk + sum(len(r.tokens) - 1 - trunk for r in some)
            groups.append(Group(members=members, trunk=trunk, size=size))
    return groups


def _common(requests: Sequence[Request]) -> int:
    """Length of the common beginning, before the position that predicts the first target."""
    first = requests[0].tokens
    length = min(len(r.context) - 1 for r in requests)
    for other in requests[1:]:
        pairs = zip(first[:length], other.tokens[:length], strict=True)
        length = sum(1 for _ in itertools.takewhile(lambda ab: ab[0] == ab[1], pairs))
    return length


def _pack(groups: Sequence[Group]) -> list[_Row]:
    """First fit, largest first: rows with what is in them, longest rows first."""
    rows: list[_Row] = []
    free: list[int] = []
    first = 0  # rows before it are as good as full
    smallest = min((g.size for g in groups), default=0)
    for group in sorted(groups, key=lambda g: (-g.size, g.members)):
        index = next((i for i in range(first, len(rows)) if free[i] >= group.size), None)
        if index is None:
            length = _row_length(group.size, ROW_LENGTH)
            rows.append((length, [group]))
            free.append(length - group.size)
        else:
            rows[index][1].append(group)
            free[index] -= group.size
        while first < len(rows) and free[first] < smallest:
            first += 1
    return sorted(rows, key=lambda row: -row[0])


def _fill(
    requests: Mapping[int, Request],
    rows: Sequence[Sequence[Group]],
    number: int,
    length: int,
    parts: int,
) -> Batch:
    names = ("inputs", "targets", "positions", "document_ids")
    arrays = {name: np.zeros((number, length), np.int32) for name in names}
    scored: list[list[int]] = [[] for _ in range(parts)]
    spans = []
    total = number * length // parts  # positions of a part

    def put(row: int, column: int, tokens: Sequence[int], position: int, document_id: int) -> int:
        """Writes all tokens but the last, which is a target only; returns the next column."""
        end = column + len(tokens) - 1
        arrays["inputs"][row, column:end] = tokens[:-1]
        arrays["targets"][row, column:end] = tokens[1:]
        arrays["positions"][row, column:end] = np.arange(position, position + end - column)
        arrays["document_ids"][row, column:end] = document_id
        return end

    for row, groups in enumerate(rows):
        column = 0
        for document, group in enumerate(groups, 1):
            if group.trunk:
                tokens = requests[group.members[0]].tokens
                column = put(row, column, tokens[: group.trunk + 1], 0, document)
            for branch, key in enumerate(group.members):
                request = requests[key]
                document_id = document + (branch + 1) * BRANCH if group.trunk else document
                column = put(row, column, request.tokens[group.trunk :], group.trunk, document_id)
                part, end = divmod(row * length + column - 1, total)
                begin, size = len(scored[part]), len(request.continuation)
                scored[part].extend(range(end + 1 - size, end + 1))
                spans.append((key, part, begin, begin + size))
    # Eighths of all positions, so that there are few sizes; a sixteenth for single words.
    most = max(len(of_part) for of_part in scored)
    room = total // 16 if 16 * most <= total else -(-8 * most // total) * total // 8
    at_PN = np.zeros((parts, room), np.int32)
    for part, positions in enumerate(scored):
        at_PN[part, : len(positions)] = positions
    return Batch(arrays=arrays, at_PN=at_PN, spans=tuple(spans))

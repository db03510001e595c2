"""Requests laid out in rows: every token once, trunks shared, branches apart."""

import itertools
import random

import numpy as np
import pytest

from tlm_jax.branches import BRANCH
from tlm_jax.evaluation.requests import Request, make_batches


def random_requests(seed: int) -> dict[int, Request]:
    """Questions with one to five choices, some sharing their context, long and short."""
    rng = random.Random(seed)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1, 50) for _ in range(n))

    requests = []
    for question in range(30):
        context = tokens(rng.choice((1, 2, 9, 40, 150, 700)))
        for _ in range(rng.choice((1, 2, 4, 5))):
            own = context if rng.random() < 0.8 else tokens(5)
            requests.append(
                Request(context=own, continuation=tokens(rng.choice((1, 3, 30))), question=question)
            )
    return dict(enumerate(requests, 100))


@pytest.mark.parametrize("pack", [True, False])
def test_what_a_token_sees_is_its_request(pack: bool) -> None:
    """Reading a row by the rule of branches gives back every request and all its targets."""
    requests = random_requests(0)
    seen = {}
    for batch in make_batches(requests, pack=pack, batch_tokens=1024, parts=2):
        arrays = batch.arrays
        B, L = arrays["inputs"].shape
        assert B % 2 == 0
        assert batch.at_PN.shape[0] == 2
        for key, part, begin, end in batch.spans:
            request = requests[key]
            flat = batch.at_PN[part, begin:end] + part * B * L // 2
            row, last = divmod(int(flat[-1]), L)
            document = arrays["document_ids"][row, last]
            assert document > 0
            ids = arrays["document_ids"][row, : last + 1]
            visible = (ids == document) | (ids == document % BRANCH)
            np.testing.assert_array_equal(
                arrays["inputs"][row, : last + 1][visible], request.tokens[:-1]
            )
            np.testing.assert_array_equal(
                arrays["positions"][row, : last + 1][visible], range(len(request.tokens) - 1)
            )
            np.testing.assert_array_equal(arrays["targets"].reshape(-1)[flat], request.continuation)
            seen[key] = (row, document)
    assert seen.keys() == requests.keys()


def test_packing_reads_fewer_tokens_than_there_are() -> None:
    """Common contexts are read once, and rows are filled; alone each request has its row."""
    requests = random_requests(1)
    total = sum(len(r.tokens) - 1 for r in requests.values())

    def tokens(pack: bool) -> int:
        batches = make_batches(requests, pack=pack, batch_tokens=2048)
        return sum(np.count_nonzero(b.arrays["document_ids"]) for b in batches)

    assert tokens(False) == total
    assert tokens(True) < 0.8 * total


def test_few_shapes_longest_first() -> None:
    """Shapes come sorted, and there are few of them."""
    shapes = [
        batch.arrays["inputs"].shape
        for batch in make_batches(random_requests(2), pack=True, batch_tokens=2048)
    ]
    lengths = [length for _, length in shapes]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(shapes)) <= 4


@pytest.mark.parametrize(("context", "continuation", "longest"), [(5, 3, 4), (5, 3, 2), (1, 9, 3)])
def test_cut_keeps_the_end(context: int, continuation: int, longest: int) -> None:
    """What is read has at most `longest` tokens; the last ones are kept."""
    tokens = tuple(range(context + continuation))
    request = Request(context=tokens[:context], continuation=tokens[context:])
    cut = request.cut(longest)
    assert len(cut.tokens) - 1 == longest
    assert cut.tokens == tokens[-(longest + 1) :]
    assert len(cut.continuation) == min(continuation, longest)


def test_a_trunk_ends_before_the_first_target_is_predicted() -> None:
    """Choices that begin with the same tokens have them in their branches, to be scored there."""
    both = [Request(context=tuple(range(1, 20)), continuation=(7, 8, end)) for end in (1, 2)]
    (batch,) = make_batches(dict(enumerate(both)), pack=True, batch_tokens=512)
    ids = batch.arrays["document_ids"][0]
    runs = [(key, len(list(run))) for key, run in itertools.groupby(ids.tolist())]
    # 18 tokens of trunk; the 19th predicts the first target.
    assert runs[:3] == [(1, 18), (1 + BRANCH, 3), (1 + 2 * BRANCH, 3)]

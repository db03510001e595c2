"""Answers on disk: kept, found again, and not taken for those of another model."""

import pathlib
import random

from tlm_jax.evaluation.journal import Journal


def test_answers_are_found_again(tmp_path: pathlib.Path) -> None:
    """Also after a kill in the middle of a line."""
    path = tmp_path / "eval" / "answers.jsonl"
    journal = Journal(path, {"step": 1})
    journal.add("a", [1.5, True])
    journal.add("b", "text\nof lines")
    with path.open("a") as file:
        file.write('{"cut')  # what a killed process leaves
    again = Journal(path, {"step": 1})
    assert again.known(["a", "b", "c"]) == {"a": [1.5, True], "b": "text\nof lines"}
    again.add("c", 3)
    assert Journal(path, {"step": 1}).known(["a", "c"]) == {"a": [1.5, True], "c": 3}


def test_another_checkpoint_begins_anew(tmp_path: pathlib.Path) -> None:
    """Answers belong to what the header says."""
    path = tmp_path / "answers.jsonl"
    Journal(path, {"step": 1}).add("a", 1)
    assert len(Journal(path, {"step": 2})) == 0
    assert len(Journal(path, {"step": 1})) == 0


def test_one_of_several_processes_writes(tmp_path: pathlib.Path) -> None:
    """The others know the answers all the same."""
    path = tmp_path / "answers.jsonl"
    Journal(path, {}).add("a", 1)
    reader = Journal(path, {}, writes=False)
    reader.add("b", 2)
    assert reader.known(["a", "b"]) == {"a": 1, "b": 2}
    assert Journal(path, {}).known(["a", "b"]) == {"a": 1}


def test_no_flipped_byte_changes_an_answer(tmp_path: pathlib.Path) -> None:
    """A line that was damaged is dropped and counted; the others, and what is added, stay."""
    path = tmp_path / "answers.jsonl"
    answers = {f"request {i}": [-1.25 * i, i % 2 == 0] for i in range(20)}
    journal = Journal(path, {"step": 1})
    for key, answer in answers.items():
        journal.add(key, answer)
    journal.close()
    whole = path.read_bytes()
    header = whole.index(b"\n")
    rng = random.Random(0)
    for position in [header, len(whole) - 1, *rng.sample(range(len(whole)), 100)]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        again = Journal(path, {"step": 1})
        found = again.known(list(answers))
        assert found.items() <= answers.items()
        if position > header:
            assert len(found) >= 18
            assert again.damaged or position == len(whole) - 1
        again.add("new", 7)
        again.close()
        third = Journal(path, {"step": 1})
        assert third.known([*answers, "new"]) == {**found, "new": 7}
        assert third.damaged == 0


def test_of_equal_requests_the_first_answer_counts(tmp_path: pathlib.Path) -> None:
    """As it does after a kill that came between the two answers."""
    path = tmp_path / "answers.jsonl"
    journal = Journal(path, {})
    keys = ["same", "other", "same"]
    found = journal.answers(keys, lambda missing: ((i, i) for i in missing), lambda *_: None)
    assert found == [0, 1, 0]
    journal.close()
    assert Journal(path, {}).known(keys) == {"same": 0, "other": 1}

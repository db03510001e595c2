"""Answers on disk: kept, found again, and not taken for those of another model."""

import pathlib

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

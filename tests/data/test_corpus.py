import importlib.util
import json
import lzma
import pathlib

import pytest

from tlm_jax.data import Dataset, load_tokenizer
from tlm_jax.data import sources as sources_lib

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def records() -> list[dict[str, str]]:
    with lzma.open(sources_lib.EMBEDDED, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_sizes_and_titles(records: list[dict[str, str]]) -> None:
    assert len(records) == 564
    assert len({r["title"] for r in records}) == 564
    size = {s: sum(len(r["text"].encode()) for r in records if r["split"] == s) for s in
            ("train", "validation")}  # fmt: skip
    assert size == {"train": 9_323_379, "validation": 580_979}
    assert all(len(r["text"]) > 250 and r["text"] == r["text"].strip() for r in records)


def test_chapters_begin_with_their_headings(records: list[dict[str, str]]) -> None:
    by_title = {r["title"]: r["text"] for r in records}
    assert by_title["Moby-Dick, Chapter 1: Loomings"].startswith(
        "CHAPTER 1. Loomings.\n\nCall me Ishmael."
    )
    assert by_title["Emma, Volume II, Chapter I"].startswith("VOLUME II\n\nCHAPTER I\n\nEmma and")
    assert by_title["Pride and Prejudice, Chapter 1"].startswith(
        "PRIDE AND PREJUDICE\n\nBy Jane Austen\n\nChapter 1\n\nIt is a truth universally"
    )
    for title, text in by_title.items():
        if ", Chapter" in title or "Volume" in title:
            assert text.upper().count("\n\nCHAPTER ") <= 1, title


def test_whole_works_are_held_out(records: list[dict[str, str]]) -> None:
    works = {s: {r["work"] for r in records if r["split"] == s} for s in ("train", "validation")}
    assert not works["train"] & works["validation"]
    assert "Persuasion" in works["validation"]
    assert {w[:23] for w in works["validation"] - {"Persuasion"}} == {
        f"State of the Union {year}" for year in (2019, 2020, 2021)
    }


def test_no_validation_text_in_train(records: list[dict[str, str]]) -> None:
    """No run of 160 characters occurs in both, whitespace apart."""

    def flat(split: str) -> str:
        return "".join("".join(r["text"].split()) + "\0" for r in records if r["split"] == split)

    train, held_out = flat("train"), flat("validation")
    # A run of 160 holds one of 120 that starts at a multiple of 40.
    trained = {train[i : i + 120] for i in range(0, len(train) - 120, 40)}
    assert len(trained) > 150_000
    found = (held_out[i : i + 120] for i in range(len(held_out) - 119))
    assert not [run for run in found if run in trained]


def test_statistics_agree_with_the_text(embedded: Dataset) -> None:
    train, validation = embedded.statistics["train"], embedded.statistics["validation"]
    assert (train.num_documents, train.num_bytes) == (537, 9_323_379)
    assert (validation.num_documents, validation.num_bytes) == (27, 580_979)
    assert validation.num_targets == validation.num_tokens + 27
    assert validation.bytes_per_target == validation.num_bytes / validation.num_targets
    assert 3.5 < validation.bytes_per_target < 4.0


def test_tokenizer_rebuilds_identically(records: list[dict[str, str]]) -> None:
    """On a small part of the text: the training of a vocabulary has no chance in it."""
    path = ROOT / "tools" / "build_corpus.py"
    spec = importlib.util.spec_from_file_location("build_corpus", path)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    texts = [r["text"] for r in records[:20]]
    first, second = (tool.train_tokenizer(iter(texts)).to_str() for _ in range(2))
    assert first == second


def test_embedded_tokenizer() -> None:
    tokenizer = load_tokenizer(None)
    assert (tokenizer.vocab_size, tokenizer.eot_id, tokenizer.name) == (4096, 0, "embedded")
    assert tokenizer.decode(tokenizer.encode("Call me Ishmael.")) == "Call me Ishmael."

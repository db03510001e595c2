"""Best-fit packing and mixtures: what a row holds, shares, and exact resume."""

import dataclasses
import itertools
import json
import pathlib
from typing import Any

import grain
import numpy as np
import pytest
import tyro
from orbax.checkpoint import v1 as ocp

from tlm_jax import config_io
from tlm_jax.config import DataConfig, RunConfig, UserError
from tlm_jax.data import Dataset, open_dataset, packing, prepare, records
from tlm_jax.training import checkpoint

EOT = 256
LENGTH = 64
Batch = dict[str, np.ndarray]


def write(folder: pathlib.Path, letter: str, count: int, size: int) -> str:
    """A prepared folder of documents that begin with a letter, of up to twice `size` bytes."""
    folder.mkdir()
    source = folder.with_suffix(".jsonl")
    texts = [f"{letter}{i}" + "." * (i * 7919 % (2 * size)) for i in range(count)]
    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    rules = records.Rules(validation_fraction=0.2)
    job = prepare.Job(source=records.open_source(str(source), rules), tokenizer="bytes")
    prepare.prepare(job, folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Many documents of about 30 bytes with a, fewer of about 100 with b."""
    base = tmp_path_factory.mktemp("folders")
    return write(base / "short", "a", 400, 30), write(base / "long", "b", 150, 100)


def dataset(*paths: str, weights: tuple[float, ...] = (), **options: Any) -> Dataset:
    values: dict[str, Any] = {"tokenizer": "bytes", "seq_len": LENGTH, "batch_size": 2} | options
    if weights:
        values["mixture"] = tuple(zip(paths, weights, strict=True))
    else:
        values["path"] = paths[0]
    return open_dataset(DataConfig(**values), 257)


def rows(iterator: Any, count: int) -> Batch:
    """So many rows of an iterator of batches."""
    size = count // 2
    batches = list(itertools.islice(iterator, size))
    assert len(batches) == size
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


def documents(data: Batch) -> list[np.ndarray]:
    """The targets of each document of each row; checks ids, positions, inputs and padding."""
    found = []
    for x, y, s, p in zip(*(data[k] for k in ("inputs", "targets", "document_ids", "positions")),
                          strict=True):  # fmt: skip
        pad = s == 0
        assert (np.diff(pad.astype(int)) >= 0).all(), "padding is at the end"
        assert not np.stack([x, y, p])[:, pad].any()
        assert sorted(set(s[~pad])) == list(range(1, s.max() + 1))
        for number in range(1, s.max() + 1):
            mine = s == number
            np.testing.assert_array_equal(p[mine], np.arange(mine.sum()))
            np.testing.assert_array_equal(x[mine][1:], y[mine][:-1])
            found.append(y[mine])
    return found


def test_best_fit_rows_of_hand_made_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each into the fullest row with room; one longer than a row is cut first."""
    monkeypatch.setattr(packing, "BINS", 2)

    def pairs(*tokens: int) -> Batch:
        return {"pairs": np.array([(0, *tokens), (*tokens, 0)], np.int32).T}

    source = [pairs(1, 2), pairs(3, 4, 5, 6, 7), pairs(8), pairs(9), pairs(10)]
    parent = grain.MapDataset.source(source).to_iter_dataset()
    got = list(packing.PackedRows(parent, 5, best_fit=True))
    for group in (slice(0, 2), slice(2, 4)):  # whose order is drawn
        got[group] = sorted(got[group], key=lambda row: tuple(row["inputs"]))
    assert {name: [row[name].tolist() for row in got] for name in got[0]} == {
        "inputs": [[0, 1, 2, 7, 0], [0, 3, 4, 5, 6], [0, 8, 0, 9, 0], [0, 10, 0, 0, 0]],
        "targets": [[1, 2, 0, 0, 0], [3, 4, 5, 6, 7], [8, 0, 9, 0, 0], [10, 0, 0, 0, 0]],
        "document_ids": [[1, 1, 1, 2, 0], [1, 1, 1, 1, 1], [1, 1, 2, 2, 0], [1, 1, 0, 0, 0]],
        "positions": [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4], [0, 1, 0, 1, 0], [0, 1, 0, 0, 0]],
    }


def test_best_fit_keeps_documents_whole(folders: tuple[str, str]) -> None:
    """An epoch has each document once; those that fit in a row are not cut; little is padding."""
    data = dataset(folders[0], packing="best_fit")
    epoch = data.statistics["train"]
    made = rows(data.train_iterator(), 6 * epoch.num_targets // LENGTH)
    found = documents(made)
    whole = [bytes(s[:-1].astype(np.uint8)) for s in found if s[0] == ord("a") and s[-1] == EOT]
    started = [s for s in found if s[0] == ord("a")]
    assert all(len(s) == LENGTH for s in started if s[-1] != EOT)
    assert len(whole) > 3 * epoch.num_documents
    counts = np.unique(whole, return_counts=True)[1]
    assert counts.max() - counts.min() <= 2  # epochs in full, but for the rows being filled
    padding = (made["document_ids"] == 0).mean()
    assert 0 < padding < 0.12
    concat = rows(dataset(folders[0]).train_iterator(), 100)
    assert (concat["document_ids"] > 0).all()


def test_validation_of_best_fit_scores_each_target_once(folders: tuple[str, str]) -> None:
    for data in (dataset(folders[0], packing="best_fit"), dataset(*folders, weights=(1, 2))):
        batches = list(data.validation_batches())
        assert len(batches) == len(data.validation_batches())
        scored = sum(int((b["document_ids"] > 0).sum()) for b in batches)
        assert scored == data.statistics["validation"].num_targets


@pytest.mark.parametrize("steps", [0, 1, 31, 32, 33, 70])
@pytest.mark.parametrize("kind", ["best_fit", "mixture", "both"])
def test_resume_is_exact(kind: str, steps: int, folders: tuple[str, str]) -> None:
    """Within and between the groups of rows that best fit fills, from a state that was JSON."""
    packing_ = "concat" if kind == "mixture" else "best_fit"
    data = (
        dataset(folders[1], packing=packing_)
        if kind == "best_fit"
        else dataset(*folders, weights=(3, 1), packing=packing_)
    )
    iterator = data.train_iterator()
    for _ in range(steps):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = data.train_iterator()
    resumed.set_state(state)
    for expected, got in itertools.islice(zip(iterator, resumed, strict=False), 80):
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name])


def test_state_goes_through_orbax(folders: tuple[str, str], tmp_path: pathlib.Path) -> None:
    data = dataset(*folders, weights=(3, 1), packing="best_fit")
    iterator = data.train_iterator()
    rows(iterator, 50)
    ocp.save_checkpointables(tmp_path / "checkpoint", {"data": iterator})
    expected = rows(iterator, 100)
    resumed = data.train_iterator()
    ocp.load_checkpointables(tmp_path / "checkpoint", {"data": resumed})
    got = rows(resumed, 100)
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name])


def test_workers_of_a_mixture_resume_exactly(folders: tuple[str, str]) -> None:
    data = dataset(*folders, weights=(3, 1), packing="best_fit", num_workers=2)
    iterator = data.train_iterator()
    rows(iterator, 14)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = rows(iterator, 200)
    iterator.close()
    resumed = data.train_iterator()
    resumed.set_state(state)
    got = rows(resumed, 200)
    resumed.close()
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name])
    documents(got)
    assert abs(share_of_b(got) - 0.25) < 0.03


def share_of_b(data: Batch) -> float:
    """Share of rows of the second folder; no row has documents of both."""
    # Rows of the first are no longer than its documents, so that each has the letter of one.
    of_a, of_b = ((data["targets"] == ord(letter)).any(axis=1) for letter in "ab")
    assert not (of_a & of_b).any()
    return float((~of_a).mean())


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.2, 1.8)])
def test_shares_of_a_mixture_are_shares_of_tokens(
    weights: tuple[float, float], folders: tuple[str, str]
) -> None:
    """Whatever the lengths of documents are."""
    made = rows(dataset(*folders, weights=weights, batch_size=2).train_iterator(), 1000)
    assert (made["document_ids"] > 0).all()
    assert abs(share_of_b(made) - weights[1] / sum(weights)) < 0.01


@pytest.mark.parametrize("readers", [2, 16])
@pytest.mark.parametrize("weights", [(3, 1), (0.2, 1.8)])
def test_each_batch_of_several_readers_is_mixed(
    weights: tuple[float, float], readers: int, folders: tuple[str, str]
) -> None:
    """They do not all turn to the same folder at once, and each has its share of both."""
    data = dataset(*folders, weights=weights, batch_size=16, readers=readers)
    iterator = data.train_iterator()
    begin = list(itertools.islice(iterator, 30))
    state = json.loads(json.dumps(iterator.get_state()))
    batches = begin + list(itertools.islice(iterator, 30))
    wanted = weights[1] / sum(weights)
    assert all(abs(share_of_b(batch) - wanted) <= 2 / 16 for batch in batches)
    for first in range(0, 16, 16 // readers):
        alone = [{"targets": b["targets"][first : first + 16 // readers]} for b in batches]
        assert abs(np.mean([share_of_b(part) for part in alone]) - wanted) < 0.04
    resumed = data.train_iterator()
    resumed.set_state(state)
    for expected, got in zip(batches[30:], resumed, strict=False):
        np.testing.assert_array_equal(got["targets"], expected["targets"])


def test_what_a_mixture_holds(folders: tuple[str, str]) -> None:
    data = dataset(*folders, weights=(1, 3))
    short, long = dataset(folders[0]), dataset(folders[1])
    for split in ("train", "validation"):
        both = [d.statistics[split] for d in (short, long)]  # type: ignore[index]
        assert data.statistics[split].num_tokens == sum(s.num_tokens for s in both)  # type: ignore[index]
    assert data.layout()["mixture"] == [[short.fingerprint, 1], [long.fingerprint, 3]]
    assert data.fingerprint not in (short.fingerprint, long.fingerprint)


def metadata(config: DataConfig) -> dict[str, Any]:
    layout = open_dataset(config, 4096).layout()
    return {"config": config_io.to_dict(RunConfig(data=config)), "data_layout": layout}


def test_changes_are_refused_by_name(folders: tuple[str, str], tmp_path: pathlib.Path) -> None:
    """Batches, workers, packing, weights, the content of a folder: each by its name."""
    base = DataConfig(tokenizer="bytes", mixture=((folders[0], 1.0), (folders[1], 3.0)))
    saved = json.loads(json.dumps(metadata(base)))
    assert checkpoint.differences(saved, metadata(base)) == []
    changes: dict[str, Any] = {
        "packing": "best_fit",
        "batch_size": 32,
        "num_workers": 1,
        "seq_len": 128,
        "seed": 1,
        "mixture": ((folders[0], 1.0), (folders[1], 2.0)),
    }
    for name, value in changes.items():
        found = checkpoint.differences(saved, metadata(dataclasses.replace(base, **{name: value})))
        assert any(line.startswith(f"data.{name}: ") for line in found), (name, found)
    skipping = dataclasses.replace(base, skip_corrupt=True)  # nothing was skipped without it
    assert checkpoint.differences(saved, metadata(skipping)) == []
    other = write(tmp_path / "other", "a", 50, 20)
    content = open_dataset(dataclasses.replace(base, mixture=(), path=other), 4096).layout()
    found = checkpoint.differences(saved, metadata(base) | {"data_layout": content})
    assert any(line.startswith("data layout, dataset: ") for line in found)
    assert any(line.startswith("data layout, mixture: ") for line in found)


def test_mixture_on_the_command_line_and_in_json() -> None:
    words = ["--mixture", "web", "0.7", "my books", "0.3", "--packing", "best_fit"]
    for default in (DataConfig(), DataConfig(mixture=(("other", 1.0),))):
        config = tyro.cli(DataConfig, args=words, default=default)
        assert config.mixture == (("web", 0.7), ("my books", 0.3))
    run = RunConfig(data=config)
    assert config_io.from_dict(json.loads(json.dumps(config_io.to_dict(run)))) == run
    for values, message in (
        ({"mixture": (("a", 0.0),)}, "mixture weight 0.0 of a must be a positive number"),
        ({"mixture": (("a", 1.0), ("a", 2.0))}, "names a folder twice"),
        ({"mixture": (("a", 1.0),), "path": "b"}, "exclude each other"),
    ):
        with pytest.raises(ValueError, match=message):
            DataConfig(**values)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has no manifest"):
        open_dataset(DataConfig(mixture=(("nowhere", 1.0),)), 4096)

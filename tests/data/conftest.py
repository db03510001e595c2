import pathlib
import random

import pytest

from tlm_jax.config import DataConfig
from tlm_jax.data import Dataset, open_dataset

VOCAB_SIZE = 4096


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def embedded(cache_dir: str) -> Dataset:
    return open_dataset(DataConfig(cache_dir=cache_dir), VOCAB_SIZE)


@pytest.fixture(scope="session")
def many_files(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """40 files of 40 to 300 bytes, no two alike."""
    folder = tmp_path_factory.mktemp("many")
    rng = random.Random(0)
    for i in range(40):
        words = [f"w{i}"] + [f"{rng.randrange(1000)}" for _ in range(rng.randrange(10, 70))]
        (folder / f"{i:02d}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(scope="session")
def equal_files(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """60 files of 31 bytes: with an end-of-text each, two rows of 16 hold one exactly."""
    folder = tmp_path_factory.mktemp("equal")
    for i in range(60):
        (folder / f"{i:02d}.txt").write_text(f"document {i:02d} " + chr(ord("A") + i % 26) * 19)
    return folder

"""Eight simulated devices, one cache of prepared text, and one small run for all tests.

Nothing here imports jax: the data and plan tests prove that they do without it.
"""

import contextlib
import fcntl
import gc
import importlib.metadata
import os
import pathlib
import random
import shutil
import sys
from collections.abc import Iterator

import programs
import pytest
from helpers import CACHE, DRIVER, NUM_STEPS, Fails, only_error, run

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")  # read when jax is imported
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiles about 3 times as fast
FLAGS = "--xla_cpu_parallel_codegen_split_count=1"  # a sixth less of processor time
if importlib.metadata.version("jaxlib") < "0.11":  # later ones do not know it, and are faster
    FLAGS += " --xla_cpu_use_fusion_emitters=false"  # twice as fast
os.environ.setdefault("XLA_FLAGS", FLAGS)
# Else `tlm` starts itself again for large pages, on which steps as small as these do not depend.
os.environ.setdefault("GLIBC_TUNABLES", "")
os.environ |= CACHE
gc.set_threshold(50_000, 10, 10)  # tracing makes millions of objects that stay
PROGRAMS = programs.store()

CONFIG = """
from tlm_jax import config as c


def get_config():
    return c.RunConfig(
        name="small",
        model=c.ModelConfig(
            vocab_size=257,
            num_layers=4,
            d_model=32,
            mlp_width=64,
            mixer=c.AttentionConfig(num_heads=2),
            remat="none",
        ),
        data=c.DataConfig(path={text!r}, tokenizer="bytes", seq_len=64, batch_size=8),
        optimizer=c.OptimizerConfig(
            learning_rate=4e-3, final_learning_rate=4e-4, warmup_steps=5
        ),
        training=c.TrainingConfig(
            num_steps={num_steps},
            log_every=1,
            eval_every={half},
            eval_batches=2,
            checkpoint_every={half},
            sample_tokens=0,
        ),
    )
"""


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder that all workers of this test session share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "session"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _shared_cache(session_folder: pathlib.Path) -> Iterator[None]:
    """Text is prepared once, and a program compiled once, here and in processes that tests start.

    Programs are kept for later sessions too: see `programs`.
    """
    compiled = session_folder / "compiled"
    with _only_once(compiled) as needed:
        if needed:
            programs.take(PROGRAMS, compiled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(session_folder / "cache"))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(compiled))
        if "jax" in sys.modules:  # it read the environment when it was imported
            _set_jax("jax_compilation_cache_dir", str(compiled))
        yield


@pytest.fixture(scope="module")
def compiled_anew() -> Iterator[None]:
    """No compiled program is taken from earlier: for tests of what the compiler says meanwhile."""
    _set_jax("jax_enable_compilation_cache", False)
    yield
    _set_jax("jax_enable_compilation_cache", True)


def _set_jax(option: str, value: object) -> None:
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update(option, value)
    compilation_cache.reset_cache()  # it may have been asked for a program before


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker runs a module that compiles much, for its tests share programs in the process."""
    for item in items:
        if item.path.parent.name in ("models", "ops") and not item.get_closest_marker(
            "xdist_group"
        ):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Keeps what was compiled, once all workers are done."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        base: pathlib.Path = session.config._tmp_path_factory.getbasetemp()
        programs.keep(base / "session" / "compiled", PROGRAMS)


@pytest.fixture(scope="session")
def text_folder(session_folder: pathlib.Path) -> pathlib.Path:
    """Forty text files of about 900 bytes."""
    folder = session_folder / "text"
    with _only_once(folder) as needed:
        if needed:
            folder.mkdir()
            rng = random.Random(0)
            words = ["early", "late", "layer", "width", "taper", "model", "language"]
            words += [f"x{i}" for i in range(30)]
            for i in range(40):
                content = " ".join(rng.choice(words) for _ in range(180))
                (folder / f"{i:02d}.txt").write_text(content)
    return folder


@pytest.fixture(scope="session")
def config_file(session_folder: pathlib.Path, text_folder: pathlib.Path) -> pathlib.Path:
    """Four tapered layers, byte tokens, 20 steps, checkpoints at 10 and 20."""
    path = session_folder / "small.py"
    with _only_once(path) as needed:
        if needed:
            text = CONFIG.format(text=str(text_folder), num_steps=NUM_STEPS, half=NUM_STEPS // 2)
            path.write_text(text)
    return path


@pytest.fixture(scope="session")
def finished_run(session_folder: pathlib.Path, config_file: pathlib.Path) -> pathlib.Path:
    """A run of 20 steps, not to be written to; beside it `finished.batches` and `.out`."""
    folder = session_folder / "finished"
    with _only_once(folder) as needed:
        if needed:
            train = ("train", "--config", config_file, "--workdir", folder)
            result = run(DRIVER, "--record", folder.with_suffix(".batches"), *train)
            assert result.returncode == 0, result.stderr
            folder.with_suffix(".out").write_text(result.stdout)
    return folder


@contextlib.contextmanager
def _only_once(path: pathlib.Path) -> Iterator[bool]:
    """Yields whether `path` is still to be made, to one worker at a time."""
    done = path.with_name(path.name + ".done")
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not done.exists()
        done.touch()


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs `tlm` in this process and returns its only line of complaint."""

    from tlm_jax import cli

    def run_cli(*words: object) -> str:
        capsys.readouterr()
        status = cli.main([str(word) for word in words])
        assert status in (1, 2)
        return only_error(capsys.readouterr().err)

    return run_cli


@pytest.fixture
def train(config_file: pathlib.Path, tmp_path: pathlib.Path) -> tuple[str, ...]:
    """`tlm train` in a new run folder."""
    return ("train", "--config", str(config_file), "--workdir", str(tmp_path / "run"))


@pytest.fixture
def finished(finished_run: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A finished run to be written to, with checkpoints of steps 10 and 20."""
    return shutil.copytree(finished_run, tmp_path / "finished")

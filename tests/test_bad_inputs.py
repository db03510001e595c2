"""A user's mistake is one line that says what would work; nothing is lost."""

import pathlib

import pytest
from helpers import Fails, only_error, run

from tlm_jax import cli


@pytest.mark.parametrize(
    ("words", "named", "helpful"),
    [
        ("--model.taper.strt 1.2", "--model.taper.strt", "--model.taper.start"),
        ("--modl.d_model 64", "--modl.d_model", "--model.d"),
        ("--model.d_model big", "--model.d", "'big'"),
        ("--optimizer.learning_rate fast", "--optimizer.learning", "'fast'"),
        ("--training.num_steps 7.5", "--training.num", "'7.5'"),
        ("--model.taper.schedule cosin", "'cosin'", "'cosine'"),
        ("--data.seq_len", "--data.seq", "Missing value"),
        ("stray", "stray", "Unrecognized"),
        ("--model.mlp_width 70", "=70", "use mlp_width=72"),
        ("--model.taper.start 2.5", "start=2.5", "use start=1.5"),
        ("--model.mixer.num_heads 3", "3 heads", "use d_model=36"),
        ("--training.grad_accumulation 3", "grad_accumulation=3", "a batch of 9"),
        ("--data.batch_size 12", "data.batch_size=12", "8 devices"),
        ("--data.batch_size 12", "data.batch_size=12", "use data.batch_size=16"),
        ("--data.readers 3", "data.readers=3", "one of [1, 2, 4, 8] readers"),
        ("--data.batch_size 0", "batch_size is 0", "at least 1"),
        ("--mesh.fsdp 3", "fsdp=3", "there are 8"),
        ("--data.seq_len 200", "data.seq_len=200", "one of [1, 2, 4,"),
        ("--model.vocab_size 100", "257", "--model.vocab_size 257"),
        ("--data.path nowhere/at/all", "nowhere/at/all", "does not exist"),
        ("--data.tokenizer nowhere.json", "nowhere.json", "does not exist"),
        ("--data.tokenizer bites", "bites", "the word bytes"),
    ],
)
def test_options(
    words: str, named: str, helpful: str, train: tuple[str, ...], fails: Fails
) -> None:
    """Unknown, mistyped and impossible options: named, with what would work."""
    message = fails(*train, *words.split(" "))
    assert named in message
    assert helpful in message
    assert len(message) < 200
    assert "--- " not in message  # no frame of a box
    assert not (pathlib.Path(train[-1]) / "checkpoints").exists()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_unknown_option_as_a_user_sees_it(encoding: str, train: tuple[str, ...]) -> None:
    """The same line on a terminal that can draw boxes and on one that cannot."""
    variables = {"PYTHONIOENCODING": encoding}
    for words, message in (
        (
            ("--model.taper.strt", "1.2"),
            "Unrecognized options: --model.taper.strt, 1.2; did you mean --model.taper.start?",
        ),
        (("--model.d_model", "big"), "--model.d_model: 'big' is not a whole number"),
        (("--optimizer.eps", "tiny"), "--optimizer.eps: 'tiny' is not a number"),
    ):
        result = run("train.py", *train[1:], *words, variables=variables)
        assert result.returncode == 1
        assert result.stderr == f"error: {message}\n"
        assert result.stdout == ""


@pytest.mark.parametrize(
    ("architecture", "words", "message"),
    [
        (
            "titans",
            "--model.mixer.variant mac --model.mixer.chunk 48",
            "chunk=48 does not divide window=64, the block of variant mac; use one of "
            "[1, 2, 4, 8, 16, 32, 64], or window=96",
        ),
        (
            "titans",
            "--model.mixer.num_heads 5",
            "d_model=192 does not divide into num_heads=5 heads of even dimension; use "
            "d_model=200 or set mixer.head_dim",
        ),
        (
            "tnt",
            "--model.mixer.local_chunks 16 24",
            "a local chunk of 24 does not divide shard=64; use one of [1, 2, 4, 8, 16, 32, 64], or "
            "shard=72",
        ),
        ("tnt", "--model.mixer.variant mac", "local_chunks need variant lmm, mag or mal"),
        ("titans", "--model.mixer.chunk 0", "chunk is 0; it must be at least 1"),
        ("titans", "--model.mixer.memory_depth 5", "memory_depth is 5; a memory has 1 to 4 layers"),
        (
            "titans",
            "--model.mixer.memory_depth 3 --model.mixer.memory_taper.schedule linear",
            "memory_taper needs memory_depth=2, not 3",
        ),
        (
            "titans",
            "--model.mixer.memory_width 192 --model.mixer.memory_taper.schedule linear "
            "--model.mixer.memory_taper.end 0.7",
            "mixer.memory_taper: a linear curve from start=1.5 to end=0.7 has mean 1.1",
        ),
        ("hope_attention", "--model.mlp.periods 1 0", "every level needs a period of at least 1"),
        (
            "hope_attention",
            "--model.mlp.online_chunks 0 48",
            "48 does not divide data.seq_len=256; use divisors of it",
        ),
        ("titan", "", "unknown architecture 'titan'; did you mean titans?"),
    ],
)
def test_architectures(
    architecture: str, words: str, message: str, tmp_path: pathlib.Path, fails: Fails
) -> None:
    """Sizes of the architectures' own that cannot be."""
    config = pathlib.Path(__file__).parents[1] / "configs" / f"tiny.py:{architecture}"
    train = ("train", "--config", config, "--workdir", tmp_path / "run")
    assert message in fails(*train, *words.split())
    assert not (tmp_path / "run").exists()


def test_suggested_options_work(train: tuple[str, ...], fails: Fails) -> None:
    """What a message proposes is accepted: the next complaint is about something else."""
    then = ("--data.path", "nowhere")
    for words in (
        "--model.mlp_width 72",
        "--model.taper.start 1.5 --model.taper.end 0.5",
        "--model.mixer.num_heads 3 --model.d_model 36",
        "--data.batch_size 16",
    ):
        assert fails(*train, *words.split(" "), *then) == "data.path nowhere does not exist"


def test_text(train: tuple[str, ...], fails: Fails, tmp_path: pathlib.Path) -> None:
    """Empty and broken text: the file is named, and where in it the fault is."""
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.touch()
    good = b"A line of text.\n" * 1000
    latin.write_bytes(good + b"caf\xe9 au lait\n" + good)
    assert str(empty) in (message := fails(*train, "--data.path", empty))
    assert "empty" in message
    message = fails(*train, "--data.path", latin)
    assert message == f"{latin} is not UTF-8: byte 0xe9 at offset {len(good) + 3}, line 1001"


def test_tokenizer_with_more_tokens_than_the_model(
    train: tuple[str, ...], fails: Fails, tmp_path: pathlib.Path
) -> None:
    """A larger vocabulary is refused with the number to use; as is a file that is none."""
    import tokenizers

    path = tmp_path / "tokenizer.json"
    reader = tokenizers.Tokenizer(tokenizers.models.BPE())
    reader.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    reader.train_from_iterator(
        [f"word{i} number{i * 7}" for i in range(500)],
        tokenizers.trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    reader.save(str(path))
    message = fails(*train, "--data.tokenizer", path)
    assert str(path) in message
    assert "400 tokens" in message
    assert "use --model.vocab_size 400" in message
    path.write_text('{"model": ')
    message = fails(*train, "--data.tokenizer", path)
    assert message == f"tokenizer {path} is not a Hugging Face tokenizer.json"


@pytest.mark.parametrize(
    ("content", "helpful"),
    [
        (None, "does not exist"),
        ("def get_config(:\n    pass\n", "line 1"),
        ("x = 1\n", "get_config"),
        ("def get_config():\n    return 3\n", "must return a RunConfig"),
        (
            "from tlm_jax.config import *\n"
            "def get_config():\n    return RunConfig(model=ModelConfig(mlp_width=71))\n",
            "use mlp_width=72",
        ),
    ],
    ids=["missing", "syntax", "no function", "no config", "impossible"],
)
def test_config_file(
    content: str | None, helpful: str, fails: Fails, tmp_path: pathlib.Path
) -> None:
    """A config file that is missing or fails is named, with the reason."""
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)
    for verb, option in (("train", "--workdir"), ("plan", "--png")):
        message = fails(verb, "--config", path, option, tmp_path / "out")
        assert str(path) in message
        assert helpful in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[]", "it holds no JSON object"),
        (b"3", "it holds no JSON object"),
        (b'{"name": "\xff"}', "it is not valid JSON"),
        (20_000 * b"[", "it is not valid JSON"),
        (b'{"model": []}', "model is ()"),
        (b'{"config": 3}', "config is '3'; it must be an object with fields"),
        (b'{"seed": "1"}', "seed is '1'; it must be a whole number"),
        (b'{"model": {"num_layers": 1000000000}}', "num_layers is 1000000000; it must be at most"),
        (b'{"model": {"mixer": {"num_heads": 4}}}', "model.mixer has the kind 'None'"),
    ],
)
def test_config_that_is_json(
    content: bytes, reason: str, fails: Fails, tmp_path: pathlib.Path
) -> None:
    """A config.json that is none is named, with the field."""
    path = tmp_path / "config.json"
    path.write_bytes(content)
    message = fails("plan", "--config", path, "--png", tmp_path / "out.png")
    assert str(path) in message
    assert reason in message


def test_verbs_and_their_first_option(fails: Fails) -> None:
    """An unknown verb gets the nearest one; a verb without its file asks for it."""
    assert "did you mean train?" in (message := fails("trian"))
    assert "plan" in message
    assert "--config PATH" in fails("train")
    assert "--checkpoint PATH" in fails("eval")


def test_eval_of_what_is_not_there(
    finished_run: pathlib.Path, fails: Fails, tmp_path: pathlib.Path
) -> None:
    """A folder that is no run, a run without checkpoints, and a step that was not kept."""
    assert fails("eval", "--checkpoint", tmp_path) == (
        f"{tmp_path} is not a run folder: it has no checkpoints/"
    )
    (tmp_path / "checkpoints").mkdir()
    assert fails("eval", "--checkpoint", tmp_path) == f"{tmp_path} has no complete checkpoint"
    message = fails("eval", "--checkpoint", finished_run, "--step", "7")
    assert message == f"{finished_run} has no checkpoint of step 7, only of [10, 20]"
    assert "--step" in fails("eval", "--checkpoint", finished_run, "--step", "x")
    message = fails("eval", "--checkpoint", finished_run, "--data.tokenizer", "None")
    assert "tokenizer" in message


def test_interrupt_before_training_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C while text is prepared or a checkpoint loads."""

    def interrupted(argv: object, prog: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.train, "run", interrupted)
    assert cli.main(["train", "--config", "x.py"]) == 130
    assert "interrupted" in only_error(capsys.readouterr().err)

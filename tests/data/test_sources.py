import itertools
import json
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlm_jax.config import DataConfig, UserError
from tlm_jax.data import open_dataset, sources, streams

VOCAB = 4096


def source_of(path: pathlib.Path, fraction: float = 0.05) -> sources.FilesSource:
    return sources.FilesSource(str(path), fraction)


def documents(source: sources.Source, split: str, size: int = 10**9) -> list[sources.Document]:
    items = [item for unit in source.units(size) for item in source.items(unit)]
    assert all(isinstance(item, sources.Document) for item in items)
    return [i for i in items if isinstance(i, sources.Document) and i.split == split]


def texts(source: sources.Source, split: str, size: int = 10**9) -> list[str]:
    return [d.text for d in documents(source, split, size)]


@given(st.lists(st.sampled_from(["\n\n", "\n", " ", "a", "é", "☃", "word"]), max_size=60),
       st.integers(8, 40))  # fmt: skip
def test_pieces_join_up_again(parts: list[str], limit: int) -> None:
    content = "".join(parts).encode()
    pieces = streams.cut(content, limit)
    assert b"".join(pieces) == content
    assert all(0 < len(p) <= limit for p in pieces[:-1])
    assert len(pieces[-1]) <= limit
    for piece in pieces:
        piece.decode("utf-8")


def test_where_a_text_is_cut() -> None:
    assert streams.cut(b"aaaa bb\n\ncc d\nee", 12) == [b"aaaa bb\n\n", b"cc d\nee"]
    assert streams.cut(b"aaaa bb bb\ncc dd", 12) == [b"aaaa bb bb\n", b"cc dd"]
    assert streams.cut(b"aaaabbbbcc dddd", 12) == [b"aaaabbbbcc ", b"dddd"]
    assert streams.cut(b"a\n\nbbb ccc ddd", 12) == [b"a\n\nbbb ccc ", b"ddd"]  # not too early
    assert streams.cut(b"aaaaaaaaaa\n\nb", 12) == [b"aaaaaaaaaa\n\n", b"b"]
    assert streams.cut("ééé".encode(), 3) == ["é".encode()] * 3


def test_one_file_holds_out_its_last_part(tmp_path: pathlib.Path) -> None:
    paragraphs = [f"Paragraph {i}.\nSecond line of {i}." for i in range(6000)]
    text = "\n\n".join(paragraphs)
    (tmp_path / "a.txt").write_text(text)
    source = source_of(tmp_path / "a.txt")
    train, validation = texts(source, "train"), texts(source, "validation")
    assert "".join(train) + "".join(validation) == text
    assert len(train) > 3
    assert all(len(t.encode()) <= 64 * 1024 for t in train)
    assert all(t.startswith("Paragraph") for t in train + validation)
    assert 0.049 < len("".join(validation)) / len(text) < 0.051
    places = [d.place for d in documents(source, "train")]
    assert places[:2] == [f"{tmp_path}/a.txt", f"{tmp_path}/a.txt, offset {len(train[0])}"]


def test_many_files_are_held_out_whole(many_files: pathlib.Path) -> None:
    source = source_of(many_files, 0.2)
    train, validation = (documents(source, split) for split in ("train", "validation"))
    assert sorted(d.place for d in train + validation) == [
        str(many_files / f"{i:02d}.txt") for i in range(40)
    ]
    for d in train + validation:
        assert d.text == pathlib.Path(d.place).read_text()
    share = sum(len(d.text) for d in validation) / sum(len(d.text) for d in train + validation)
    assert abs(share - 0.2) < 0.01
    assert documents(source_of(many_files, 0.2), "validation") == validation


def test_some_is_held_out_and_some_is_not(tmp_path: pathlib.Path) -> None:
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text("word " * 300)
    for fraction in (0.01, 0.99):
        source = source_of(tmp_path, fraction)
        assert len(texts(source, "train")) == (19 if fraction < 0.5 else 1)
        assert len(texts(source, "validation")) == (1 if fraction < 0.5 else 19)


def test_fingerprint_follows_content_names_and_fraction(tmp_path: pathlib.Path) -> None:
    def fingerprint(name: str, text: str, fraction: float = 0.1) -> str:
        (tmp_path / name).write_text(text)
        content = source_of(tmp_path / name, fraction).content_identity()
        return json.dumps(content)

    text = "word " * 2000
    seen = {fingerprint("a.txt", text), fingerprint("b.txt", text),
            fingerprint("a.txt", text + "!"), fingerprint("a.txt", text, 0.2)}  # fmt: skip
    assert len(seen) == 4
    assert fingerprint("a.txt", text) in seen


def test_what_a_folder_takes_in(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deep" / ".hidden").mkdir(parents=True)
    for name in ("b.TXT", "a.md", "deep/c.txt"):
        (tmp_path / name).write_text(f"{name} " * 1000)
    for name in ("code.py", ".hidden.txt", "deep/.hidden/d.txt"):
        (tmp_path / name).write_text("not this " * 1000)
    (tmp_path / "deep" / "empty.txt").write_text(" \n")
    places = [d.place for d in documents(source_of(tmp_path), "train")]
    assert places == [str(tmp_path / name) for name in ("a.md", "b.TXT", "deep/c.txt")]
    message = f"note: in {tmp_path}, deep/empty.txt is empty and skipped\n"
    assert capsys.readouterr().err == message


def check_error(path: pathlib.Path, message: str, cache: pathlib.Path) -> None:
    config = DataConfig(path=str(path), tokenizer="bytes", cache_dir=str(cache))
    with pytest.raises(UserError) as error:
        open_dataset(config, VOCAB)
    assert str(error.value) == message
    assert not list(cache.glob("*/*")) if cache.exists() else True


def test_bad_paths(tmp_path: pathlib.Path) -> None:
    cache = tmp_path / "cache"
    gone, folder, data = tmp_path / "gone", tmp_path / "folder", tmp_path / "a.csv"
    folder.mkdir()
    data.write_text("{}")
    check_error(gone, f"data.path {gone} does not exist", cache)
    kinds = "(.txt, .md, .jsonl, .ndjson or .parquet)"
    check_error(folder, f"data.path {folder} has no text files {kinds}", cache)
    check_error(data, f"data.path {data} is not a text file {kinds}", cache)


def test_empty_and_small_texts(tmp_path: pathlib.Path) -> None:
    cache, folder = tmp_path / "cache", tmp_path / "folder"
    folder.mkdir()
    for name in ("a.txt", "b.txt", "c.txt", "d.md"):
        (folder / name).write_text("")
    file = folder / "a.txt"
    check_error(file, f"data.path {file} holds no text: a.txt is empty", cache)
    check_error(
        folder,
        f"data.path {folder} holds no text: a.txt, b.txt, c.txt and 1 more are empty",
        cache,
    )
    file.write_text("few words ")
    needed = "with validation_fraction=0.05 at least 5,120 are needed"
    check_error(file, f"data.path {file} has 10 bytes of text; {needed}", cache)


def test_text_that_is_not_utf8(tmp_path: pathlib.Path) -> None:
    cache, file = tmp_path / "cache", tmp_path / "a.txt"
    file.write_bytes(b"line\n" * 2000 + b"caf\xe9\n")
    message = f"{file} is not UTF-8: byte 0xe9 at offset 10003, line 2001"
    check_error(file, message, cache)


@pytest.mark.parametrize("goal", [2_000, 15_000, 20_050, 21_000, 29_999, 30_100, 59_000, 60_001])
def test_sections_from_any_cut_are_those_of_the_whole(
    goal: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the tail that is held out begins near a multiple of the block size."""
    for name, value in (("BLOCK_BYTES", 10_000), ("_BLOCK_WINDOW", 2_000)):
        monkeypatch.setattr(streams, name, value)
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{i}\n" + "\n" * (i % 3 == 0) for i in range(11_000))[:60_100])
    tail = (goal - 1500, goal)
    windows = streams.windows(60_100, tail)
    assert tail in windows
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(windows))
    whole = list(streams.sections(path, 0, 60_100, windows))
    assert b"".join(section for _, section in whole) == path.read_bytes()
    starts = [offset for offset, _ in whole]
    assert starts == [0, *(streams.cut_in(path, window) for window in windows)]
    assert sum(tail[0] < start <= tail[1] for start in starts) == 1
    assert max(len(section) for _, section in whole) < 14_000
    for start, end in itertools.pairwise([*starts, 60_100]):
        assert list(streams.sections(path, start, end, windows)) == [
            (start, path.read_bytes()[start:end])
        ]
        later = list(streams.sections(path, start, 60_100, windows))
        assert later == [(offset, section) for offset, section in whole if offset >= start]

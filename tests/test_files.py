"""Files that survive kills and show damage."""

import contextlib
import json
import pathlib

import pytest

from tlm_jax import files
from tlm_jax.config import UserError

RECORD = {"step": 3, "loss": 3.25, "names": ["a", "é"], "more": {"none": None, "yes": True}}


def test_no_flipped_bit_changes_a_value_in_silence(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "record.json"
    files.write_json(path, RECORD)
    whole = path.read_bytes()
    assert files.read_json(path) == RECORD
    refused = 0
    for place in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                found = files.read_json(path)
            except UserError:
                refused += 1
            else:  # white space, or the word "checksum" itself
                kept = {key: value for key, value in found.items() if key in RECORD}
                assert kept == RECORD, (place, bit)
    assert refused > 6 * len(whole)


def test_an_edited_record_is_accepted_without_its_checksum(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "record.json"
    files.write_json(path, RECORD)
    edited = json.loads(path.read_text()) | {"step": 4}
    path.write_text(json.dumps(edited))
    with pytest.raises(UserError, match="checksum"):
        files.read_json(path)
    del edited[files.CHECKSUM]
    path.write_text(json.dumps(edited))
    assert files.read_json(path) == RECORD | {"step": 4}


@pytest.mark.parametrize("content", [b"[1]", b"3", b"\xff", b"", b"[" * 100_000])
def test_what_is_no_object_is_one_message(tmp_path: pathlib.Path, content: bytes) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"record\.json is damaged"):
        files.read_json(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "record.json"
    files.write_json(path, RECORD)
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "\ud800")
    assert files.read_json(path) == RECORD
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "deep" / "model"
    left = tmp_path / "deep" / ".model.part"
    left.mkdir(parents=True)
    (left / "rest").touch()  # of a process that was killed
    with pytest.raises(ZeroDivisionError), files.new_folder(target) as part:
        (part / "a").write_text(str(1 / 0))
    assert not target.exists()
    with files.new_folder(target) as part:
        (part / "b").touch()
        assert not target.exists()
    assert [entry.name for entry in target.iterdir()] == ["b"]
    assert [entry.name for entry in target.parent.iterdir()] == ["model"]


def test_a_lock_is_held_once_and_freed(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "lock"
    with contextlib.ExitStack() as holder:
        holder.enter_context(files.locked(path, "in use"))
        with pytest.raises(UserError, match="used by process"), files.locked(path, "used by {who}"):
            pass
    with files.locked(path, "in use"):
        pass


def test_only_what_tlm_wrote_is_replaced(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    files.refuse_foreign(path)
    for ours in ("", f"<!-- {files.MARK} -->\n" + 10_000 * "x"):
        path.write_text(ours)
        files.refuse_foreign(path)
    files.write_json(path, RECORD | {"long": 10_000 * "x"})
    files.refuse_foreign(path)
    for theirs in (
        "my notes",
        10_000 * "x" + files.MARK,
        '{"checksum": "0123456789abcdef", "a": 1}',
    ):
        path.write_text(theirs)
        with pytest.raises(FileExistsError, match="not written by tlm") as error:
            files.refuse_foreign(path)
        assert error.value.filename == str(path)
    path.write_text("[own] mine")
    files.refuse_foreign(path, "[own]")

"""`tlm verify` finds what is not as it was written, and says where."""

import json
import pathlib

import pytest
from helpers import contents

from tlm_jax import cli


def _verify(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, dict[str, str]]:
    capsys.readouterr()
    status = cli.main(["verify", str(folder), *words])
    lines = capsys.readouterr().out.splitlines()
    return status, dict(line.split(": ", 1) for line in lines)


@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
def test_verify_says_what_is_damaged(
    finished: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    status, found = _verify(finished, capsys)
    assert status == 0
    assert contents(finished) == before
    assert [found[f"checkpoints/{n}"] for n in (10, 20)] == ["whole", "whole"]
    assert found["config.json"] == "whole"

    arrays = max((finished / "checkpoints" / "20").rglob("*"), key=lambda p: p.stat().st_size)
    data = bytearray(arrays.read_bytes())
    data[len(data) // 2] ^= 4
    arrays.write_bytes(data)
    position = finished / "checkpoints" / "10" / "data" / "position.json"
    position.write_text(position.read_text().replace("next_index", "last_index"))
    config = finished / "config.json"
    config.write_text(config.read_text().replace('"batch_size": 8', '"batch_size": 9'))
    (finished / "eval").mkdir()
    (finished / "eval" / "lines.jsonl").write_text('{"a": 1}\n{"a"\n{"a": 2!}\n')
    before = contents(finished)
    status, found = _verify(finished, capsys)
    assert status == 1
    assert contents(finished) == before
    assert found["checkpoints/20"].startswith("damaged (")
    assert "does not match its checksum" in found["checkpoints/20"]
    assert found["checkpoints/10"].startswith("damaged (position.json: the data's position is")
    assert found["config.json"].startswith("damaged (its values do not match")
    assert found["eval/lines.jsonl"].startswith("damaged (line 3: ")

    metadata = finished / "checkpoints" / "20" / "_CHECKPOINT_METADATA"
    record = json.loads(metadata.read_text())
    del record["custom_metadata"]["state_shapes"], record["custom_metadata"]["checksum"]
    metadata.write_text(json.dumps(record))
    _, found = _verify(finished, capsys, "--step", "20")
    assert found["checkpoints/20"] == "not checked (it was saved without checksums)"

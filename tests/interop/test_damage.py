"""Damaged, huge and hostile model files: one line, at once, or exactly the same model."""

import functools
import hashlib
import json
import os
import pathlib
import random
import struct
from typing import Any

import numpy as np
import pytest
from folders import LLAMA, TAPERED, assert_bit_equal, read_run, write_llama, write_run
from helpers import Fails
from test_import import _import, _write_gguf

from tlm_jax.config import UserError
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.interop import (
    exporting,
    families,
    gguf_file,
    gguf_header,
    gguf_tokenizer,
    importing,
    parameters,
)
from tlm_jax.models import skeleton

HUGE = 10**9
UNSEEN = ("llama.rope.freq_base", "llama.attention.layer_norm_rms_epsilon", "llama.context_length")
"""Numbers whose damage nothing in the file can show."""
_skeleton = functools.cache(skeleton)


def _read(path: pathlib.Path) -> tuple[Any, ...]:
    """Everything that an import takes from a GGUF file."""
    file = gguf_file.GgufFile(path)
    parameters.check_sizes(file.config, file)
    parameters.check(_skeleton(families.model_config(file.config, file.where)), file, native=False)
    tensors = {name: file.read(name, 0, shape[0]).tobytes() for name, shape in file.shapes.items()}
    return file.config, tensors, gguf_tokenizer.tokenizer_file(file)


def _unseen(content: bytes) -> set[int]:
    """Bytes of such numbers, of the tokens' texts and of the lowest byte of their types."""
    found: set[int] = set()
    for key in UNSEEN:
        place = content.index(key.encode()) + len(key) + 4
        found.update(range(place, place + 4))
    place = content.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    (count,) = struct.unpack_from("<Q", content, place)
    place += 8
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", content, place)
        found.update(range(place + 8, place + 8 + length))
        place += 8 + length
    place = content.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 16
    found.update(range(place, place + 4 * count, 4))
    return found


def test_random_damage_to_the_header_of_a_gguf_file(
    bpe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """200 bytes changed, one at a time: refused, or without effect on anything."""
    path = tmp_path / "model.gguf"
    _write_gguf(path, bpe, "Q8_0")
    content = path.read_bytes()
    whole = _read(path)
    unseen = _unseen(content)
    size = content.rindex(b".weight") + len(b".weight") + 32  # dims, type and offset follow
    rng = random.Random(0)
    messages = []
    for _ in range(200):
        place = rng.randrange(size)
        value = rng.choice([v for v in range(256) if v != content[place]])
        path.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
        try:
            found = _read(path)
        except UserError as error:
            messages.append(str(error))
        else:
            assert found == whole or place in unseen, (place, value, content[place - 40 : place])
    assert len(messages) > 150
    assert not [message for message in messages if "\n" in message]


@pytest.mark.parametrize("cut", [0, 3, 20, 100, 5000, -1000, -1])
def test_a_gguf_file_cut_short(cut: int, bpe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Wherever it ends."""
    path = tmp_path / "model.gguf"
    _write_gguf(path, bpe)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"model\.gguf is not a whole GGUF file"):
        _read(path)


@pytest.mark.parametrize(
    ("after", "skipped", "kind", "message"),
    [
        (b"GGUF", 4, "<Q", "tensor '' has 0 dims"),  # tensors
        (b"GGUF", 12, "<Q", "needs"),  # metadata fields
        (b"tokenizer.ggml.tokens", 8, "<Q", "needs"),  # strings of an array
        (b"tokenizer.ggml.token_type", 8, "<Q", "needs"),  # numbers of an array
        (b"tokenizer.ggml.pre", 4, "<Q", "needs"),  # bytes of a string
        (b"token_embd.weight", 4, "<Q", "needs|has offset"),  # a dim
        (b"token_embd.weight", 24, "<Q", "has offset"),
        (b"llama.block_count", 4, "<I", "block_count|num_hidden_layers is 1,000,000,000"),
        (b"llama.attention.head_count", 4, "<I", "positive int|num_attention_heads is"),
        (b"llama.feed_forward_length", 4, "<I", "intermediate_size is 1,000,000,000"),
    ],
)
def test_huge_numbers_in_a_gguf_file(
    after: bytes,
    skipped: int,
    kind: str,
    message: str,
    bpe: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    """They are compared with what the file holds before anything of that size is made."""
    path = tmp_path / "model.gguf"
    _write_gguf(path, bpe)
    content = bytearray(path.read_bytes())
    struct.pack_into(kind, content, content.index(after) + len(after) + skipped, HUGE)
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        _read(path)


def test_numbers_that_are_not_finite(bpe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The scale of a quantised block, and a number of a safetensors file."""
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "model.gguf"
    _write_gguf(path, bpe, "Q8_0")
    content = bytearray(path.read_bytes())
    last = gguf_header.read(path).tensors[-1]
    place = content.rindex(last.data.tobytes())
    content[place : place + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"gguf: {last.name} holds numbers that are not finite"):
        _import(path, tmp_path / "out")
    folder = write_llama(tmp_path / "hf", bpe)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = np.inf
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"hf: model\.norm\.weight holds numbers that are not"):
        _import(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": HUGE}, "num_hidden_layers is 1,000,000,000, and its tensors have"),
        ({"num_hidden_layers": 1e9}, "num_hidden_layers is 1,000,000,000"),
        ({"num_attention_heads": HUGE}, "num_attention_heads is 1,000,000,000, and its tensors"),
        ({"num_key_value_heads": HUGE}, "num_key_value_heads is 1,000,000,000"),
        ({"head_dim": HUGE}, "head_dim is 1,000,000,000"),
        ({"vocab_size": 10**30}, "vocab_size is 1,000,000"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; it must be a number"),
        ({"head_dim": "16"}, "head_dim is '16'; it must be a whole number"),
        ({"rope_parameters": [1]}, "rope_parameters is [1]; it must be an object"),
        ({"layer_types": 5}, "layer_types is 5"),
        ({"rms_norm_eps": []}, "rms_norm_eps is []; it must be a positive number"),
        ({"rope_theta": float("nan")}, "rope_theta is nan; it must be a positive number"),
        ({"tie_word_embeddings": []}, "tie_word_embeddings is []; it must be true or false"),
        ({"model_type": []}, "model_type [] cannot be imported"),
    ],
)
def test_huge_and_odd_values_in_a_config(
    changes: dict[str, Any], message: str, bpe: pathlib.Path, tmp_path: pathlib.Path, fails: Fails
) -> None:
    """They are compared with the tensors before anything of that size is made."""
    folder = write_llama(tmp_path / "hf", bpe)
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    assert message in fails("import", "--model", folder, "--out", tmp_path / "out")


@pytest.mark.parametrize("form", ["llama", "native"])
def test_huge_values_in_the_config_of_an_export(
    form: exporting.Format, tmp_path: pathlib.Path, fails: Fails
) -> None:
    """Also where our own config is kept."""
    write_run(tmp_path / "run", TAPERED)
    exporting.export_model(tmp_path / "run", tmp_path / "out", form=form)
    path = tmp_path / "out" / "config.json"
    values = json.loads(path.read_text())
    for group, name in (("model", "num_layers"), ("mixer", "num_heads"), ("model", "mlp_width")):
        changed = json.loads(json.dumps(values))
        model = changed["tlm_jax"]["config"]["model"]
        (model["mixer"] if group == "mixer" else model)[name] = HUGE
        path.write_text(json.dumps(changed))
        message = fails("import", "--model", tmp_path / "out", "--out", tmp_path / "back")
        assert f"{name} is 1,000,000,000, and its tensors have room for" in message


@pytest.mark.parametrize("name", ["../secret", "/dev/zero", "", "..", "a/b", 5, "pipe", "folder"])
def test_an_index_that_leads_elsewhere(
    name: Any, bpe: pathlib.Path, tmp_path: pathlib.Path, fails: Fails
) -> None:
    """Only regular files beside it are opened; a FIFO would never answer."""
    folder = write_llama(tmp_path / "hf", bpe)
    (folder / "model.safetensors").rename(tmp_path / "secret")
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    message = fails("import", "--model", folder, "--out", tmp_path / "out")
    assert "is not a file beside it" in message or "is not a regular file" in message


def test_links_as_in_the_hugging_face_cache(bpe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A snapshot links to blobs outside of its folder."""
    folder = write_llama(tmp_path / "hf", bpe)
    _, params = _import(folder, tmp_path / "plain")
    snapshot, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        (blobs / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "model.safetensors").rename(snapshot / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_bit_equal(params, _import(snapshot, tmp_path / "run")[1])
    assert_bit_equal(params, read_run(tmp_path / "run")[1])


def test_a_download_with_a_flipped_byte(bpe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Hugging Face's tools leave the SHA-256 of what they fetched: as a name, or in a note."""
    path = tmp_path / "hub" / "model.gguf"
    path.parent.mkdir()
    _write_gguf(path, bpe, "Q8_0")
    content = bytearray(path.read_bytes())
    digest = hashlib.sha256(content).hexdigest()
    importing.import_model(path, tmp_path / "run", None, mesh_lib.single_device_mesh())
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["source"]["sha256"] == {"model.gguf": digest}
    content[-100] ^= 4
    blob = tmp_path / "blobs" / digest
    blob.parent.mkdir()
    blob.write_bytes(content)
    path.unlink()
    path.symlink_to(blob)
    with pytest.raises(UserError, match=rf"model\.gguf is damaged .*, and {digest} was downloaded"):
        _import(path, tmp_path / "out")
    path.unlink()
    path.write_bytes(content)
    _import(path, tmp_path / "unknown")  # nothing tells that it is damaged
    note = path.parent / ".cache" / "huggingface" / "download" / "model.gguf.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"0123abcd\n{digest}\n1700000000.0\n")
    with pytest.raises(UserError, match=rf"model\.gguf is damaged .*, and {digest} was downloaded"):
        _import(path, tmp_path / "out")

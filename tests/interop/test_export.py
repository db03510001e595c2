"""Exports, and the way back without transformers."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
from folders import TAPERED, assert_bit_equal, read_run, write_run
from helpers import only_error

from tlm_jax import cli, mixers
from tlm_jax import config as c
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.interop import exporting, importing

HEADS = dataclasses.replace(
    TAPERED.mixer, num_heads=16, num_kv_heads=8, heads_taper=c.TaperConfig(start=1.5, end=0.5)
)
MODELS: dict[str, c.ModelConfig] = {
    "tapered": TAPERED,
    "untied": dataclasses.replace(TAPERED, tie_embeddings=False),
    "gated": dataclasses.replace(TAPERED, mixer=mixers.GatedAttentionConfig(num_heads=4)),
    "hope": dataclasses.replace(
        TAPERED, mlp=c.MLPConfig(periods=(1, 4)), taper=c.TaperConfig(multiple_of=32)
    ),
    "titans": dataclasses.replace(TAPERED, mixer=mixers.TitansConfig(num_heads=2)),
    "memories": dataclasses.replace(
        TAPERED,
        num_layers=4,
        taper=c.TaperConfig(start=1.25, end=0.75),
        mixer=mixers.InterleavedConfig(
            mixers=(
                mixers.TitansConfig(variant="mac", num_heads=2),
                mixers.TitansConfig(local_chunks=(8,), num_heads=2, conv_width=1),
            )
        ),
    ),
    "heads": dataclasses.replace(TAPERED, mixer=HEADS),
    "qk_norm": dataclasses.replace(TAPERED, mixer=dataclasses.replace(TAPERED.mixer, qk_norm=True)),
}


def _import(model: pathlib.Path, out: pathlib.Path) -> dict[str, Any]:
    return importing.import_model(model, out, None, mesh_lib.single_device_mesh())


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *(
            (name, form)
            for name in ("tapered", "untied")
            for form in ("llama", "compact", "native")
        ),
        ("qk_norm", "llama"),
        *((name, "compact") for name in MODELS if name not in ("tapered", "untied")),
        ("titans", "native"),
    ],
)
def test_there_and_back(name: str, form: exporting.Format, tmp_path: pathlib.Path) -> None:
    """Every format of every model gives the same bits and the same config back."""
    params = write_run(tmp_path / "run", MODELS[name])
    wanted = None if form == "compact" and name not in ("tapered", "untied", "qk_norm") else form
    assert exporting.export_model(tmp_path / "run", tmp_path / "out", form=wanted) == form
    _import(tmp_path / "out", tmp_path / "back")
    config, back = read_run(tmp_path / "back")
    assert config == read_run(tmp_path / "run")[0]
    assert_bit_equal(params, back)


def test_padding_is_to_the_widest(tmp_path: pathlib.Path) -> None:
    """The plain Llama has equal shapes in all layers; what was added is zero."""
    from safetensors.numpy import load_file

    write_run(tmp_path / "run", TAPERED)
    exporting.export_model(tmp_path / "run", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for layer, width in enumerate(TAPERED.mlp_widths):
        mlp = f"model.layers.{layer}.mlp"
        assert tensors[f"{mlp}.gate_proj.weight"].shape == (96, 32)
        assert tensors[f"{mlp}.down_proj.weight"].shape == (32, 96)
        for padding in (
            tensors[f"{mlp}.gate_proj.weight"][width:],
            tensors[f"{mlp}.up_proj.weight"][width:],
            tensors[f"{mlp}.down_proj.weight"][:, width:],
        ):
            assert not np.any(padding)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["intermediate_size"] == 96
    assert config["tlm_jax"]["mlp_widths"] == [96, 80, 64, 48, 32]


def test_shards(tmp_path: pathlib.Path) -> None:
    """Files of a bounded size and an index; a missing one is named."""
    params = write_run(tmp_path / "run", TAPERED)
    exporting.export_model(tmp_path / "run", tmp_path / "out", shard_bytes=40_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 50_000 for file in files)
    _import(tmp_path / "out", tmp_path / "back")
    assert_bit_equal(params, read_run(tmp_path / "back")[1])
    files[1].unlink()
    with pytest.raises(c.UserError, match=r"model-00002-of-\d+.safetensors does not exist"):
        _import(tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize("matrix", ["gate_proj", "up_proj", "down_proj"])
def test_padding_that_is_not_zero(matrix: str, tmp_path: pathlib.Path) -> None:
    """Units beyond a layer's width that do something are not dropped."""
    from safetensors.numpy import load_file, save_file

    write_run(tmp_path / "run", TAPERED)
    exporting.export_model(tmp_path / "run", tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.4.mlp.{matrix}.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][-1, -1] = 1e-8
    save_file(tensors, file)
    with pytest.raises(c.UserError, match=rf"units of {name} from 32 on are not zero"):
        _import(tmp_path / "out", tmp_path / "back")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["tlm_jax"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(c.UserError, match=r"has neither tokenizer.json nor tokenizer.model"):
        _import(tmp_path / "out", tmp_path / "back")


def test_a_changed_field_is_not_overlooked(tmp_path: pathlib.Path) -> None:
    """Llama's own fields count as much as the record of the export."""
    write_run(tmp_path / "run", TAPERED)
    exporting.export_model(tmp_path / "run", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config |= {"rope_theta": 10.0, "rope_parameters": None}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(c.UserError, match=r"rope_theta is 10.0, and its tlm_jax says 500.0"):
        _import(tmp_path / "out", tmp_path / "back")


def test_a_changed_layer_is_not_overlooked(tmp_path: pathlib.Path) -> None:
    """The same for what the modeling code reads."""
    write_run(tmp_path / "run", MODELS["hope"])
    exporting.export_model(tmp_path / "run", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["layers"][1]["rope_theta"] = 10.0
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(c.UserError, match=r"layers is not what its tlm_jax says"):
        _import(tmp_path / "out", tmp_path / "back")


def test_bfloat16_rounds(tmp_path: pathlib.Path) -> None:
    """Half the size; each number is the nearest bfloat16."""
    import jax
    import ml_dtypes

    params = write_run(tmp_path / "run", TAPERED)
    words = ["export", "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--dtype", "bfloat16", "--format", "compact"]) == 0
    words = ["import", "--model", str(tmp_path / "out"), "--out", str(tmp_path / "back")]
    assert cli.main(words) == 0
    rounded = jax.tree.map(
        lambda a: np.asarray(a).astype(ml_dtypes.bfloat16).astype(np.float32), params
    )
    assert_bit_equal(rounded, read_run(tmp_path / "back")[1])


def test_the_card_says_what_is_known(tmp_path: pathlib.Path) -> None:
    """Widths, parameters, data and every number of an evaluation of this step."""
    write_run(tmp_path / "run", TAPERED, path="/some/where/prose.txt")
    (tmp_path / "run" / "eval.json").write_text(json.dumps({"step": 0, "loss": 3.25}))
    (tmp_path / "run" / "eval").mkdir()
    metric = {"task": "piqa", "name": "acc", "value": 0.625, "standard_error": 0.11, "rows": 20}
    record = {"step": 0, "metrics": [metric], "config": {"seed": 5}}
    (tmp_path / "run" / "eval" / "tasks.json").write_text(json.dumps(record))
    (tmp_path / "run" / "eval" / "old.json").write_text(json.dumps({"step": 7, "loss": 9.75}))
    exporting.export_model(tmp_path / "run", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    for expected in (
        "96, 80, 64, 48, 32",
        f"{sum(a.size for a in _leaves(tmp_path / 'run')):,}",
        "`prose.txt` (fingerprint 0123)",
        "| loss | 3.25 |  |  | `eval.json` |",
        "| piqa acc | 0.625 | 0.11 | 20 | `eval/tasks.json` |",
        "the bytes of UTF-8",
    ):
        assert expected in text
    assert "9.75" not in text
    assert "/some/where" not in text


def _leaves(folder: pathlib.Path) -> list[Any]:
    import jax

    return jax.tree.leaves(read_run(folder)[1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gated", "elementwise gated attention"),
        ("hope", "chain of MLPs"),
        ("titans", "Titans MAG"),
        ("heads", "mixer.heads_taper"),
    ],
)
def test_what_llama_cannot_express(
    name: str, message: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names it, and nothing written."""
    write_run(tmp_path / "run", MODELS[name])
    words = ["export", "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--format", "llama"]) == 1
    error = only_error(capsys.readouterr().err)
    assert message in error
    works = "compact, gguf or native" if name == "heads" else "compact or native"
    assert error.endswith(f"use --format {works}")
    assert not (tmp_path / "out").exists()


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnConfig(c.AttentionConfig):
    """A mixer that the package knows nothing of."""

    slope: float = 0.0


def test_what_no_code_for_transformers_computes(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that names it; without --format it goes out under our names."""
    from tlm_jax.interop import tapered

    own = dataclasses.replace(TAPERED, mixer=OwnConfig(slope=2.0))
    assert tapered.why_not(own) == own.mixer.describe(32)
    with monkeypatch.context() as patch:  # a field that a kind of attention gains later
        patch.setattr(tapered, "_MIXERS", (OwnConfig,))
        assert tapered.why_not(own) == "mixer.slope=2.0"
    monkeypatch.setattr(tapered, "_MIXERS", ())
    write_run(tmp_path / "run", MODELS["hope"])
    words = ["export", "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--format", "compact"]) == 1
    error = only_error(capsys.readouterr().err)
    assert "--format compact cannot express attention, 4 heads (2 key/value) of 8" in error
    assert error.endswith("use --format native")
    assert exporting.export_model(tmp_path / "run", tmp_path / "out") == "native"


def test_what_is_there_already_is_not_made_again(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same import or export succeeds and writes nothing; one of another model is refused."""
    run, out, back = tmp_path / "run", tmp_path / "out", tmp_path / "back"
    write_run(run, TAPERED)
    to, fro = (["export", "--checkpoint", run, "--out", out], ["import", "--model", out])
    calls = [[*map(str, to)], [*map(str, fro), "--out", str(back)]]
    assert [cli.main(words) for words in calls] == [0, 0]
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert [cli.main(words) for words in calls] == [0, 0]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == made
    assert cli.main([*calls[0], "--dtype", "bfloat16"]) == 1
    shutil.rmtree(run)
    write_run(run, TAPERED, seed=1)
    capsys.readouterr()
    assert cli.main(calls[0]) == 1
    assert "is not an empty folder" in only_error(capsys.readouterr().err)
    shutil.rmtree(out)
    assert cli.main(calls[0]) == 0
    capsys.readouterr()
    assert cli.main(calls[1]) == 1
    assert "already holds a run" in only_error(capsys.readouterr().err)


def test_a_folder_in_use_is_left_alone(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither verb writes over what is there."""
    write_run(tmp_path / "run", TAPERED)
    words = ["export", "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "run")]
    assert cli.main(words) == 1
    assert "is not an empty folder" in only_error(capsys.readouterr().err)
    exporting.export_model(tmp_path / "run", tmp_path / "out")
    words = ["import", "--model", str(tmp_path / "out"), "--out", str(tmp_path / "run")]
    assert cli.main(words) == 1
    assert "already holds a run" in only_error(capsys.readouterr().err)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "config.json").write_text("mine")
    assert cli.main(words) == 1
    assert "is not an empty folder" in only_error(capsys.readouterr().err)
    assert (tmp_path / "run" / "config.json").read_text() == "mine"

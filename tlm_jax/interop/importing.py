"""A published model as a run folder: parameters, config and tokenizer."""

import dataclasses
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from tlm_jax import files
from tlm_jax.config import DataConfig, ModelConfig, RunConfig, UserError
from tlm_jax.data import load_tokenizer
from tlm_jax.data.tokenizers import file_fingerprint
from tlm_jax.interop import digests, gguf_tokenizer, llama, loading, original
from tlm_jax.interop.gguf_file import GgufFile
from tlm_jax.interop.tensors import SafetensorsFolder, TensorSource
from tlm_jax.models import Skeleton, skeleton
from tlm_jax.training import checkpoint
from tlm_jax.training.loop import CHECKPOINTS

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_SEQ_LEN = 1024


def import_model(
    model: pathlib.Path, out: pathlib.Path, tokenizer: pathlib.Path | None, mesh: Mesh
) -> dict[str, Any]:
    """Writes a run folder from a model, all or nothing; returns the metadata saved with it.

    Args:
      model: a Hugging Face folder, or a GGUF file.
      out: the run folder; it may be there if it is empty.
      tokenizer: a tokenizer.json or .model to use in place of the model's own.
      mesh: where the parameters lie while they are written.

    Raises:
      UserError: the model cannot be imported exactly, or `out` is not empty.
    """
    if (out / CHECKPOINTS).exists():
        raise UserError(f"{out} already holds a run; choose another --out")
    opened = _open(model)
    structure = skeleton(opened.run.model)
    loading.check(structure, opened.source, native=opened.native)
    found = _find_tokenizer(opened, model, tokenizer)
    opened.provenance["sha256"] = digests.check(opened.files)
    with files.new_folder(out) as part:
        return _fill(part, out, opened, structure, found, mesh)


def _fill(
    part: pathlib.Path,
    out: pathlib.Path,
    opened: "_Opened",
    structure: Skeleton,
    tokenizer: tuple[str, bytes] | None,
    mesh: Mesh,
) -> dict[str, Any]:
    """Writes the run folder that will lie at `out` into `part`."""
    run = opened.run
    if tokenizer is None:
        reader = load_tokenizer(run.data.tokenizer)
    else:
        name, content = tokenizer
        (part / name).write_bytes(content)
        try:
            reader = load_tokenizer(str(part / name))
        except UserError as error:  # of a GGUF file; one that was given was read before
            raise UserError(
                str(error).replace(str(part / name), f"in {opened.source.where}")
            ) from None
        data = dataclasses.replace(run.data, tokenizer=str(out / name))
        run = dataclasses.replace(run, data=data)
    if reader.vocab_size > run.model.vocab_size:
        raise UserError(
            f"the tokenizer has {reader.vocab_size} tokens, but the model has only "
            f"{run.model.vocab_size}; give the right one with --tokenizer FILE"
        )
    # A model that was not trained here began its texts as its tokenizer does.
    layout = {"document_prefix": list(reader.prefix_ids)} if not opened.data_layout else {}
    layout |= opened.data_layout | {"tokenizer": reader.fingerprint}
    with jax.set_mesh(mesh):
        params = loading.load(structure, opened.source, mesh, native=opened.native)
        metadata = checkpoint.metadata(run, params, layout)
        metadata["source"] = opened.provenance
        with checkpoint.Checkpoints(part / CHECKPOINTS) as checkpoints:
            checkpoints.save_params(0, params, metadata)
    files.write_json(part / "config.json", metadata)
    return metadata


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Opened:
    """A model that was found, before its tensors are read."""

    run: RunConfig
    source: TensorSource
    native: bool
    data_layout: dict[str, Any]
    provenance: dict[str, Any]
    files: tuple[pathlib.Path, ...]
    """Those that hold the tensors."""


def _open(model: pathlib.Path) -> _Opened:
    source: SafetensorsFolder | GgufFile
    if model.is_dir():
        values = read_config(model)
        source = SafetensorsFolder(model)
    elif model.is_file():
        source = GgufFile(model)
        values = source.config
    else:
        raise UserError(f"{model} does not exist; give a Hugging Face folder or a GGUF file")
    loading.check_sizes(values, source)
    if original.KEY not in values:
        return _Opened(
            run=_run_config(llama.model_config(values, source.where), values, model),
            source=source,
            native=False,
            data_layout={},
            provenance={"file": model.name, "config": values},
            files=source.files,
        )
    ours = original.read(values, source.where)
    return _Opened(
        run=ours.run,
        source=source if ours.native else original.Trimmed(source, ours.run.model.mlp_widths),
        native=ours.native,
        data_layout=ours.data_layout,
        provenance=ours.source or {"file": model.name, "config": {}},
        files=source.files,
    )


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """What a Hugging Face folder's config.json holds.

    Raises:
      UserError: there is none, or it holds no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a Hugging Face folder: it has no config.json")
    return files.read_json(path)


def _find_tokenizer(
    opened: _Opened, model: pathlib.Path, given: pathlib.Path | None
) -> tuple[str, bytes] | None:
    """Name and content of the run folder's tokenizer; None for an export with the bytes."""
    if given is None and isinstance(opened.source, GgufFile):
        return gguf_tokenizer.tokenizer_file(opened.source)
    candidates = [given] if given else [model / name for name in TOKENIZER_FILES]
    recorded = opened.data_layout.get("tokenizer")  # an export of ours may hold it in two forms
    candidates.sort(key=lambda path: not path.is_file() or file_fingerprint(path) != recorded)
    for path in candidates:
        if path.is_file():
            load_tokenizer(str(path))  # a fault is reported with the name that the user knows
            return f"tokenizer{path.suffix}", path.read_bytes()
    if given:
        raise UserError(f"tokenizer {given} does not exist")
    if opened.run.data.tokenizer == "bytes":
        return None
    raise UserError(
        f"{model} has neither {' nor '.join(TOKENIZER_FILES)}; name one with --tokenizer FILE"
    )


def _run_config(config: ModelConfig, values: dict[str, Any], model: pathlib.Path) -> RunConfig:
    """A run of this model: for evaluation, on sequences no longer than it knows."""
    known = values.get("max_position_embeddings") or _SEQ_LEN
    seq_len = 1 << (min(known, _SEQ_LEN).bit_length() - 1)
    return RunConfig(
        name=model.stem if model.suffix == ".gguf" else model.resolve().name,
        model=config,
        data=DataConfig(seq_len=seq_len, batch_size=8),
    )

"""A published model as a run folder: parameters, config and tokenizer."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from tlm_jax import files, storage
from tlm_jax.config import DataConfig, ModelConfig, RunConfig, TrainingConfig, UserError
from tlm_jax.data import Tokenizer, load_tokenizer
from tlm_jax.data.tokenizers import file_fingerprint
from tlm_jax.interop import (
    digests,
    families,
    gguf_tokenizer,
    hub,
    llama,
    own_exports,
    parameters,
    special_tokens,
    tapered,
)
from tlm_jax.interop.gguf_file import GgufFile
from tlm_jax.interop.tensors import SafetensorsFolder, TensorSource
from tlm_jax.models import Skeleton, skeleton
from tlm_jax.training import bucket_checkpoints, checkpoint
from tlm_jax.training.checkpoint import CHECKPOINTS

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_BATCH_TOKENS = 8192
"""Of the batches that a held-out loss is computed on: one row of a long model."""


def import_model(
    model: pathlib.Path | str, out: pathlib.Path, tokenizer: pathlib.Path | None, mesh: Mesh
) -> dict[str, Any]:
    """Writes a run folder from a model, all or nothing; returns the metadata saved with it.

    A folder that this very import has made, as one that was killed in its last moment has, is
    left as it is.

    Args:
      model: a Hugging Face folder, a GGUF file, or hf:ORG/NAME (see `hub.fetch`).
      out: the run folder; it may be there if it is empty.
      tokenizer: a tokenizer.json or .model to use in place of the model's own.
      mesh: where the parameters lie while they are written.

    Raises:
      UserError: the model cannot be imported exactly, or `out` is not empty.
    """
    named = None
    if str(model).startswith(hub.PREFIX):
        model, named = hub.fetch(str(model))
    with storage.local(storage.path(model)) as here:
        return _import(here, named, out, tokenizer, mesh)


def _import(
    model: pathlib.Path,
    named: str | None,
    out: pathlib.Path,
    tokenizer: pathlib.Path | None,
    mesh: Mesh,
) -> dict[str, Any]:
    opened = _open(model, named)
    structure = skeleton(opened.run.model)
    parameters.check(structure, opened.source, native=opened.native, spell=opened.spell)
    found = _find_tokenizer(opened, model, tokenizer)
    opened.provenance["sha256"] = digests.check(opened.files)
    if (out / CHECKPOINTS).exists():
        return _made_before(out, opened, found)
    with files.new_folder(out) as part:
        return _fill(part, out, model, opened, structure, found, mesh)


def _made_before(
    out: pathlib.Path, opened: "_Opened", tokenizer: tuple[str, bytes] | None
) -> dict[str, Any]:
    """The metadata of a run folder, if it is this import.

    Raises:
      UserError: it is not.
    """
    record = out / "config.json"
    metadata = files.read_json(record) if record.is_file() else {}
    same = metadata.get("source") == json.loads(json.dumps(opened.provenance))
    if same and tokenizer is not None:
        name, content = tokenizer
        same = (out / name).is_file() and (out / name).read_bytes() == content
    if not same:
        raise UserError(f"{out} already holds a run; choose another --out")
    return metadata


def _fill(
    part: pathlib.Path,
    out: pathlib.Path,
    model: pathlib.Path,
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
    about_texts, special = _special_tokens(opened, model, reader)
    layout = about_texts | opened.data_layout | {"tokenizer": reader.fingerprint}
    with jax.set_mesh(mesh):
        params = parameters.load(
            structure, opened.source, mesh, native=opened.native, spell=opened.spell
        )
        metadata = checkpoint.metadata(run, params, layout)
        metadata |= special | {"source": opened.provenance}
        with checkpoint.Checkpoints(part / CHECKPOINTS) as checkpoints:
            checkpoints.save_params(0, params, metadata)
    if storage.in_bucket(out):
        bucket_checkpoints.mark_complete(part / CHECKPOINTS / "0")
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
    values: dict[str, Any]
    """Its config."""
    special_tokens: dict[str, Any] | None = None
    """As an export of ours holds them."""
    spell: parameters.Spelling = llama.tensor
    """Names of the tensors, if not `native`."""


def _open(model: pathlib.Path, named: str | None) -> _Opened:
    """Opens a model.

    Args:
      model: its folder or file.
      named: what it is called elsewhere, ORG/NAME@COMMIT.
    """
    source: SafetensorsFolder | GgufFile
    if model.is_dir():
        values = read_config(model)
        source = SafetensorsFolder(model)
    elif model.is_file():
        source = GgufFile(model)
        values = source.config
    else:
        raise UserError(f"{model} does not exist; give a Hugging Face folder or a GGUF file")
    parameters.check_sizes(values, source)
    called = named or model.name
    if own_exports.KEY not in values:
        return _Opened(
            run=_run_config(families.model_config(values, source.where), values, model, named),
            source=source,
            native=False,
            data_layout={},
            provenance={"file": called, "config": values},
            files=source.files,
            values=values,
        )
    ours = own_exports.read(values, source.where)
    return _Opened(
        run=ours.run,
        source=source
        if ours.native or ours.tapered
        else own_exports.Trimmed(source, ours.run.model.mlp_widths),
        native=ours.native,
        data_layout=ours.data_layout,
        provenance=ours.source or {"file": called, "config": {}},
        files=source.files,
        values=values,
        special_tokens=ours.special_tokens,
        spell=tapered.tensor if ours.tapered else llama.tensor,
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


def _special_tokens(
    opened: _Opened, model: pathlib.Path, reader: Tokenizer
) -> tuple[dict[str, Any], dict[str, Any]]:
    """How the model's texts begin, for the layout, and its special tokens, for the metadata."""
    if opened.data_layout:
        template = special_tokens.chat_template(model) if opened.special_tokens else None
        kept = {"special_tokens": opened.special_tokens, "chat_template": template}
        return {}, {name: value for name, value in kept.items() if value is not None}
    if isinstance(opened.source, GgufFile):
        found = special_tokens.of_gguf(opened.source, reader)
    else:
        found = special_tokens.of_folder(model, opened.values, reader)
    record = dataclasses.asdict(found.tokens) | {"separator": reader.eot_id}
    special: dict[str, Any] = {"special_tokens": record}
    if found.chat_template is not None:
        special["chat_template"] = found.chat_template
    return {"document_prefix": list(found.prefix)}, special


def _run_config(
    config: ModelConfig, values: dict[str, Any], model: pathlib.Path, named: str | None
) -> RunConfig:
    """A run of this model: for evaluation, on sequences as long as it knows."""
    name = model.stem if model.suffix == ".gguf" else model.resolve().name
    if named is not None:
        name = named.partition("@")[0].rpartition("/")[2]
    seq_len = families.max_positions(values, str(model))
    most = min(TrainingConfig().loss_chunk, seq_len)
    chunk = next(n for n in range(most, 0, -1) if seq_len % n == 0)
    return RunConfig(
        name=name,
        model=config,
        data=DataConfig(seq_len=seq_len, batch_size=max(1, _BATCH_TOKENS // seq_len)),
        training=TrainingConfig(loss_chunk=chunk),
    )

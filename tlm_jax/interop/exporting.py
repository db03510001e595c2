"""A run's model as a folder for other tools.

Five formats. `llama`: every MLP zero-padded to the widest layer, so that any tool
that knows Llama, or its relative that the model is (`families`), computes the
same. `compact`: each layer as it is, any architecture, with modeling code for
transformers. `deci`: Llama at each layer's width, for vLLM. `gguf`: the same for
llama.cpp, heads included. `native`: our own names, for what none of them can
express. In config.json, `tlm_jax` says what the way back needs.
"""

import hashlib
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
import tokenizers

import tlm_jax
from tlm_jax import files, storage
from tlm_jax.config import ModelConfig, RunConfig, UserError
from tlm_jax.data import Tokenizer
from tlm_jax.data.tokenizers import EMBEDDED
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.interop import (
    card,
    gguf_export,
    gguf_tokenizer,
    gguf_vocabulary,
    llama,
    own_exports,
    parameters,
    sentencepiece_json,
    tapered,
)
from tlm_jax.interop.tensors import SHARD_BYTES, write_safetensors
from tlm_jax.models import skeleton
from tlm_jax.models.skeleton import by_path, place
from tlm_jax.training import checkpoint, restore

Format = Literal["llama", "compact", "deci", "gguf", "native"]
Dtype = Literal["float32", "bfloat16", "float16", "q8_0"]

_MODELING = "modeling_tapered_llama"
_NUMPY: dict[Dtype, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def export_model(
    folder: pathlib.Path,
    out: pathlib.Path,
    *,
    step: int | None = None,
    form: Format | None = None,
    dtype: Dtype = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> Format:
    """Writes a checkpoint's model into a new folder, all or nothing; returns the format.

    A folder that this very export has made, as one that was killed in its last moment has, is
    left as it is.

    Args:
      folder: the run folder.
      out: the folder to make; it may be there if it is empty.
      step: which checkpoint; None is the newest.
      form: None is llama where that is possible, else compact, else native.
      dtype: of the tensors; parameters are float32, so the others round them. float16 and q8_0
        are for gguf.
      shard_bytes: largest file of tensors; a GGUF file is one.

    Raises:
      UserError: the format cannot express the model or has no such dtype, or `out` is not empty.
    """
    step, metadata = restore.saved_metadata(folder, step)
    config = restore.saved_config(metadata)
    form = _checked_format(config, form)
    if form != "gguf" and dtype not in _NUMPY:
        raise UserError(f"--dtype {dtype} needs --format gguf; {form} has {', '.join(_NUMPY)}")
    tokenizer = restore.model_tokenizer(config, metadata)
    values = _config_json(config, metadata, form, dtype, step, _special_tokens(metadata, tokenizer))
    if not _made_before(out, values):
        with files.new_folder(out) as part:
            _fill(part, folder, step, metadata, form, dtype, shard_bytes, tokenizer, values)
    return form


def _made_before(out: pathlib.Path, values: dict[str, Any]) -> bool:
    """Whether a folder is the export whose config.json would hold `values`."""
    if values[own_exports.KEY]["params"] is None:
        return False
    if values[own_exports.KEY]["format"] == "gguf":
        return gguf_export.record(out / gguf_export.FILE) == _digest(values)
    if not list(out.glob("*.safetensors")):
        return False
    try:
        found = json.loads((out / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return bool(found == json.loads(json.dumps(values)))


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _fill(
    out: pathlib.Path,
    folder: pathlib.Path,
    step: int,
    metadata: dict[str, Any],
    form: Format,
    dtype: Dtype,
    shard_bytes: int,
    tokenizer: Tokenizer,
    values: dict[str, Any],
) -> None:
    config = restore.saved_config(metadata)
    structure = skeleton(config.model)
    mesh = mesh_lib.single_device_mesh()
    with jax.set_mesh(mesh):
        params = restore.load_params(folder, step, structure, tokenizer, mesh)
    tensors = _native(params) if form == "native" else _per_layer(params, config.model, form)
    if form == "gguf":
        gguf_export.write(
            out / gguf_export.FILE,
            config,
            list(tensors),  # views of the parameters
            dtype=dtype,
            context_length=values["max_position_embeddings"],
            vocabulary=_vocabulary(config, metadata, tokenizer),
            digest=_digest(values),
        )
    else:
        write_safetensors(
            out,
            ((name, array.astype(_NUMPY[dtype], copy=False)) for name, array in tensors),
            shard_bytes=shard_bytes,
        )
        _write_json(out / "config.json", values)
        for module in _remote_code(config.model, form):
            source = pathlib.Path(__file__).parent / "remote" / f"{module}.py"
            shutil.copyfile(source, out / f"{module}.py")
        if form != "native":
            _write_json(out / "generation_config.json", _special_tokens(metadata, tokenizer))
        _write_tokenizer(config.data.tokenizer, tokenizer, metadata, values, out)
    (out / "README.md").write_text(
        card.text(out, folder, step, metadata, form, dtype), encoding="utf-8"
    )


def _checked_format(config: RunConfig, form: Format | None) -> Format:
    model = config.model
    reasons: dict[Format, str | None] = {
        "llama": llama.why_not(model),
        "compact": llama.why_not(model, "compact") and tapered.why_not(model),
        "deci": llama.why_not(model, "deci"),
        "gguf": gguf_export.why_not(model),
        "native": None,
    }
    if form is None:
        return next(f for f in ("llama", "compact", "native") if reasons[f] is None)
    if reason := reasons[form]:
        *works, last = (name for name, problem in reasons.items() if problem is None)
        use = f"{', '.join(works)} or {last}" if works else last
        raise UserError(f"--format {form} cannot express {reason}; use --format {use}")
    return form


def _remote_code(model: ModelConfig, form: Format) -> tuple[str, ...]:
    """The modules for transformers that an export carries."""
    if form == "deci":
        return (llama.DECI_CONFIGURATION,)
    if form != "compact":
        return ()
    return tapered.MODULES if _has_own_graph(model, form) else (_MODELING,)


def _has_own_graph(model: ModelConfig, form: Format) -> bool:
    """Whether an export is spelled as `tapered` says, and not as `llama` does."""
    return form == "compact" and llama.why_not(model, form) is not None


def _special_tokens(metadata: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Their ids as generation_config.json has them.

    Models trained here have end-of-text only, which begins a text too.
    """
    begin = tokenizer.special.bos if "special_tokens" in metadata else tokenizer.eot_id
    first, *others = tokenizer.end_ids
    ids = {
        "bos_token_id": begin,
        "eos_token_id": [first, *others] if others else first,
        "pad_token_id": tokenizer.special.pad,
    }
    return {name: value for name, value in ids.items() if value is not None}


def _native(params: Any) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in by_path(params).items():
        yield path, np.asarray(leaf)


def _per_layer(params: Any, model: ModelConfig, form: Format) -> Iterator[tuple[str, np.ndarray]]:
    """Under Llama's names, or those of our own graph for transformers."""
    widest = max(model.mlp_widths)
    spell = tapered.tensor if _has_own_graph(model, form) else llama.tensor
    for whole, leaf in by_path(params).items():
        path, layers = place(model, whole)
        stacked = np.asarray(leaf)
        for index, layer in enumerate(layers or [None]):
            spelled = spell(path, layer)
            array = stacked if layers is None else stacked[index]
            if spelled.inputs == 0:
                array = array.reshape(-1)
            elif spelled.inputs is not None:
                outputs, inputs = parameters.flat_shape(array.shape, spelled.inputs)
                array = array.reshape(inputs, outputs).T
            if form == "llama" and (dim := llama.mlp_dim(spelled.name)) is not None:
                missing = [(0, 0), (0, 0)]
                missing[dim] = (0, widest - array.shape[dim])
                array = np.pad(array, missing)
            yield spelled.name, array


def _config_json(
    config: RunConfig,
    metadata: dict[str, Any],
    form: Format,
    dtype: Dtype,
    step: int,
    ends: dict[str, Any],
) -> dict[str, Any]:
    ours = {
        "version": tlm_jax.__version__,
        "format": form,
        "step": step,
        "params": checkpoint.params_id(metadata),
        "mlp_widths": list(config.model.mlp_widths),
        "config": metadata["config"],
        "data_layout": metadata["data_layout"],
    }
    ours |= {name: metadata[name] for name in ("source", "special_tokens") if name in metadata}
    if form == "native":
        return {"model_type": "tlm_jax", "dtype": dtype, "tlm_jax": ours}
    source = metadata.get("source", {}).get("config", {})
    length = source.get("max_position_embeddings", config.data.seq_len)
    if form == "gguf":
        chat = {"chat_template": metadata.get("chat_template")}
        return {"max_position_embeddings": length, "dtype": dtype, "tlm_jax": ours} | chat
    own = _has_own_graph(config.model, form)
    values = (tapered if own else llama).config_json(config.model) | {
        "max_position_embeddings": length,
        "bos_token_id": None,  # Llama's default is 1
        "pad_token_id": None,  # SmolLM3's is 128,004
        **ends,
        "dtype": dtype,
        "torch_dtype": dtype,  # the name before transformers 5
    }
    if form == "compact" and not own:
        values |= {
            "model_type": "tapered_llama",
            "architectures": ["TaperedLlamaForCausalLM"],
            "auto_map": {
                "AutoConfig": f"{_MODELING}.TaperedLlamaConfig",
                "AutoModelForCausalLM": f"{_MODELING}.TaperedLlamaForCausalLM",
            },
            "mlp_widths": list(config.model.mlp_widths),
        }
    if form == "deci":
        values |= llama.deci_json(config.model)
    return values | {"tlm_jax": ours}


def _vocabulary(
    config: RunConfig, metadata: dict[str, Any], tokenizer: Tokenizer
) -> dict[str, Any]:
    """The tokenizer and its chat template as a GGUF file has them."""
    path = _tokenizer_path(config.data.tokenizer)
    prefix = restore.document_prefix(metadata, tokenizer)
    found = gguf_vocabulary.fields(path, tokenizer, prefix, config.model.vocab_size)
    if "chat_template" in metadata:
        found["chat_template"] = metadata["chat_template"]
    return found


def _tokenizer_path(name: str | None) -> pathlib.Path | None:
    """The tokenizer's file; None for bytes."""
    if name == "bytes":
        return None
    return EMBEDDED if name is None else storage.path(name).expanduser()


def _write_tokenizer(
    name: str | None,
    tokenizer: Tokenizer,
    metadata: dict[str, Any],
    values: dict[str, Any],
    out: pathlib.Path,
) -> None:
    """Copies the tokenizer's file, with what transformers needs to open it.

    A SentencePiece model is written as tokenizer.json too, where that gives the same ids. Other
    tools begin a text as a tokenizer.json says, so that of a model trained here says how it was
    trained: with end-of-text first.
    """
    path = _tokenizer_path(name)
    if path is None:
        return
    (out / f"tokenizer{path.suffix}").write_bytes(path.read_bytes())
    prefix = restore.document_prefix(metadata, tokenizer)
    reader = None
    if path.suffix == ".model":
        reader = sentencepiece_json.convert(path)
        if reader is None:
            return
    elif "special_tokens" not in metadata and values["model_type"] != "tlm_jax":
        reader = tokenizers.Tokenizer.from_file(str(path))
    if reader is not None:
        if prefix:
            reader.post_processor = gguf_tokenizer.begin_with(
                reader.id_to_token(prefix[0]), prefix[0]
            )
        reader.save(str(out / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    ends = _special_tokens(metadata, tokenizer) | {"eos_token_id": tokenizer.end_ids[0]}
    for field, index in ends.items():
        settings[field.removesuffix("_id")] = tokenizer.token_of(index)
    settings["add_bos_token"] = bool(prefix)
    if "chat_template" in metadata:
        settings["chat_template"] = metadata["chat_template"]
    if length := values.get("max_position_embeddings"):
        settings["model_max_length"] = length
    _write_json(out / "tokenizer_config.json", settings)


def _write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

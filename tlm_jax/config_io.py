"""Configs as files and JSON: loading, overriding names, comparing."""

import dataclasses
import importlib
import importlib.util
import json
import pathlib
import types
import typing
from typing import Any

from tlm_jax.config import RunConfig, UserError
from tlm_jax.mixers import MixerConfig

CONFIG_FUNCTION = "get_config"
KIND = "kind"
_T = typing.TypeVar("_T")


def load_config(path: str | pathlib.Path) -> RunConfig:
    """Returns what `get_config()` in the Python file at `path` returns.

    `FILE.py:WORD` calls `get_config("WORD")`, as in configs/tiny.py:titans. A JSON file holds the
    values themselves, as the config.json of a run folder does.

    Raises:
      UserError: the file is missing, fails, or has no `get_config`.
    """
    path = pathlib.Path(path)
    if path.suffix != ".json":
        return load(path, CONFIG_FUNCTION, RunConfig)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return from_dict(values.get("config", values))
    except (OSError, ValueError, AttributeError, UserError) as error:
        raise UserError(f"config {path}: {error}") from None


def load(path: str | pathlib.Path, function: str, kind: type[_T]) -> _T:
    """Returns what a function in the Python file at `path` (or FILE.py:WORD) returns.

    Raises:
      UserError: the file is missing, fails, or returns something else.
    """
    file, _, argument = str(path).partition(".py:")
    path = pathlib.Path(f"{file}.py" if argument else path)
    if not path.is_file():
        raise UserError(f"config {path} does not exist")
    spec = importlib.util.spec_from_file_location(f"tlm_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"config {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        found = getattr(module, function)(*([argument] if argument else []))
    except UserError as error:
        raise UserError(f"config {path}: {error}") from None
    except Exception as error:
        raise UserError(f"config {path}: {type(error).__name__}: {error}") from error
    if not isinstance(found, kind):
        raise UserError(f"config {path}: {function}() must return a {kind.__name__}")
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON values.

    A mixer's `kind` says where its class is, as `module:Class`.
    """
    values: dict[str, Any] = {}
    if isinstance(config, MixerConfig):
        values[KIND] = f"{type(config).__module__}:{type(config).__qualname__}"
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        values[field.name] = _to_json(value)
    return values


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple):
        return [_to_json(entry) for entry in value]
    return json.loads(json.dumps(value))


def from_dict(values: dict[str, Any], cls: type = RunConfig, where: str = "") -> Any:
    """The inverse of `to_dict`.

    Raises:
      UserError: a key that `cls` does not have, or a value that it refuses.
    """
    if KIND in values:
        values = dict(values)
        cls = _mixer_class(values.pop(KIND))
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(f"unknown field {where}{unknown[0]}; known: {', '.join(sorted(hints))}")
    arguments = {}
    for name, value in values.items():
        nested = _dataclass_in(hints[name])
        if nested is not None and isinstance(value, dict):
            value = from_dict(value, nested, f"{where}{name}.")
        elif isinstance(value, list):
            value = tuple(
                from_dict(entry, cls, f"{where}{name}[{index}].")
                if isinstance(entry, dict)
                else entry
                for index, entry in enumerate(value)
            )
        arguments[name] = value
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where or 'config'}: {error}") from error


def _dataclass_in(hint: Any) -> type | None:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    for candidate in typing.get_args(hint) if union else (hint,):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _mixer_class(kind: str) -> type:
    module, _, name = kind.partition(":")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"mixer {kind} cannot be imported ({error}); run from the folder that has it, or add "
            "that folder to PYTHONPATH"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, MixerConfig)):
        raise UserError(f"mixer {kind} is not a MixerConfig")
    return cls


def flatten(config: Any, prefix: str = "") -> dict[str, tuple[Any, bool]]:
    """Maps each dotted field name to (value, may change on resume)."""
    flat: dict[str, tuple[Any, bool]] = {}
    if isinstance(config, MixerConfig):
        flat[prefix + KIND] = (type(config).__name__, False)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = (value, field.metadata.get("may_change", False))
    return flat


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Lines `field: old -> new` for every differing field that may not change."""
    before, after = flatten(old), flatten(new)
    absent = ("absent", False)
    return [
        f"{name}: {before.get(name, absent)[0]!r} -> {after.get(name, absent)[0]!r}"
        for name in dict.fromkeys([*before, *after])
        if not after.get(name, absent)[1]
        and before.get(name, absent)[0] != after.get(name, absent)[0]
    ]

"""Configs as files and JSON: loading, overriding names, comparing.

A Python file that the user names is the user's own code and is run. A config that is data (JSON,
a checkpoint's metadata, an imported folder) names the classes of its parts, and
reading it runs no code: they must be loaded already, or lie in a module that the user trusts (see
`trust`).
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import pathlib
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from tlm_jax import files, mixer_costs, storage
from tlm_jax.config import ModelConfig, RunConfig, UserError
from tlm_jax.mixers import MixerConfig
from tlm_jax.mlp import MLPConfig
from tlm_jax.optimizers import OptimizerConfig

CONFIG_FUNCTION = "get_config"
KIND = "kind"
_OWN_FILE = "tlm_config_"
"""Prefix of the module names of the user's Python files, so that they hide no others."""
_BASES = (MixerConfig, MLPConfig, OptimizerConfig)
"""Configs of several kinds, which users may add to."""
_T = typing.TypeVar("_T")
_HERE = pathlib.Path(__file__).parent
SHIPPED = (_HERE if (_HERE / "configs").is_dir() else _HERE.parent) / "configs"
"""The configs that names without a suffix stand for: in the wheel, or else in the repository."""
_trusted: dict[str, pathlib.Path | None] = {}


def load_config(path: str | pathlib.Path) -> RunConfig:
    """Returns what `get_config()` in the Python file at `path` returns.

    `FILE.py:WORD` calls `get_config("WORD")`, as in configs/tiny.py:titans. A JSON file holds the
    values themselves, as the config.json of a run folder does. A name (tiny, tiny:titans) stands
    for a config that ships with the package.

    Raises:
      UserError: the file is missing, fails, or has no `get_config`.
    """
    path = storage.path(path)
    if path.suffix != ".json":
        return load(path, CONFIG_FUNCTION, RunConfig)
    values = files.read_json(path)
    try:
        return from_dict(values.get("config", values))
    except UserError as error:
        raise UserError(f"config {path}: {error}") from None


def load(
    path: str | pathlib.Path, function: str, kind: type[_T], shipped: pathlib.Path = SHIPPED
) -> _T:
    """Returns what a function in the Python file at `path` (or FILE.py:WORD) returns.

    Modules beside the file can be imported; others of the same name come first. NAME and NAME:WORD
    stand for NAME.py in the folder `shipped`.

    Raises:
      UserError: the file is missing, fails, or returns something else.
    """
    file, _, argument = str(path).partition(".py:")
    path = storage.path(f"{file}.py" if argument else path)
    if storage.in_bucket(path):
        raise UserError(f"config {path} is code, which must be on this machine; copy it")
    name, _, word = str(path).partition(":")
    if name.isidentifier():
        path, argument = shipped / f"{name}.py", word
    if not path.is_file():
        found = (f for f in shipped.glob("*.py") if f"def {function}(" in f.read_text("utf-8"))
        names = ", ".join(sorted(file.stem for file in found))
        raise UserError(
            f"config {name if name.isidentifier() else path} does not exist; give a Python file, "
            f"or a name that ships with tlm-jax: {names}"
        )
    try:
        with _found_last(path.resolve().parent):
            found = getattr(_run_file(path), function)(*([argument] if argument else []))
    except UserError as error:
        raise UserError(f"config {path}: {error}") from None
    except Exception as error:
        raise UserError(f"config {path}: {type(error).__name__}: {error}") from error
    if not isinstance(found, kind):
        raise UserError(f"config {path}: {function}() must return a {kind.__name__}")
    return found


@contextlib.contextmanager
def _found_last(folder: pathlib.Path) -> Iterator[None]:
    """Modules in the folder can be imported, unless another has the name."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        del sys.path[len(sys.path) - 1 - sys.path[::-1].index(str(folder))]


def _run_file(path: pathlib.Path) -> types.ModuleType:
    """The module that a Python file gives."""
    name = _OWN_FILE + path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError("it is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up what their annotations name
    spec.loader.exec_module(module)
    return module


def trust(names: Sequence[str]) -> None:
    """Lets `from_dict` run the code of these modules, and of no others, where a config names it.

    Args:
      names: modules, as Python imports them, or their files (FOLDER/NAME.py).

    Raises:
      UserError: a file does not exist.
    """
    _trusted.clear()
    for name in names:
        path = pathlib.Path(name) if name.endswith(".py") else None
        if path is not None and not path.is_file():
            raise UserError(f"--trust_module {name}: the file does not exist")
        _trusted[path.stem if path else name] = path


def trust_options(config: RunConfig) -> list[str]:
    """Options with which another process of this program reads the config from JSON."""
    options = []
    parts = (*config.model.mixers, config.model.mlp, config.optimizer)
    names = [type(part).__module__ for part in parts]
    names += [mixer_costs.NORM_MODULES.get(config.model.norm, __package__)]
    for name in dict.fromkeys(names):
        if name.partition(".")[0] != __package__:
            module = name.removeprefix(_OWN_FILE)
            file = getattr(sys.modules.get(name), "__file__", None)
            named = module if file is None or "." in module else file
            options += ["--trust_module", named]
    return options


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON values.

    A mixer's `kind`, or that of an MLP or optimizer other than the default, says which class it
    is, as `module:Class`.
    """
    values: dict[str, Any] = {}
    if _base(type(config)) not in (None, type(config)):
        values[KIND] = _kind(type(config))
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


def from_dict(values: Any, cls: Any = RunConfig, where: str = "") -> Any:
    """The inverse of `to_dict`.

    Raises:
      UserError: a key that `cls` does not have, a value that it refuses, or a mixer whose class
        is neither loaded nor in a module that is trusted.
    """
    here = where.rstrip(".") or "config"
    if not isinstance(values, dict):
        raise UserError(f"{here} is {str(values)[:80]!r}; it must be an object with fields")
    values = dict(values)
    base = _base(cls)
    if base is MixerConfig or (base is not None and KIND in values):
        cls = _class(values.pop(KIND, None), base, here)
    hints = typing.get_type_hints(cls)
    known = sorted(field.name for field in dataclasses.fields(cls))
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UserError(f"unknown field {where}{unknown[0]}; known: {', '.join(known)}")
    arguments = {}
    for name, value in values.items():
        nested = _dataclass_in(hints[name])
        if nested is not None and isinstance(value, dict):
            value = from_dict(value, nested, f"{where}{name}.")
        elif isinstance(value, list):
            value = tuple(
                _entry(entry, hints[name], f"{where}{name}[{index}]")
                for index, entry in enumerate(value)
            )
        arguments[name] = value
    try:
        config = cls(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{here}: {error}") from error
    if isinstance(config, ModelConfig):
        _find_norm(config.norm)
    return config


def _entry(value: Any, hint: Any, where: str) -> Any:
    """An entry of a tuple."""
    if isinstance(value, dict) and typing.get_args(hint):
        inner = _dataclass_in(typing.get_args(hint)[0])
        if inner is not None:
            return from_dict(value, inner, f"{where}.")
    return tuple(value) if isinstance(value, list) else value


def _dataclass_in(hint: Any) -> type | None:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    for candidate in typing.get_args(hint) if union else (hint,):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _kind(cls: type) -> str:
    return f"{cls.__module__.removeprefix(_OWN_FILE)}:{cls.__qualname__}"


def _base(cls: type) -> type | None:
    """The base of the configs among which `kind` tells, or None for a config of one kind."""
    return next((base for base in _BASES if issubclass(cls, base)), None)


def _loaded(cls: type) -> Iterator[type]:
    """The class and all below it that this process has loaded, in order."""
    yield cls
    below: type
    for below in cls.__subclasses__():
        yield from _loaded(below)


def _class(kind: Any, base: type, where: str) -> type:
    """The class that a `kind` names; code is run only of modules that are trusted."""
    kind = str(kind)
    module, _, name = kind.partition(":")
    if kind not in (found := {_kind(cls): cls for cls in _loaded(base)}):
        if not (name and all(word.isidentifier() for word in module.split("."))):
            raise UserError(f"{where} has the kind {kind[:80]!r}; it must be module:Class")
        if module not in _trusted:
            raise UserError(
                f"{where} has the kind {kind[:80]!r}, which is not part of tlm-jax: loading it "
                f"runs the code of the module {module[:80]}. If you trust that code, add "
                f"--trust_module {module[:80]} (or its file, FOLDER/NAME.py)"
            )
        _import_trusted(module)
        found = {_kind(cls): cls for cls in _loaded(base)}
    if kind not in found:
        raise UserError(f"{where} has the kind {kind!r}, but {module} has no such {base.__name__}")
    return found[kind]


def _find_norm(name: str) -> None:
    """Imports what is trusted until the norm is registered."""
    for module in _trusted:
        if name not in mixer_costs.NORM_PARAMETERS:
            _import_trusted(module)


def _import_trusted(module: str) -> None:
    path = _trusted[module]
    try:
        if path is None:
            importlib.import_module(module)
        else:
            with _found_last(path.resolve().parent):
                _run_file(path)
    except Exception as error:
        hint = ""
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            hint = (
                f"; run from the folder that has it, or give its file: --trust_module {module}.py"
            )
        raise UserError(
            f"--trust_module {path or module}: {type(error).__name__}: {error}{hint}"
        ) from error


def flatten(config: Any, prefix: str = "") -> dict[str, tuple[Any, bool]]:
    """Maps each dotted field name to (value, may change on resume)."""
    flat: dict[str, tuple[Any, bool]] = {}
    if _base(type(config)) is not None:
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

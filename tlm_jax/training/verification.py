"""Whether the files of a run folder are unchanged, by their checksums."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

import jax
from orbax.checkpoint import v1 as ocp

from tlm_jax import files
from tlm_jax.config import UserError
from tlm_jax.data.tokenizers import file_fingerprint
from tlm_jax.models.skeleton import path_of
from tlm_jax.training import checkpoint, checksums, damage, position
from tlm_jax.training.checkpoint import CHECKPOINTS

_ELSEWHERE = (CHECKPOINTS, "damaged", "tensorboard", "profile")
_SHOWN = 4
_AT_ONCE = 2**28


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What is known of a file or a checkpoint."""

    name: str
    """Its path in the run folder."""
    verdict: Literal["whole", "damaged", "not checked"]
    detail: str = ""


def verify(folder: pathlib.Path, step: int | None) -> Iterator[Finding]:
    """Yields what is known of each checkpoint, or of one, and of the other files.

    Arrays are read some at a time, onto the first device.

    Raises:
      UserError: there is no such run folder or checkpoint, or a file cannot be read.
    """
    path = folder / CHECKPOINTS
    if not path.is_dir():
        raise UserError(f"{folder} is not a run folder: it has no {CHECKPOINTS}/")
    tokenizers: set[str] = set()
    with checkpoint.Checkpoints(path, read_only=True) as checkpoints:
        if step is not None and step not in checkpoints.steps:
            raise UserError(f"{folder} has no checkpoint of step {step}, only {checkpoints.steps}")
        for number in checkpoints.steps if step is None else [step]:
            yield _checkpoint(checkpoints, number, tokenizers)
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.relative_to(folder).parts[0] not in _ELSEWHERE:
            name = str(file.relative_to(folder))
            if file.suffix == ".jsonl":
                yield _found(name, *_lines(file))
            elif name in ("tokenizer.json", "tokenizer.model"):
                known = not tokenizers or file_fingerprint(file) in tokenizers
                yield _found(name, [] if known else ["no checkpoint names this tokenizer"], "")
            elif file.suffix == ".json":
                yield _found(name, *_record(file))


def _found(name: str, faults: list[str], note: str) -> Finding:
    """Damaged if there are faults, not checked if there is a note."""
    if faults:
        more = f", and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        detail = "; ".join(faults[:_SHOWN]) + more
        return Finding(name=name, verdict="damaged", detail=detail)
    return Finding(name=name, verdict="not checked" if note else "whole", detail=note)


def _checkpoint(checkpoints: checkpoint.Checkpoints, step: int, tokenizers: set[str]) -> Finding:
    name = f"{CHECKPOINTS}/{step}"
    faults = []
    try:
        saved = checkpoints.metadata(step)
        tokenizers.add(saved["data_layout"]["tokenizer"])
        if checkpoint.CHECKSUMS not in saved:
            return _found(name, [], "it was saved without checksums")
        tree = ocp.metadata(checkpoints.readable(step), "state").metadata
    except Exception as error:
        if not damage.is_damage(error):
            raise
        return _found(name, [damage.reason(error)], "")
    if checksums.shapes(tree) != saved["state_shapes"]:
        faults.append("it holds other arrays than were saved")
    if not saved.get("parameters_only"):
        for file in position.names(saved["data_layout"]):
            faults += _position(checkpoints.folder / str(step) / "data" / file)
    for part in _parts(tree):
        faults += _arrays(checkpoints, step, tree, part)
    return _found(name, faults, "")


def _parts(tree: Any) -> Iterator[list[Any]]:
    """Paths of the leaves, in groups that fit in memory side by side."""
    part: list[Any] = []
    size = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if part and size > _AT_ONCE:
            yield part
            part, size = [], 0
        part.append(path)
        size += math.prod(leaf.shape) * leaf.dtype.itemsize
    yield part


def _arrays(
    checkpoints: checkpoint.Checkpoints, step: int, tree: Any, paths: list[Any]
) -> list[str]:
    """What is wrong with these leaves: if anything is, each is looked at by itself."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place) if path in paths else None
        ),
        tree,
    )
    try:
        checkpoints.restore_part(step, wanted)
    except checkpoint.DamagedCheckpointError as error:
        if len(paths) == 1:
            name, reason = path_of(paths[0]), damage.reason(error)
            return [reason if reason.startswith(name) else f"{name}: {reason}"]
        found = [_arrays(checkpoints, step, tree, [path]) for path in paths]
        return [fault for faults in found for fault in faults]
    return []


def _position(path: pathlib.Path) -> list[str]:
    try:
        position.verified(json.loads(path.read_bytes()), sealed=True)
    except (FileNotFoundError, ValueError, TypeError, files.DamagedFileError) as error:
        return [f"{path.name}: {damage.reason(error)}"]
    return []


def _record(path: pathlib.Path) -> tuple[list[str], str]:
    """(faults, note) of a JSON file."""
    try:
        files.read_json(path)
        unsealed = files.CHECKSUM not in json.loads(path.read_bytes())
    except files.DamagedFileError as error:
        return [str(error).removeprefix(f"{path} is damaged: ")], ""
    return [], "it has no checksum" if unsealed else ""


def _lines(path: pathlib.Path) -> tuple[list[str], str]:
    """(faults, note) of a file with a JSON record in each line."""
    faults, unsealed, cut_off = [], 0, 0
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line and not line.endswith(b"}"):
            cut_off += 1  # by a kill; the readers leave it out
            continue
        try:
            record = json.loads(line or b"{}")
            unsealed += files.CHECKSUM not in record
            files.verified(record, f"line {number}")
        except (ValueError, TypeError, files.DamagedFileError) as error:
            faults.append(f"line {number}: {damage.reason(error)}")
    notes = [f"{unsealed} lines have no checksum"] if unsealed else []
    return faults, "; ".join([*notes, f"{cut_off} lines were cut off"] if cut_off else notes)

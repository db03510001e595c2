"""Checkpoints of a run: Orbax, asynchronous, compared by name before they are loaded.

A checkpoint of step s lies in `checkpoints/s` and holds the training state, the
position of the data iterator and, as metadata, what is needed to tell whether
this program may continue it: the resolved config, widths, shapes, the data
layout; and whether it is still what was saved: a checksum for each array, over
the position and over the metadata themselves. Orbax writes into a temporary
folder and renames it when it is complete; in a bucket, it writes a last file (`storage.COMMIT`).
On s3://, where Orbax does not save, see `bucket_checkpoints.Staging`.
"""

import errno
import functools
import json
import pathlib
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

import tlm_jax
from tlm_jax import config_io, files, storage
from tlm_jax.config import RunConfig, UserError
from tlm_jax.models.skeleton import by_path
from tlm_jax.training import bucket_checkpoints, checksums, damage
from tlm_jax.training.damage import DamagedCheckpointError as DamagedCheckpointError
from tlm_jax.training.position import Position
from tlm_jax.training.step import TrainState
from tlm_jax.validation import some

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in a run folder."""
_METADATA = "_CHECKPOINT_METADATA"
CHECKSUMS = "checksums"


def metadata(config: RunConfig, params: Any, layout: dict[str, Any]) -> dict[str, Any]:
    """What is stored beside the arrays, as JSON values.

    Args:
      config: the resolved config.
      params: parameters, or their shapes.
      layout: what the order of the batches depends on (`Dataset.layout`).
    """
    shapes = param_shapes(params)
    return {
        "tlm_jax": tlm_jax.__version__,
        "jax": jax.__version__,
        "git_revision": _git_revision(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "config": config_io.to_dict(config),
        "mlp_widths": list(config.model.mlp_widths),
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "param_shapes": shapes,
        "data_layout": layout,
    }


def param_shapes(params: Any) -> dict[str, list[int]]:
    """Shape of each parameter by its path, such as `segments/000/mlp/0/gate`."""
    return {path: list(leaf.shape) for path, leaf in by_path(params).items()}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What keeps `new` metadata from continuing a checkpoint with `old`, one line each.

    Raises:
      UserError: the checkpoint holds no training state.
    """
    if old.get("parameters_only"):
        raise UserError(
            "the run folder holds parameters without optimizer state, such as an imported model "
            "has; it can be evaluated, but to train use another --workdir"
        )
    before = config_io.from_dict(old["config"])
    lines = config_io.differences(before, config_io.from_dict(new["config"]))
    named = {line.split(":")[0].rsplit(".", 1)[-1] for line in lines}
    for key, value in new["data_layout"].items():
        if key not in named and old["data_layout"].get(key) != value:
            lines.append(f"data layout, {key}: {old['data_layout'].get(key)!r} -> {value!r}")
    return lines


def shape_differences(saved: dict[str, Any], params: Any) -> list[str]:
    """Parameters that are missing, extra or of another shape than in a checkpoint, one line each.

    Args:
      saved: the checkpoint's metadata.
      params: parameters, or their shapes.
    """
    return _different(saved["param_shapes"], param_shapes(params))


def params_id(metadata: dict[str, Any]) -> str | None:
    """A digest of the parameters' values; None for checkpoints from before there were checksums.

    Args:
      metadata: of a checkpoint.
    """
    if CHECKSUMS not in metadata:
        return None
    return checksums.identity(metadata[CHECKSUMS], "params/")


class Checkpoints:
    """The checkpoints of one run folder; a context manager.

    Args:
      folder: where the numbered checkpoints lie; made if it is missing.
      keep_last: newest checkpoints kept.
      keep_every: also keep those whose step is a multiple of this.
      read_only: leave the remains of interrupted saves alone: another process may
        be writing them.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        read_only: bool = False,
    ) -> None:
        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(keep_last) if keep_last else policies.PreserveAll()]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        self.folder = folder.absolute()
        self._saving: int | None = None
        self._pending: Any = None
        self.unfinished = bucket_checkpoints.unfinished(folder)
        """Steps whose save was interrupted; their remains are removed."""
        self._staging = None
        if bucket_checkpoints.on_s3(self.folder):
            self._staging = bucket_checkpoints.Staging(
                self.folder, keep_last=keep_last, keep_every=keep_every, read_only=read_only
            )
            kept = [policies.LatestN(1)]
        self._open = functools.partial(
            ocp.training.Checkpointer,
            self._staging.local if self._staging else self.folder,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=not read_only,
        )
        checks = storage.in_bucket(self.folder) and not read_only
        whole = set(bucket_checkpoints.complete(self.folder)) if checks else set()
        with self._reported("open the checkpoints"):
            self._checkpointer = self._open()
            if lost := whole - set(self.steps):
                # gcsfs takes a folder that it cannot reach for one that is not there.
                raise OSError(errno.ENETUNREACH, f"step {max(lost)} cannot be reached; try again")

    @property
    def steps(self) -> list[int]:
        """Steps of complete checkpoints, oldest first."""
        if self._staging:
            return bucket_checkpoints.complete(self.folder)
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def readable(self, step: int) -> pathlib.Path:
        """Where Orbax finds a step."""
        return self._staging.readable(step) if self._staging else self.folder / str(step)

    def save(self, step: int, state: TrainState, iterator: Any, metadata: dict[str, Any]) -> None:
        """Starts to save; returns when the arrays are copied, before they are written.

        Raises:
          UserError: this save, or the one before, failed; older checkpoints are intact.
        """
        self.wait()
        self._saving = step
        with self._save_reported():
            tree = _as_dict(state)
            self._pending = self._checkpointer.save_checkpointables_async(
                step,
                {"state": tree, "data": Position(iterator), CHECKSUMS: checksums.Saved(tree)},
                custom_metadata=_sealed(metadata, tree),
                force=True,
            )
            if self._staging:
                self._pending = self._staging.upload(step, self._pending.result)

    def save_params(self, step: int, params: Any, metadata: dict[str, Any]) -> None:
        """Saves parameters alone, and waits until they are written.

        Raises:
          UserError: the save failed.
        """
        self._saving = step
        with self._save_reported():
            tree = {"params": params}
            self._checkpointer.save_checkpointables(
                step,
                {"state": tree, CHECKSUMS: checksums.Saved(tree)},
                custom_metadata=_sealed(metadata | {"parameters_only": True}, tree),
                force=True,
            )
            if self._staging:
                self._staging.upload(step, lambda: None).result()

    def check(self) -> None:
        """Raises what `wait` would if it is known by now; does not wait."""
        with self._save_reported(), suppress(TimeoutError):
            if self._pending is not None:
                self._pending.result(timeout=0)
                self._pending = None

    def wait(self) -> None:
        """Waits until the last save is complete.

        Raises:
          UserError: it failed, for example because the disk is full.
        """
        with self._save_reported():
            if self._pending is not None:
                pending, self._pending = self._pending, None
                pending.result()  # ends its thread and event loop, which `wait` leaves behind
            self._checkpointer.wait()

    def metadata(self, step: int) -> dict[str, Any]:
        """The metadata that was saved with a step, and the checksums of the arrays."""
        with self._reported(f"read step {step}", damaged=step):
            return damage.together(functools.partial(self._metadata, step))

    def _metadata(self, step: int) -> dict[str, Any]:
        # Not with Orbax, for which a file that it may not read is one that is not there.
        folder = self.folder / str(step)
        found = json.loads((folder / _METADATA).read_bytes())["custom_metadata"]
        if "state_shapes" not in found:  # from before there were checksums
            return found
        if files.CHECKSUM not in found:
            raise files.DamagedFileError("the checksum over its metadata is missing")
        found = files.verified(found, "its metadata")
        return found | {CHECKSUMS: checksums.saved(folder / CHECKSUMS)}

    def restore(self, step: int, state: TrainState, iterator: Any) -> TrainState:
        """Loads a step; `state` has shapes and shardings, `iterator` is moved to its position.

        Raises:
          UserError: the step has another state, or cannot be read.
          DamagedCheckpointError: it is not what was saved.
        """
        saved, tree = self.metadata(step), _as_dict(state)
        with self._reported(f"load step {step}", damaged=step):
            shapes = saved.get("state_shapes") or damage.together(lambda: self._shapes(step))
        if lines := _different(shapes, checksums.shapes(tree)):
            raise UserError(
                f"the state of step {step} in {self.folder} does not fit this config: {some(lines)}"
            )
        position = Position(iterator, sealed=CHECKSUMS in saved)
        return TrainState(**self._load(step, saved, {"state": tree, "data": position}))

    def restore_params(self, step: int, params: Any) -> Any:
        """Loads only the parameters of a step, into shapes with shardings.

        Raises:
          UserError: it cannot be read.
          DamagedCheckpointError: it is not what was saved.
        """
        return self.restore_part(step, {"params": params})["params"]

    def restore_part(self, step: int, tree: Any) -> Any:
        """Loads part of the state of a step, as `restore_params` does."""
        return self._load(step, self.metadata(step), {"state": tree}, partial=True)

    def _load(
        self, step: int, saved: dict[str, Any], wanted: dict[str, Any], *, partial: bool = False
    ) -> Any:
        """Loads, and compares with the checksums."""
        context = ocp.Context()
        context.pytree.loading.partial_load = partial
        if jax.process_count() > 1:  # each by itself: nobody waits for one that has failed
            this = jax.process_index()
            context.multiprocessing.primary_host = this
            context.multiprocessing.active_processes = {this}
            context.multiprocessing.barrier_sync_key_prefix = f"process-{this}"

        def load() -> Any:
            with context:
                return ocp.load_checkpointables(self.readable(step), wanted)["state"]

        with self._reported(f"load step {step}", damaged=step):
            state = damage.together(load)
            if CHECKSUMS in saved and (wrong := checksums.mismatches(saved[CHECKSUMS], state)):
                more = f", nor do {len(wrong) - 1} other arrays" if len(wrong) > 1 else ""
                raise files.DamagedFileError(f"{wrong[0]} does not match its checksum{more}")
            return state

    def _shapes(self, step: int) -> dict[str, str]:
        return checksums.shapes(ocp.metadata(self.readable(step), "state").metadata)

    def set_aside(self, step: int) -> pathlib.Path:
        """Moves a damaged checkpoint out of the way; returns where it is now."""
        target = self.folder.parent / "damaged" / str(step)
        number = 1
        while target.exists():
            number += 1
            target = target.with_name(f"{step}-{number}")
        with self._reported(f"set aside step {step}"):
            if jax.process_count() > 1:  # all have looked for a free name before one takes it
                multihost_utils.sync_global_devices("damaged checkpoint found")
            if jax.process_index() == 0:
                target.parent.mkdir(exist_ok=True)
                (self.folder / str(step)).rename(target)
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("damaged checkpoint set aside")
            self._checkpointer.close()
            self._checkpointer = self._open()
        return target

    @contextmanager
    def _reported(self, doing: str, damaged: int | None = None) -> Iterator[None]:
        """Turns what Orbax raises into one line that says what to do."""
        try:
            yield
        except Exception as error:
            reason = damage.reason(error)
            unseen = self._unseen(damaged) if damage.is_damage(error) else ""
            if damaged is None or unseen or not damage.is_damage(error):
                reason = unseen or reason
                raise UserError(f"cannot {doing} in {self.folder}: {reason}") from error
            others = [s for s in self.steps if s != damaged]
            use = f"use --step {max(others)}" if others else "there is no other"
            raise DamagedCheckpointError(
                f"checkpoint {self.folder / str(damaged)} is damaged: {reason}; {use}"
            ) from error

    def _unseen(self, step: int | None) -> str:
        """Why a step in a bucket cannot be read; Orbax takes it for missing files then."""
        try:
            for part in ("state", CHECKSUMS) if storage.in_bucket(self.folder) else ():
                (self.folder / str(step) / part).is_dir()
        except OSError as error:
            return damage.reason(error)
        return ""

    @contextmanager
    def _save_reported(self) -> Iterator[None]:
        """The same for a save, with what is still there."""
        try:
            yield
        except Exception as error:
            newest = max(bucket_checkpoints.complete(self.folder), default=None)
            kept = "no earlier checkpoint" if newest is None else f"step {newest} is complete"
            start = "starts over" if newest is None else "resumes from there"
            raise UserError(
                f"cannot save step {self._saving} in {self.folder}: {damage.reason(error)}; "
                f"{kept}, and the same command {start}"
            ) from error

    def close(self) -> None:
        """Waits for the last save and frees the threads."""
        try:
            with self._save_reported():
                if self._staging and self._pending is not None:
                    self._pending.result()
                self._checkpointer.close()
        finally:
            if self._staging:
                self._staging.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self.close()
        except UserError:
            if kind is None:  # do not hide the error that is on its way
                raise


def _sealed(metadata: dict[str, Any], tree: Any) -> dict[str, Any]:
    """What to save as metadata with a tree of arrays."""
    return files.sealed(metadata | {"state_shapes": checksums.shapes(tree)})


def _different(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line for each name whose value differs."""
    return [
        f"{name}: {before.get(name, 'absent')} -> {after.get(name, 'absent')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _as_dict(state: TrainState) -> dict[str, Any]:
    return dict(vars(state))


@functools.cache
def _git_revision() -> str | None:
    """The commit of the source tree, or None for an installed package."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=pathlib.Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
